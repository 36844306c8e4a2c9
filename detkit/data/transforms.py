"""From a picture of any size to the network's input, and from the network's pixels back to the picture's.

Training pictures go through augmentations (detkit.data.augment) that end at the input's size; pictures to be
evaluated or predicted are only fitted here, which has an exact inverse.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.convert import clip
from detkit.registry import augmentations
from detkit.types import Detections, Meta, Sample, Target

PADDING_GREY = 114


class Fit:
    """Resize pictures to the network's input, by stretching or with their aspect ratio kept (letterbox).

    Bilinear without smoothing, pixel centres at half integers: what torchvision's detectors are trained and
    run with.

    Args:
        size: (height, width) of the input in pixels.
        letterbox: keep the aspect ratio, picture at the top left, grey padding at the right or bottom.
    """

    def __init__(self, size: tuple[int, int], letterbox: bool = False) -> None:
        self.size = size
        self.letterbox = letterbox

    def inner_size(self, source: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that a picture of size `source` gets inside the input."""
        if not self.letterbox:
            return self.size
        scale = min(self.size[0] / source[0], self.size[1] / source[1])
        return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))

    def matrix(self, source: tuple[int, int]) -> np.ndarray:
        """(3, 3) float64 from source pixels to input pixels."""
        height, width = self.inner_size(source)
        return np.diag([width / source[1], height / source[0], 1.0])

    def image(self, image: np.ndarray) -> Tensor:
        """(3, size) float32 in 0..1 from (H, W, 3) uint8."""
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div_(255)
        inner = self.inner_size((image.shape[0], image.shape[1]))
        if tuple(tensor.shape[1:]) != inner:
            tensor = F.interpolate(tensor[None], inner, mode="bilinear", align_corners=False)[0]
        bottom, right = self.size[0] - inner[0], self.size[1] - inner[1]
        return F.pad(tensor, (0, right, 0, bottom), value=PADDING_GREY / 255) if bottom or right else tensor

    def __call__(self, sample: Sample) -> tuple[Tensor, tuple[int, int], Target, Meta]:
        """The picture as a tensor, its size inside it, and target and meta in its pixels."""
        matrix = self.matrix(sample.size)
        inner = self.inner_size(sample.size)
        target = _map_target(sample.target, matrix, inner, self.size)
        old = sample.meta.matrix
        meta = replace(sample.meta, matrix=None if old is None else matrix @ old)
        return self.image(sample.image), inner, target, meta


def undo(detections: Detections, meta: Meta) -> Detections:
    """Detections in the network's pixels as detections in the source's own pixels, inside its borders.

    Raises:
        ValueError: the picture went through an augmentation that has no inverse.
    """
    if meta.matrix is None:
        raise ValueError(f"{meta.source} was augmented at random; its detections cannot be taken back")
    boxes = clip(map_boxes(detections.boxes, np.linalg.inv(meta.matrix)), meta.size)
    return replace(detections, boxes=boxes)


def map_boxes(boxes: Tensor, matrix: np.ndarray) -> Tensor:
    """(N, 4) xyxy boxes under an axis-parallel affine matrix (3, 3)."""
    scale = torch.tensor([matrix[0, 0], matrix[1, 1]] * 2, dtype=torch.float64)
    shift = torch.tensor([matrix[0, 2], matrix[1, 2]] * 2, dtype=torch.float64)
    return (boxes.cpu().double() * scale + shift).float().to(boxes.device)


def _map_target(target: Target, matrix: np.ndarray, inner: tuple[int, int], size: tuple[int, int]) -> Target:
    masks = target.masks
    if masks is not None and tuple(masks.shape[1:]) != size:
        resized = F.interpolate(masks[None].float(), inner, mode="nearest-exact")[0] > 0.5 if len(masks) else masks
        masks = (
            F.pad(resized, (0, size[1] - inner[1], 0, size[0] - inner[0])) if len(masks) else masks.new_zeros(0, *size)
        )
    area = target.area * float(matrix[0, 0] * matrix[1, 1])
    return replace(target, boxes=clip(map_boxes(target.boxes, matrix), inner), area=area, masks=masks)


class Augment:
    """Random augmentation of a training picture by one albumentations pipeline, ending at the input's size.

    Geometric transforms run first, then the resize to the input, then those that only change pixels: they
    cost least there.

    Args:
        options: `[{name: flip, ...}, ...]`, parts of the registry of augmentations.
        fit: the network's input.
        min_visibility: an object of which a smaller part is left after a crop is dropped.
    """

    def __init__(self, options: Sequence[Mapping[str, Any]], fit: Fit, min_visibility: float = 0.2) -> None:
        import albumentations as A

        parts = [augmentations.build(part, f"augment[{index}]") for index, part in enumerate(options)]
        pixel_only = [part for part in parts if _changes_only_pixels(part)]
        geometric = [part for part in parts if not _changes_only_pixels(part)]
        height, width = fit.size
        resize: list[Any] = [A.Resize(height, width)]
        if fit.letterbox:
            resize = [
                A.LongestMaxSize(max_size_hw=fit.size),
                A.PadIfNeeded(height, width, position="top_left", fill=PADDING_GREY),
            ]
        # Truths may touch the border to within a rounding error: clip, instead of refusing the picture.
        boxes = A.BboxParams(
            "pascal_voc", label_fields=["index"], min_visibility=min_visibility, min_width=1, min_height=1, clip=True
        )
        self.pipeline = A.Compose([*geometric, *resize, *pixel_only], bbox_params=boxes)
        self.fit = fit

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """The augmented sample, at the input's size; the same seed gives the same picture."""
        # One pair of generators for all transforms: seeding each with the same number would make their
        # choices depend on one another.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        target = sample.target
        given: dict[str, Any] = {
            "image": sample.image,
            "bboxes": target.boxes.numpy(),
            "index": np.arange(len(target)),
        }
        if target.masks is not None and len(target):
            given["masks"] = target.masks.numpy().astype(np.uint8)
        result = self.pipeline(**given)
        # Albumentations drops boxes but not their masks; the index says which are left.
        kept = torch.as_tensor(np.asarray(result["index"], dtype=np.int64))
        boxes = torch.as_tensor(np.asarray(result["bboxes"], dtype=np.float32)).reshape(-1, 4)
        masks = None
        if target.masks is not None:
            masks = torch.zeros(0, *self.fit.size, dtype=torch.bool)
            if len(kept):
                masks = torch.from_numpy(np.stack([result["masks"][index] for index in kept.tolist()])).bool()
        augmented = Target(boxes, target.labels[kept], target.crowd[kept], target.difficult[kept], masks=masks)
        return Sample(result["image"], augmented, replace(sample.meta, matrix=None))


def _changes_only_pixels(part: Any) -> bool:
    """Whether boxes stay where they are under `part`, an albumentations transform or composition."""
    from albumentations import BaseCompose, ImageOnlyTransform

    if isinstance(part, BaseCompose):
        return all(_changes_only_pixels(inner) for inner in part.transforms)
    return isinstance(part, ImageOnlyTransform)
