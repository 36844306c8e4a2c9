"""Made-up inputs of the benchmarks: the same for the same seed, on every machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE = 1280.0
"""Width and height of the image, in pixels, whatever the number of boxes: more boxes are a denser scene."""
IMAGES, CLASSES = 8, 80


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a suppression is given.

    Args:
        boxes: (N, 4) float32 xyxy pixels.
        scores: (N,) float32 in 0..1, in no order.
        labels: (N,) int64 in 0..79, or None for boxes of one class.
        image_index: (N,) int64 in 0..7, or None for boxes of one image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None = None
    image_index: Tensor | None = None

    @property
    def groups(self) -> Tensor | None:
        """(N,) int64, one number for each image and class; None where there is one group."""
        return None if self.labels is None or self.image_index is None else self.image_index * CLASSES + self.labels

    def to(self, device: str) -> "Candidates":
        """The same on another device."""
        labels, images = (None if key is None else key.to(device) for key in (self.labels, self.image_index))
        return Candidates(self.boxes.to(device), self.scores.to(device), labels, images)


def detector(count: int, seed: int) -> Candidates:
    """What a detector puts out before suppression: a dozen jittered boxes an object, best scores where they fit best,
    and a third of the boxes anywhere, with low scores.

    At IoU 0.5 about 61 of 100 are kept, 545 of 1,000, 4,000 of 10,000 and 19,200 of 100,000.
    """
    boxes, scores, _ = _scene(count, seed)
    return Candidates(boxes, scores)


def uniform(count: int, seed: int) -> Candidates:
    """Boxes anywhere, sides from 8 to 64 pixels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=random) * IMAGE
    sides = 8 + 56 * torch.rand(count, 2, generator=random)
    return Candidates(_inside(centres, sides), torch.rand(count, generator=random))


def dense(count: int, seed: int) -> Candidates:
    """The most work: each box overlaps some 24 others, but by an IoU of at most about 0.45, so that nearly all stay."""
    random = torch.Generator().manual_seed(seed)
    across = max(1, round(count**0.5))
    step = IMAGE / across
    cells = torch.arange(count)
    cells = torch.stack((cells % across, cells // across), dim=1)
    centres = (cells + 0.5 + 0.05 * torch.rand(count, 2, generator=random)) * step
    boxes = torch.cat((centres - 1.25 * step, centres + 1.25 * step), dim=1)
    order = torch.randperm(count, generator=random)
    return Candidates(boxes[order], torch.rand(count, generator=random))


def batched(count: int, seed: int) -> Candidates:
    """8 images like `detector`'s, whose objects are of 80 classes; `count` boxes in all."""
    counts = [(count + image) // IMAGES for image in range(IMAGES)]
    scenes = [_scene(number, seed * IMAGES + image) for image, number in enumerate(counts)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    boxes, scores, labels = (torch.cat(parts)[order] for parts in zip(*scenes))
    images = torch.repeat_interleave(torch.arange(IMAGES), torch.tensor(counts))
    return Candidates(boxes, scores, labels, images[order])


KINDS: dict[str, Callable[[int, int], Candidates]] = {
    "detector": detector,
    "uniform": uniform,
    "dense": dense,
    "batched": batched,
}


def anchors_and_targets(anchors: int, targets: int, seed: int) -> tuple[Tensor, Tensor]:
    """(A, 4) and (N, 4) float32 xyxy pixels; each ground truth is a jittered anchor, so that none overlaps nothing."""
    random = torch.Generator().manual_seed(seed)
    centres, sides = _objects(anchors, random)
    member = torch.randint(anchors, (targets,), generator=random)
    jitter = torch.randn(targets, 4, generator=random)
    target_centres = centres[member] + 0.1 * sides[member] * jitter[:, :2]
    return _inside(centres, sides), _inside(target_centres, sides[member] * torch.exp(0.1 * jitter[:, 2:]))


def _scene(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of one image: those of objects, with their classes, and stray ones."""
    random = torch.Generator().manual_seed(seed)
    stray = count // 3
    object_centres, object_sides = _objects(max(1, round(count / 12)), random)
    member = torch.randint(len(object_centres), (count - stray,), generator=random)
    jitter = torch.randn(count - stray, 4, generator=random)
    centres = object_centres[member] + 0.17 * object_sides[member] * jitter[:, :2]
    sides = object_sides[member] * torch.exp(0.17 * jitter[:, 2:])
    stray_centres, stray_sides = _objects(stray, random)
    fit = torch.cat((2 - jitter.norm(dim=1), torch.full((stray,), -2.0)))
    scores = torch.sigmoid(fit + torch.randn(count, generator=random))
    boxes = _inside(torch.cat((centres, stray_centres)), torch.cat((sides, stray_sides)))
    order = torch.randperm(count, generator=random)
    labels = torch.cat((_classes(len(object_centres), random)[member], _classes(stray, random)))
    return boxes[order], scores[order], labels[order]


def _classes(count: int, random: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=random)


def _objects(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres and sides (count, 2) anywhere in the image: median side 80 pixels, log-normal, various shapes."""
    centres = torch.rand(count, 2, generator=random) * IMAGE
    size, shape = torch.randn(count, 1, generator=random), torch.randn(count, 2, generator=random)
    return centres, 80 * torch.exp(0.8 * size + 0.3 * shape)


def _inside(centres: Tensor, sides: Tensor) -> Tensor:
    """xyxy clipped to the image; none loses all of its area."""
    centres = centres.clamp(0, IMAGE)
    return torch.cat((centres - sides / 2, centres + sides / 2), dim=1).clamp(0, IMAGE)
