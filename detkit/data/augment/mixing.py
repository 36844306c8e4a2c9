"""Augmentations that combine several training images: mosaic and mixup."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detkit.data.augment.warping import (
    RandomWarp,
    Size,
    check_scale,
    translation_matrix,
    warp_boxes,
    warp_image,
    warp_mask,
)
from detkit.data.transforms import PADDING_GREY, UNCUT, Mix
from detkit.errors import ConfigError, check_range
from detkit.registry import augmentations
from detkit.structures import Sample, Target


@augmentations.register("mosaic")
class Mosaic(Mix):
    """Four images around a random point (Bochkovskiy et al. 2020, YOLOv4, section 3.3), on a canvas of twice the input
    size from which a random warp is taken (YOLOv5, YOLOX).

    Each image is resized to fit into the input, keeping its aspect ratio, and has a corner at the point, which is in
    the central half of the canvas along each axis. The result has the input size.

    Args:
        scale, rotation, shear, translation, perspective: parameters of the warp as in `perspective`; scale 1 shows
            about half of the canvas along each axis. The defaults are YOLOv5's; YOLOX uses scale [0.1, 2], rotation 10,
            shear 2.
        probability: probability of the mosaic; otherwise the image is not changed.
    """

    partners = 3

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 1.5),
        rotation: float = 0.0,
        shear: float = 0.0,
        translation: float = 0.1,
        perspective: float = 0.0,
        probability: float = 1.0,
    ) -> None:
        check_range("mosaic", 0, 1, probability=probability)
        self.probability = probability
        self.warp = RandomWarp("mosaic", rotation, translation, scale, shear, perspective)

    def __call__(
        self, samples: Sequence[Sample], size: Size, min_visibility: float, random: np.random.Generator
    ) -> Sample:
        canvas_size = (2 * size[0], 2 * size[1])
        row, column = (round(side * random.uniform(0.5, 1.5)) for side in size)
        cut = self.warp.draw(random, canvas_size, size)
        canvas = np.full((*canvas_size, 3), PADDING_GREY, dtype=np.uint8)
        placed = []
        for number, sample in enumerate(samples):
            inner = _fitted_size(sample.size, size)
            top = row if number >= 2 else row - inner[0]
            left = column if number % 2 else column - inner[1]
            place = _Place(sample.size, inner, top, left, canvas_size)
            place.draw_on(canvas, sample.image)
            placed.append(_carried(sample, place, cut, size, min_visibility))
        return _joined(warp_image(canvas, cut, size, PADDING_GREY), samples, placed)

    def largest_zoom(self, size: Size) -> float:
        return 1.0  # images are resized to the input first


@augmentations.register("mixup")
class Mixup(Mix):
    """Blends a second image in and adds its objects (Zhang et al. 2018, "mixup"; for detection Ge et al. 2021, YOLOX,
    section 2.1).

    The second image is resized to fit into the first, then by a random factor, and placed at random; parts outside are
    cut off, and grey is blended in where it has no pixels. All objects have the same weight, regardless of that of
    their image.

    Args:
        alpha: the weight of the first image is drawn from Beta(alpha, alpha), as in Zhang et al.; use at least 1, since
            below that one image is often invisible, but not its objects. Null for 0.5, as in YOLOX.
        scale: smallest and largest factor.
        flip: probability that the second image is mirrored left to right.
        probability: probability of the mixup; otherwise the image is not changed.
    """

    partners = 1

    def __init__(
        self,
        alpha: float | None = None,
        scale: tuple[float, float] = (0.5, 1.5),
        flip: float = 0.5,
        probability: float = 0.5,
    ) -> None:
        check_range("mixup", 0, 1, flip=flip, probability=probability)
        check_scale("mixup", scale)
        if alpha is not None and not 0 < alpha < np.inf:
            raise ConfigError(f"'mixup.alpha' must be greater than 0, or null for equal weights, but is {alpha}.")
        self.alpha, self.scale, self.flip, self.probability = alpha, scale, flip, probability

    def __call__(
        self, samples: Sequence[Sample], size: Size, min_visibility: float, random: np.random.Generator
    ) -> Sample:
        import cv2

        first, second = samples
        weight = 0.5 if self.alpha is None else random.beta(self.alpha, self.alpha)
        factor, mirrored = random.uniform(*self.scale), bool(random.uniform() < self.flip)
        height, width = (max(1, round(side * factor)) for side in _fitted_size(second.size, first.size))
        rooms = (first.size[0] - height, first.size[1] - width)
        top, left = (round(random.uniform(min(0, room), max(0, room))) for room in rooms)
        place = _Place(second.size, (height, width), top, left, first.size, mirrored)
        canvas = np.full_like(first.image, PADDING_GREY)
        place.draw_on(canvas, second.image)
        image = cv2.addWeighted(first.image, weight, canvas, 1 - weight, 0)
        stays = _Carried(first.target, first.proposals)
        return _joined(image, samples, [stays, _carried(second, place, np.eye(3), first.size, min_visibility)])

    def largest_zoom(self, size: Size) -> float:
        return max(1.0, self.scale[1])


@dataclass(frozen=True)
class _Place:
    """The placement of an image on a canvas, resized and maybe mirrored; it may exceed the canvas.

    Args:
        source: (height, width) of the image.
        inner: (height, width) to which it is resized.
        top, left: its corner on the canvas in pixels.
        canvas: (height, width) of the canvas.
        mirrored: mirrored left to right.
    """

    source: Size
    inner: Size
    top: int
    left: int
    canvas: Size
    mirrored: bool = False

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3) float64 from pixels of the image to pixels of the canvas."""
        x_scale, y_scale = self.inner[1] / self.source[1], self.inner[0] / self.source[0]
        scaling = np.diag([x_scale, y_scale, 1.0])
        if self.mirrored:
            scaling = translation_matrix(self.inner[1], 0) @ np.diag([-x_scale, y_scale, 1.0])
        return translation_matrix(self.left, self.top) @ scaling

    @property
    def visible(self) -> tuple[slice, slice]:
        """The rows and columns of the canvas that the image covers."""
        rows = slice(max(self.top, 0), min(self.top + self.inner[0], self.canvas[0]))
        columns = slice(max(self.left, 0), min(self.left + self.inner[1], self.canvas[1]))
        return rows, columns

    def part(self, image: np.ndarray, interpolation: int) -> np.ndarray:
        """Return the `visible` pixels of the image, or of a mask of its size."""
        import cv2

        rows, columns = self.visible
        scaled = cv2.resize(image, self.inner[::-1], interpolation=interpolation)
        if self.mirrored:
            scaled = scaled[:, ::-1]
        return scaled[
            rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left
        ]

    def draw_on(self, canvas: np.ndarray, image: np.ndarray) -> None:
        """Draw the image on the canvas."""
        import cv2

        canvas[self.visible] = self.part(image, cv2.INTER_LINEAR)


@dataclass(frozen=True)
class _Carried:
    """The objects and proposals of one image, in pixels of the result."""

    target: Target
    proposals: Tensor | None


def _carried(sample: Sample, place: _Place, cut: np.ndarray, size: Size, min_visibility: float) -> _Carried:
    """Map the objects and proposals of an image at `place` on a canvas, which `cut` maps to an image of `size`."""
    target = sample.target
    boxes, kept = _cut_boxes(target.boxes, place, cut, size, min_visibility)
    masks = None
    if target.masks is not None:
        masks = _cut_masks(target.masks[kept], place, cut, size)
    proposals = None
    if sample.proposals is not None:
        proposals = _cut_boxes(sample.proposals, place, cut, size, min_visibility)[0]
    left = Target(boxes, target.labels[kept], target.crowd[kept], target.difficult[kept], masks=masks)
    return _Carried(left, proposals)


def _cut_boxes(
    boxes: Tensor, place: _Place, cut: np.ndarray, size: Size, min_visibility: float
) -> tuple[Tensor, Tensor]:
    """Return the sufficiently visible boxes, clipped to the result, and their indices.

    The visibility is the fraction of a box's area after both cuts, by the canvas and by the result.
    """
    now = boxes.numpy().astype(np.float64)
    visible = np.ones(len(now))
    for matrix, limit in ((place.matrix, place.canvas), (cut, size)):
        whole = warp_boxes(now, matrix)
        now = np.clip(whole, 0, [limit[1], limit[0]] * 2)
        visible *= np.where(
            _areas(whole) > 1e-12, _areas(now) / np.maximum(_areas(whole), 1e-12), (now == whole).all(1)
        )
    large = (now[:, 2:] - now[:, :2] >= 1).all(1)
    # Objects that become smaller than a pixel without being cut are kept, as without augmentation.
    kept = torch.from_numpy(np.flatnonzero((visible > 0) & (visible >= min_visibility) & (large | (visible >= UNCUT))))
    return torch.from_numpy(now).float()[kept], kept


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _cut_masks(masks: Tensor, place: _Place, cut: np.ndarray, size: Size) -> Tensor:
    """Transform (N, H, W) bool masks of an image to (N, *size) bool."""
    import cv2

    rows, columns = place.visible
    matrix = cut @ translation_matrix(columns.start, rows.start)
    result = torch.zeros(len(masks), *size, dtype=torch.bool)
    for row, mask in zip(result, masks.byte().numpy()):
        row[:] = torch.from_numpy(warp_mask(place.part(mask, cv2.INTER_NEAREST_EXACT), matrix, size))
    return result


def _joined(image: np.ndarray, samples: Sequence[Sample], carried: Sequence[_Carried]) -> Sample:
    """Create the sample of the mixed image."""
    targets = [part.target for part in carried]
    masks = None
    if targets[0].masks is not None:
        masks = torch.cat([target.masks for target in targets if target.masks is not None])
    target = Target(
        torch.cat([target.boxes for target in targets]),
        torch.cat([target.labels for target in targets]),
        torch.cat([target.crowd for target in targets]),
        torch.cat([target.difficult for target in targets]),
        masks=masks,
    )
    source = " + ".join(sample.meta.source for sample in samples)
    meta = replace(samples[0].meta, source=source, matrix=None)
    return Sample(image, target, meta, _best_first([part.proposals for part in carried if part.proposals is not None]))


def _best_first(proposals: Sequence[Tensor]) -> Tensor | None:
    """Interleave the proposals of several images: the best of each, then the second of each, and so on."""
    if not proposals:
        return None
    ranks = torch.cat([torch.arange(len(boxes)) for boxes in proposals])
    return torch.cat(list(proposals))[ranks.argsort(stable=True)]


def _fitted_size(source: Size, size: Size) -> Size:
    """Return the (height, width) of an image resized to fit into `size`, keeping the aspect ratio."""
    scale = min(size[0] / source[0], size[1] / source[1])
    return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
