"""Resizing of images to the network's input, and mapping of predictions back to source pixels.

Training images pass through augmentations (detkit.data.augment) that end with the resize to the input; images for
evaluation and prediction are only resized here, which has an exact inverse.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.convert import clip
from detkit.boxes.mask_paste import paste_masks
from detkit.data.dataset import Dataset
from detkit.data.points import PointRule, as_keypoints, check_parts, with_point_removal, with_points
from detkit.data.probe import check_result, check_usable, failure
from detkit.errors import ConfigError, DetkitError
from detkit.registry import augmentations
from detkit.structures import IGNORED_PIXEL, Detections, Meta, Sample, Target

PADDING_GREY = 114
BATCH_STRIDE = 32
UNCUT = 0.999
"""Visible fraction from which an object counts as not cut: the rest is a rounding error."""

Resize = Literal["stretch", "letterbox", "short_side", "crop"]


class Fitted(NamedTuple):
    """An image in input pixels, before batching.

    Args:
        image: (3, H, W) float32 in 0..1.
        size: (height, width) in `image` without padding.
        target: the target in pixels of `image`.
        meta: the meta data with the matrix from the source to `image`.
        proposals: (P, 4) float32 xyxy pixels of `image`, or None.
    """

    image: Tensor
    size: tuple[int, int]
    target: Target
    meta: Meta
    proposals: Tensor | None = None


class Fit:
    """Resize images to the network's input.

    Bilinear without antialiasing, with pixel centres at half integers, as in torchvision's detectors.

    Args:
        size: (height, width) of the input in pixels; for short_side (short, long), the maximum lengths of the shorter
            and longer side; for crop the size of the crops.
        resize: "stretch" to `size`; "letterbox" keeps the aspect ratio, with the image at the top left of `size` and
            grey padding at the right or bottom; "short_side" keeps it too, and the images of a batch are padded to the
            largest (Faster R-CNN, torchvision's GeneralizedRCNNTransform); "crop" keeps images as they are, padded to
            `size` if they are smaller and then to the largest of the batch: training uses random crops (Augment),
            evaluation sliding windows (detkit.inference.windows).
        padding: RGB in 0..1 around the images of a batch, and around small images for crop; the backbone's mean
            colour, which is normalised to 0.
        trim: for letterbox, pad only to multiples of 32 and to the largest image of the batch, if that is less than
            `size`, which saves time.
    """

    def __init__(
        self,
        size: tuple[int, int],
        resize: Resize = "stretch",
        padding: tuple[float, float, float] = (0.0, 0.0, 0.0),
        trim: bool = False,
    ) -> None:
        self.size = size
        self.resize = resize
        self.padding = padding
        self.trim = trim and resize == "letterbox"

    def at(self, size: tuple[int, int]) -> "Fit":
        """Create the same resize for another input size."""
        return Fit(size, self.resize, self.padding, self.trim)

    def untrimmed(self) -> "Fit":
        """Create the same resize with full padding, as in training, so that all batches have the same size."""
        return Fit(self.size, self.resize, self.padding)

    @property
    def one_size(self) -> bool:
        """Return whether all batches have the size `size`."""
        return self.resize in ("stretch", "letterbox") and not self.trim

    def inner_size(self, source: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) to which an image of size `source` is resized, without padding."""
        match self.resize:
            case "stretch":
                return self.size
            case "letterbox":
                scale = min(self.size[0] / source[0], self.size[1] / source[1])
                return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
            case "short_side":
                scale = self._scale(source)
                return max(1, int(source[0] * scale)), max(1, int(source[1] * scale))
            case "crop":
                return source

    def outer_size(self, source: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of the tensor of an image of size `source`, with padding."""
        match self.resize:
            case "short_side":
                return self.inner_size(source)
            case "crop":
                return max(source[0], self.size[0]), max(source[1], self.size[1])
            case "letterbox" if self.trim:
                height, width = (_round_up(side, BATCH_STRIDE) for side in self.inner_size(source))
                return min(height, self.size[0]), min(width, self.size[1])
            case _:
                return self.size

    def matrix(self, source: tuple[int, int]) -> np.ndarray:
        """(3, 3) float64 from source pixels to input pixels."""
        height, width = self.inner_size(source)
        x_scale, y_scale = width / source[1], height / source[0]
        if self.resize == "short_side":
            # Rounded like torchvision, so that boxes are bit-identical.
            x_scale, y_scale = float(np.float32(x_scale)), float(np.float32(y_scale))
        return np.diag([x_scale, y_scale, 1.0])

    def image(self, image: np.ndarray) -> Tensor:
        """Convert (H, W, 3) uint8 to (3, H, W) float32 in 0..1 of size `outer_size`."""
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div_(255)
        source = (image.shape[0], image.shape[1])
        inner, outer = self.inner_size(source), self.outer_size(source)
        if source != inner:
            tensor = F.interpolate(tensor[None], inner, mode="bilinear", align_corners=False)[0]
        if inner == outer:
            return tensor
        padded = self._blank(1, outer)[0]
        padded[:, : inner[0], : inner[1]] = tensor
        return padded

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Stack tensors of `image` to (B, 3, H, W).

        Tensors of different sizes are padded at the right and bottom to the largest height and width, for short_side
        rounded up to a multiple of 32.
        """
        if self.one_size:
            return torch.stack(list(images))
        stride = BATCH_STRIDE if self.resize == "short_side" else 1
        height, width = (_round_up(max(image.shape[side] for image in images), stride) for side in (1, 2))
        batch = self._blank(len(images), (height, width))
        for row, image in zip(batch, images):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch

    def __call__(self, sample: Sample) -> Fitted:
        """Resize a sample: image, target, meta and proposals."""
        matrix = self.matrix(sample.size)
        inner = self.inner_size(sample.size)
        target = _map_target(sample.target, matrix, inner, self.outer_size(sample.size))
        proposals = None if sample.proposals is None else clip(map_boxes(sample.proposals, matrix), inner)
        old = sample.meta.matrix
        meta = replace(sample.meta, matrix=None if old is None else matrix @ old)
        return Fitted(self.image(sample.image), inner, target, meta, proposals)

    def _scale(self, source: tuple[int, int]) -> float:
        return min(self.size[0] / min(source), self.size[1] / max(source))

    def _blank(self, count: int, size: tuple[int, int]) -> Tensor:
        """Create (count, 3, height, width) filled by padding."""
        colour = (PADDING_GREY / 255,) * 3 if self.resize == "letterbox" else self.padding
        blank = torch.tensor(colour).view(1, 3, 1, 1).expand(count, 3, *size)
        return blank.clone(memory_format=torch.contiguous_format)


def _round_up(number: int, step: int) -> int:
    """Round up to a multiple of `step`."""
    return -(-number // step) * step


def undo(detections: Detections, meta: Meta) -> Detections:
    """Map detections from input pixels to source pixels, clipped to the image.

    Detections in the padding become boxes without area on the border, as in torchvision. Mask patches are pasted into
    masks of the source's size.

    Raises:
        ValueError: the image was augmented, which has no inverse.
    """
    if meta.matrix is None:
        raise ValueError(f"{meta.source} was augmented at random; its detections cannot be mapped back")
    boxes = map_boxes(detections.boxes, np.linalg.inv(meta.matrix))
    masks = None
    if detections.mask_patches is not None:
        # Use the unclipped boxes, which the patches refer to.
        masks = paste_masks(detections.mask_patches, boxes, meta.size)
    points = None if detections.points is None else map_points(detections.points, np.linalg.inv(meta.matrix))
    return replace(detections, boxes=clip(boxes, meta.size), masks=masks, mask_patches=None, points=points)


def map_boxes(boxes: Tensor, matrix: np.ndarray) -> Tensor:
    """Transform (N, 4) xyxy boxes by an axis-parallel affine matrix (3, 3)."""
    scale = torch.tensor([matrix[0, 0], matrix[1, 1]] * 2, dtype=torch.float64)
    shift = torch.tensor([matrix[0, 2], matrix[1, 2]] * 2, dtype=torch.float64)
    return (boxes.cpu().double() * scale + shift).float().to(boxes.device)


def map_points(points: Tensor, matrix: np.ndarray) -> Tensor:
    """Transform (..., 2) xy points by an axis-parallel affine matrix (3, 3)."""
    scale = torch.tensor([matrix[0, 0], matrix[1, 1]], dtype=torch.float64)
    shift = torch.tensor([matrix[0, 2], matrix[1, 2]], dtype=torch.float64)
    return (points.cpu().double() * scale + shift).float().to(points.device)


def _map_target(target: Target, matrix: np.ndarray, inner: tuple[int, int], size: tuple[int, int]) -> Target:
    masks = target.masks
    if masks is not None and tuple(masks.shape[1:]) != size:
        resized = masks.new_zeros(len(masks), *size)
        if len(masks):
            # Bytes take a quarter of the time of floats.
            bytes_ = F.interpolate(masks[None].byte(), inner, mode="nearest-exact")[0]
            resized[:, : inner[0], : inner[1]] = bytes_.bool()
        masks = resized
    semantic = target.semantic
    if semantic is not None and tuple(semantic.shape) != size:
        resized = semantic.new_full(size, IGNORED_PIXEL)
        resized[: inner[0], : inner[1]] = F.interpolate(semantic[None, None], inner, mode="nearest-exact")[0, 0]
        semantic = resized
    area = target.area * float(matrix[0, 0] * matrix[1, 1])
    boxes = clip(map_boxes(target.boxes, matrix), inner)
    points = None if target.points is None else map_points(target.points, matrix)
    return replace(target, boxes=boxes, area=area, masks=masks, semantic=semantic, points=points)


class Mix(ABC):
    """Base class of augmentations that combine several images, registered like other augmentations.

    Attributes:
        partners: number of further images.
        probability: probability of mixing; otherwise the image is not changed.
    """

    partners: ClassVar[int]
    probability: float

    @abstractmethod
    def __call__(
        self, samples: Sequence[Sample], size: tuple[int, int], min_visibility: float, random: np.random.Generator
    ) -> Sample:
        """Create the mixed image without modifying the given ones.

        Args:
            samples: 1 + `partners` images of any size.
            size: (height, width) of the input.
            min_visibility: objects and proposals with a smaller visible fraction are dropped.
            random: the random generator to use.
        """

    def largest_zoom(self, size: tuple[int, int]) -> float:
        """Return the largest magnification of an image of (height, width) relative to the plain resize; infinite if
        unknown."""
        return math.inf


class Augment:
    """Random augmentation of training images: mixes, then an albumentations pipeline that ends at the input size.

    Mixes (mosaic, mixup) run first, in order, on images of the data set. Then follow geometric transforms, the resize
    to the input (except for short_side, whose size depends on the image), and pixel transforms, which are cheapest at
    the end. Proposals are transformed like boxes and do not affect anything else.

    Args:
        options: `[{name: flip, ...}, ...]`, parts of the registry of augmentations.
        fit: the resize to the input.
        min_visibility: objects and proposals with a smaller visible fraction after a cut are dropped, as are those
            whose visible part is less than a pixel wide or high. Objects that become that small without a cut are kept.
        points: the rule for images with points (detkit.data.points); None without points.
        tried: the parts are known to work; otherwise those of albumentations are tried on a synthetic image.

    Raises:
        ConfigError: a part or option is unknown, a part cannot be used, or the parts do not support points.
    """

    def __init__(
        self,
        options: Sequence[Mapping[str, Any]],
        fit: Fit,
        min_visibility: float = 0.2,
        points: PointRule | None = None,
        tried: bool = False,
    ) -> None:
        import albumentations as A

        from detkit.data.augment.single_image import VisibleBoxes

        self.options, self.fit, self.min_visibility, self.points = options, fit, min_visibility, points
        built = [augmentations.build(part, f"augment[{index}]") for index, part in enumerate(options)]
        self.mixes = [part for part in built if isinstance(part, Mix)]
        parts = [part for part in built if not isinstance(part, Mix)]
        pixel_only = [part for part in parts if _changes_only_pixels(part)]
        geometric = [part for part in parts if not _changes_only_pixels(part)]
        if not tried:
            check_usable(parts)
        # The parts before the resize, which is last for short_side.
        self._of_source = [*self.mixes, *(parts if fit.resize == "short_side" else geometric)]
        if points is not None:
            check_parts(self.mixes, parts, points)
            geometric = with_point_removal(geometric)
        # Objects may exceed the border by a rounding error: clip instead of rejecting the image.
        boxes = A.BboxParams("pascal_voc", min_visibility=min_visibility, clip=True)
        # Proposals are a separate target, since some transforms choose a window by the ground truth ("bboxes").
        self.pipeline = A.Compose(
            [*geometric, *_resize_parts(fit), *pixel_only],
            bbox_params=boxes,
            keypoint_params=None if points is None else A.KeypointParams("xy", remove_invisible=False),
            additional_targets={"proposals": "bboxes"},
        )
        # Compose does not accept a custom processor, and has already passed this one to all transforms.
        self.pipeline.processors["bboxes"].__class__ = VisibleBoxes

    def at(self, size: tuple[int, int]) -> "Augment":
        """Create the same augmentation for another input size."""
        return Augment(self.options, self.fit.at(size), self.min_visibility, self.points, tried=True)

    def __call__(self, sample: Sample, seed: int, others: Dataset | Sequence[Sample] | None = None) -> Sample:
        """Augment a sample; the result has the input size except for short_side.

        The same seed gives the same image, given the same `others`.

        Args:
            others: the images from which mixes draw; None to skip mixes.

        Raises:
            DataError: a further image cannot be read, or an augmentation fails on the image.
            ConfigError: images with semantic maps would be mixed.
        """
        if others is not None:
            sample = self._mixed(sample, seed, others)
        # One pair of generators for all transforms: the same seed for each would correlate their choices.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        target = sample.target
        given: dict[str, Any] = {"image": sample.image, "bboxes": _numbered(target.boxes)}
        if sample.proposals is not None:
            given["proposals"] = _numbered(sample.proposals)
        if target.masks is not None and len(target):
            given["masks"] = target.masks.numpy().astype(np.uint8)
        if target.semantic is not None:
            # Shifted by one, so that ignored pixels are 0, which transforms use to fill masks.
            given["mask"] = target.semantic.numpy() + np.uint8(1)
        if self.points is not None and target.points is not None:
            given["keypoints"] = as_keypoints(target, sample.size)
        counts: dict[str, int] = {name: len(given[name]) for name in ("bboxes", "masks", "keypoints") if name in given}
        try:
            result = self.pipeline(**given)
            check_result(result, counts, None if self.fit.resize == "short_side" else self.fit.size)
        except (DetkitError, MemoryError):
            raise
        except Exception as error:
            raise failure(error, sample.meta.source, sample.size) from error
        # Albumentations drops boxes but not their masks; the fifth column has the indices of the kept ones.
        boxes = torch.from_numpy(result["bboxes"].astype(np.float32)).reshape(-1, 6)
        kept = boxes[:, 4].long()
        masks = None
        if target.masks is not None:
            masks = torch.zeros(0, *result["image"].shape[:2], dtype=torch.bool)
            if len(kept):
                masks = torch.from_numpy(np.stack([result["masks"][index] for index in kept.tolist()])).bool()
        augmented = Target(boxes[:, :4], target.labels[kept], target.crowd[kept], target.difficult[kept], masks=masks)
        if target.image_labels is not None:
            augmented = replace(augmented, image_labels=target.image_labels)
        if target.semantic is not None:
            augmented = replace(augmented, semantic=torch.from_numpy(result["mask"] - np.uint8(1)))
        if self.points is not None and target.points is not None:
            size = result["image"].shape[:2]
            augmented = with_points(augmented, target, kept, result["keypoints"], size, self.points)
        proposals = None
        if sample.proposals is not None:
            proposals = torch.from_numpy(result["proposals"].astype(np.float32)).reshape(-1, 6)[:, :4]
        return Sample(result["image"], augmented, replace(sample.meta, matrix=None), proposals)

    def largest_zoom(self, size: tuple[int, int]) -> float:
        """Return the largest magnification of an image of (height, width) `size` relative to the plain resize; infinite
        if a part has no method of this name."""
        return math.prod(_largest_zoom(part, size) for part in self._of_source)

    def _mixed(self, sample: Sample, seed: int, others: Dataset | Sequence[Sample]) -> Sample:
        if self.mixes and sample.target.semantic is not None:
            raise ConfigError(
                "'augment' mixes images (mosaic, mixup), which is not supported for semantic maps. Remove these parts; "
                "random_scale, flip and photometric are supported."
            )
        for number, mix in enumerate(self.mixes, start=1):
            # A separate generator, so that the pipeline makes the same choices with and without mixes.
            generator = np.random.default_rng([seed, number])
            if generator.uniform() < mix.probability:
                drawn = generator.integers(len(others), size=mix.partners).tolist()
                samples = [sample, *(others[index] for index in drawn)]
                sample = mix(samples, self.fit.size, self.min_visibility, generator)
        return sample


def _resize_parts(fit: Fit) -> list[Any]:
    """Create the albumentations transforms that resize an image to the input."""
    import albumentations as A
    import cv2

    height, width = fit.size
    # Albumentations' default, INTER_NEAREST, shifts masks by up to half a pixel.
    exact = cv2.INTER_NEAREST_EXACT
    match fit.resize:
        case "stretch":
            return [A.Resize(height, width, mask_interpolation=exact)]
        case "letterbox":
            return [
                A.LongestMaxSize(max_size_hw=fit.size, mask_interpolation=exact),
                A.PadIfNeeded(height, width, position="top_left", fill=PADDING_GREY),
            ]
        case "short_side":
            # Albumentations warns about a pipeline without transforms of boxes.
            return [A.NoOp()]
        case "crop":
            fill = tuple(round(255 * value) for value in fit.padding)
            return [
                A.PadIfNeeded(height, width, position="top_left", fill=fill),
                A.RandomCrop(height, width),
            ]


def _numbered(boxes: Tensor) -> np.ndarray:
    """Extend (N, 4) boxes to (N, 6) by their index and whether they were cut."""
    return np.column_stack([boxes.numpy(), np.arange(len(boxes), dtype=np.float32), np.zeros(len(boxes), np.float32)])


def _largest_zoom(part: Any, size: tuple[int, int]) -> float:
    from albumentations import BaseCompose

    if isinstance(part, BaseCompose):
        return math.prod(_largest_zoom(inner, size) for inner in part.transforms)
    return float(part.largest_zoom(size)) if hasattr(part, "largest_zoom") else math.inf


def _changes_only_pixels(part: Any) -> bool:
    """Return whether `part`, an albumentations transform or composition, does not change boxes."""
    from albumentations import BaseCompose, ImageOnlyTransform

    if isinstance(part, BaseCompose):
        return all(_changes_only_pixels(inner) for inner in part.transforms)
    return isinstance(part, ImageOnlyTransform)
