"""From an image of any size to the network's input, and from the network's pixels back to the image's.

Training images go through augmentations (detkit.data.augment) that end at the input's size; images to be
evaluated or predicted are only fitted here, which has an exact inverse.
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
from detkit.data.points import PointRule, as_keypoints, check_parts, watched, with_points
from detkit.data.probe import check_result, check_usable, failure
from detkit.errors import ConfigError, DetkitError
from detkit.registry import augmentations
from detkit.structures import IGNORED_PIXEL, Detections, Meta, Sample, Target

PADDING_GREY = 114
BATCH_STRIDE = 32
UNCUT = 0.999
"""An object of which at least this part is left was not cut: what is missing is a rounding error."""

Resize = Literal["stretch", "letterbox", "short_side", "crop"]


class Fitted(NamedTuple):
    """One image in the network's pixels, before batching.

    Args:
        image: (3, H, W) float32 in 0..1.
        size: (height, width) of the image inside `image`, without padding.
        target: in pixels of `image`.
        meta: with the matrix from the source to `image`.
        proposals: (P, 4) float32 xyxy pixels of `image`, or None.
    """

    image: Tensor
    size: tuple[int, int]
    target: Target
    meta: Meta
    proposals: Tensor | None = None


class Fit:
    """Resize images to the network's input.

    Bilinear without smoothing, pixel centres at half integers: what torchvision's detectors are trained and
    run with.

    Args:
        size: (height, width) of the input in pixels; of short_side (short, long), the longest that an image's
            shorter and longer side may become; of crop the part of an image that the network sees at once.
        resize: "stretch" to `size`; "letterbox" keeps the aspect ratio, image at the top left of `size`, grey
            padding at the right or bottom; "short_side" keeps it too and does not pad the image itself: those of a
            batch are padded to the largest of them (Faster R-CNN, torchvision's GeneralizedRCNNTransform); "crop"
            leaves images as they are, padded to `size` where they are smaller and then to the largest of the batch:
            training cuts them at random (Augment), evaluation goes over them in windows (detkit.inference.windows).
        padding: RGB in 0..1 around the images of a batch, and around small ones under crop; the backbone's mean
            colour, so that it is 0 to the network.
        trim: under letterbox, pad only to multiples of 32 and to the largest image of the batch, where that is less
            than `size`. What is left out holds no image, and costs as much time as if it did.
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
        """The same for an input of another size."""
        return Fit(size, self.resize, self.padding, self.trim)

    def untrimmed(self) -> "Fit":
        """The same with all of its padding, as training has it: of one size for all batches."""
        return Fit(self.size, self.resize, self.padding)

    @property
    def one_size(self) -> bool:
        """Whether all batches have the size `size`."""
        return self.resize in ("stretch", "letterbox") and not self.trim

    def inner_size(self, source: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of size `source` gets inside the input."""
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
        """(height, width) of the tensor that `image` makes of an image of size `source`."""
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
            # Rounded as torchvision rounds them, which makes boxes equal to the last bit.
            x_scale, y_scale = float(np.float32(x_scale)), float(np.float32(y_scale))
        return np.diag([x_scale, y_scale, 1.0])

    def image(self, image: np.ndarray) -> Tensor:
        """(3, H, W) float32 in 0..1, of size `outer_size`, from (H, W, 3) uint8."""
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
        """(B, 3, H, W) of tensors that `image` made.

        Those of several sizes are padded at the right and bottom to the largest height and width among them, under
        short_side rounded up to a multiple of 32.
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
        """The image as a tensor, its size inside it, and target, meta and proposals in its pixels."""
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
        """(count, 3, height, width) of nothing but padding."""
        colour = (PADDING_GREY / 255,) * 3 if self.resize == "letterbox" else self.padding
        blank = torch.tensor(colour).view(1, 3, 1, 1).expand(count, 3, *size)
        return blank.clone(memory_format=torch.contiguous_format)


def _round_up(number: int, step: int) -> int:
    """The least multiple of `step` that is not less than `number`."""
    return -(-number // step) * step


def undo(detections: Detections, meta: Meta) -> Detections:
    """Detections in the network's pixels as detections in the source's own pixels, inside its borders.

    One that lies in the padding becomes a box of no area on the border, as in torchvision. Mask patches become masks of
    the source's size.

    Raises:
        ValueError: the image went through an augmentation that has no inverse.
    """
    if meta.matrix is None:
        raise ValueError(f"{meta.source} was augmented at random; its detections cannot be taken back")
    boxes = map_boxes(detections.boxes, np.linalg.inv(meta.matrix))
    masks = None
    if detections.mask_patches is not None:
        # Over the boxes as predicted: a patch does not shrink with the part of its box that lies in the image.
        masks = paste_masks(detections.mask_patches, boxes, meta.size)
    points = None if detections.points is None else map_points(detections.points, np.linalg.inv(meta.matrix))
    return replace(detections, boxes=clip(boxes, meta.size), masks=masks, mask_patches=None, points=points)


def map_boxes(boxes: Tensor, matrix: np.ndarray) -> Tensor:
    """(N, 4) xyxy boxes under an axis-parallel affine matrix (3, 3)."""
    scale = torch.tensor([matrix[0, 0], matrix[1, 1]] * 2, dtype=torch.float64)
    shift = torch.tensor([matrix[0, 2], matrix[1, 2]] * 2, dtype=torch.float64)
    return (boxes.cpu().double() * scale + shift).float().to(boxes.device)


def map_points(points: Tensor, matrix: np.ndarray) -> Tensor:
    """(..., 2) xy points under an axis-parallel affine matrix (3, 3)."""
    scale = torch.tensor([matrix[0, 0], matrix[1, 1]], dtype=torch.float64)
    shift = torch.tensor([matrix[0, 2], matrix[1, 2]], dtype=torch.float64)
    return (points.cpu().double() * scale + shift).float().to(points.device)


def _map_target(target: Target, matrix: np.ndarray, inner: tuple[int, int], size: tuple[int, int]) -> Target:
    masks = target.masks
    if masks is not None and tuple(masks.shape[1:]) != size:
        resized = masks.new_zeros(len(masks), *size)
        if len(masks):
            # As bytes in a quarter of the time that floats take.
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
    """An augmentation that makes one image of several, registered among the others.

    Attributes:
        partners: how many further images it takes.
        probability: of mixing; otherwise the image stays as it is.
    """

    partners: ClassVar[int]
    probability: float

    @abstractmethod
    def __call__(
        self, samples: Sequence[Sample], size: tuple[int, int], min_visibility: float, random: np.random.Generator
    ) -> Sample:
        """The mixed image; the given ones stay as they are.

        Args:
            samples: 1 + `partners` images of any size.
            size: (height, width) of the input.
            min_visibility: an object or proposal of which a smaller part is left is dropped.
            random: the only source of chance.
        """

    def largest_zoom(self, size: tuple[int, int]) -> float:
        """How many times larger the mix may show a part of an image of (height, width) than the input shows an image
        as a whole; infinite where that is not known."""
        return math.inf


class Augment:
    """Random augmentation of a training image: mixes with others, then one albumentations pipeline that ends at the
    input's size.

    Mixes (mosaic, mixup) come first, in their order, on images as the data set has them. Of the others geometric
    transforms run first, then the resize to the input (but for short_side, whose size depends on the image), then
    those that only change pixels: they cost least there. Proposals go where their pixels go, and have no influence on
    anything else.

    Args:
        options: `[{name: flip, ...}, ...]`, parts of the registry of augmentations.
        fit: the network's input.
        min_visibility: an object or proposal of which a smaller part is left after a cut is dropped, as is one of which
            the part that is left is less than a pixel wide or high. What becomes so small without a cut stays.
        points: the rule for images with points (detkit.data.points); None for those without.
        tried: the parts are known to work; otherwise those of albumentations are tried on a made-up image.

    Raises:
        ConfigError: a part or option is unknown, a part cannot be used, or the parts cannot carry points.
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
        # All that come before the resize, which short_side leaves to the end.
        self._of_source = [*self.mixes, *(parts if fit.resize == "short_side" else geometric)]
        if points is not None:
            check_parts(self.mixes, parts, points)
            geometric = watched(geometric)
        # Objects may touch the border to within a rounding error: clip, instead of refusing the image.
        boxes = A.BboxParams("pascal_voc", min_visibility=min_visibility, clip=True)
        # A target of their own: some transforms look at the ground truths ("bboxes") to choose a window.
        self.pipeline = A.Compose(
            [*geometric, *_resize_parts(fit), *pixel_only],
            bbox_params=boxes,
            keypoint_params=None if points is None else A.KeypointParams("xy", remove_invisible=False),
            additional_targets={"proposals": "bboxes"},
        )
        # Compose has no argument for a processor of one's own, and has given this one to all transforms already.
        self.pipeline.processors["bboxes"].__class__ = VisibleBoxes

    def at(self, size: tuple[int, int]) -> "Augment":
        """The same for an input of another size."""
        return Augment(self.options, self.fit.at(size), self.min_visibility, self.points, tried=True)

    def __call__(self, sample: Sample, seed: int, others: Dataset | Sequence[Sample] | None = None) -> Sample:
        """The augmented sample, at the input's size unless that is short_side.

        The same seed gives the same image, if `others` are the same.

        Args:
            others: what mixes draw their further images from; None to leave the mixes out.

        Raises:
            DataError: a further image cannot be read, or an augmentation fails on the image.
            ConfigError: images with semantic maps are to be mixed.
        """
        if others is not None:
            sample = self._mixed(sample, seed, others)
        # One pair of generators for all transforms: seeding each with the same number would make their
        # choices depend on one another.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        target = sample.target
        given: dict[str, Any] = {"image": sample.image, "bboxes": _numbered(target.boxes)}
        if sample.proposals is not None:
            given["proposals"] = _numbered(sample.proposals)
        if target.masks is not None and len(target):
            given["masks"] = target.masks.numpy().astype(np.uint8)
        if target.semantic is not None:
            # One more than the class: 0 then is what does not count, and 0 is what transforms fill a mask with.
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
        # Albumentations drops boxes but not their masks; the fifth column says which are left.
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
        """How many times larger it may show a part of an image of (height, width) `size` than the input shows a
        image as a whole; infinite where a part does not say that by a method of this name."""
        return math.prod(_largest_zoom(part, size) for part in self._of_source)

    def _mixed(self, sample: Sample, seed: int, others: Dataset | Sequence[Sample]) -> Sample:
        if self.mixes and sample.target.semantic is not None:
            raise ConfigError(
                "'augment' mixes images (mosaic, mixup), which cannot be done with semantic maps. Leave these parts "
                "out; random_scale, flip and photometric can be had."
            )
        for number, mix in enumerate(self.mixes, start=1):
            # A generator of its own: a pipeline behind mixes makes the choices that it would make without them.
            generator = np.random.default_rng([seed, number])
            if generator.uniform() < mix.probability:
                drawn = generator.integers(len(others), size=mix.partners).tolist()
                samples = [sample, *(others[index] for index in drawn)]
                sample = mix(samples, self.fit.size, self.min_visibility, generator)
        return sample


def _resize_parts(fit: Fit) -> list[Any]:
    """The albumentations transforms that bring an image to the input's size."""
    import albumentations as A
    import cv2

    height, width = fit.size
    # Albumentations' own choice, INTER_NEAREST, moves masks by up to half a pixel against the image.
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
            # Albumentations warns of a pipeline that leaves boxes where they are.
            return [A.NoOp()]
        case "crop":
            fill = tuple(round(255 * value) for value in fit.padding)
            return [
                A.PadIfNeeded(height, width, position="top_left", fill=fill),
                A.RandomCrop(height, width),
            ]


def _numbered(boxes: Tensor) -> np.ndarray:
    """(N, 4) boxes as (N, 6), behind each its number and whether it was cut."""
    return np.column_stack([boxes.numpy(), np.arange(len(boxes), dtype=np.float32), np.zeros(len(boxes), np.float32)])


def _largest_zoom(part: Any, size: tuple[int, int]) -> float:
    from albumentations import BaseCompose

    if isinstance(part, BaseCompose):
        return math.prod(_largest_zoom(inner, size) for inner in part.transforms)
    return float(part.largest_zoom(size)) if hasattr(part, "largest_zoom") else math.inf


def _changes_only_pixels(part: Any) -> bool:
    """Whether boxes stay where they are under `part`, an albumentations transform or composition."""
    from albumentations import BaseCompose, ImageOnlyTransform

    if isinstance(part, BaseCompose):
        return all(_changes_only_pixels(inner) for inner in part.transforms)
    return isinstance(part, ImageOnlyTransform)
