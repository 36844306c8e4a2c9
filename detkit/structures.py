"""The data types that flow through detkit, validated on construction.

file -> Sample -> Batch -> raw outputs of a head -> Detections.

Boxes are xyxy float32 in absolute pixels of the image they travel with, with exclusive right and bottom
edges; sizes are (height, width); labels are 0..C-1, and no index ever means background.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import numpy as np
import torch
from torch import Tensor

from detkit.errors import printable

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class ClassList:
    """The classes of a data set: their names by label, and their raw ids in the files.

    Args:
        names: C names; the index in this tuple is the label.
        raw_ids: the id of each class in the data set's files (COCO's category_id), in the same order.
    """

    names: tuple[str, ...]
    raw_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.raw_ids):
            raise ValueError(f"{len(self.names)} class names but {len(self.raw_ids)} raw ids")
        for name in self.names:
            if name != printable(name) or not name.strip() or "\n" in name:
                raise ValueError(
                    f"the class name {name!r} is empty, or contains control characters or bytes that are not UTF-8"
                )
        for what, values in (("name", self.names), ("raw id", self.raw_ids)):
            if len(set(values)) != len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"the class {what} {twice!r} is listed twice")

    @classmethod
    def from_names(cls, names: Sequence[str], first_raw_id: int = 0) -> ClassList:
        """Create classes whose raw ids count up from `first_raw_id`."""
        return cls(tuple(names), tuple(range(first_raw_id, first_raw_id + len(names))))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return ", ".join(f"{i}: {name} (raw id {raw})" for i, (name, raw) in enumerate(zip(self.names, self.raw_ids)))


IGNORED_PIXEL = 255
"""The value in Target.semantic that is excluded from the loss and the metrics, as in VOC and Cityscapes."""
OBJECT_FIELDS = ("boxes", "labels", "crowd", "difficult", "area", "masks", "points", "visible")
IMAGE_FIELDS = ("image_labels", "semantic")


@dataclass(frozen=True, eq=False)
class Target:
    """The ground truth of one image.

    Args:
        boxes: (N, 4) float32 xyxy pixels.
        labels: (N,) int64 in 0..C-1.
        crowd: (N,) bool, COCO's iscrowd: a region of many objects. Default all False.
        difficult: (N,) bool, VOC's difficult. Default all False.
        area: (N,) float32 area of the objects in square pixels, used for COCO's size ranges; default the area of the
            boxes.
        masks: (N, H, W) bool, or None if the data has no masks.
        points: (N, K, 2) float32 xy pixels, the landmarks of each object, or None if the data has no landmarks.
        visible: (N, K) bool: which points are annotated; the coordinates of the others are undefined. None without
            points.
        image_labels: (M,) int64 in 0..C-1, the classes of the whole image, or None if the data has no image labels.
        semantic: (H, W) uint8, the class of each pixel or IGNORED_PIXEL; None if the data has no semantic maps.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor = None  # type: ignore[assignment]
    difficult: Tensor = None  # type: ignore[assignment]
    area: Tensor = None  # type: ignore[assignment]
    masks: Tensor | None = None
    points: Tensor | None = None
    visible: Tensor | None = None
    image_labels: Tensor | None = None
    semantic: Tensor | None = None

    def __post_init__(self) -> None:
        count = _check_boxes(self.boxes)
        for name in ("crowd", "difficult"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.zeros(count, dtype=torch.bool, device=self.boxes.device))
        if self.area is None:
            widths_heights = self.boxes[:, 2:] - self.boxes[:, :2]
            object.__setattr__(self, "area", widths_heights.prod(1))
        _check(self.labels, "labels", (count,), torch.int64)
        _check(self.crowd, "crowd", (count,), torch.bool)
        _check(self.difficult, "difficult", (count,), torch.bool)
        _check(self.area, "area", (count,), torch.float32)
        if self.masks is not None:
            _check(self.masks, "masks", (count, *self.masks.shape[1:]), torch.bool)
        if (self.points is None) != (self.visible is None):
            raise ValueError("points and visible must be given together, but only one of them is given")
        if self.points is not None and self.visible is not None:
            _check(self.points, "points", (count, *self.points.shape[1:2], 2), torch.float32)
            _check(self.visible, "visible", tuple(self.points.shape[:2]), torch.bool)
        if self.image_labels is not None:
            _check(self.image_labels, "image_labels", (self.image_labels.numel(),), torch.int64)
        if self.semantic is not None and (self.semantic.ndim != 2 or self.semantic.dtype != torch.uint8):
            raise ValueError(
                f"semantic must be (H, W) uint8, but got {tuple(self.semantic.shape)} {self.semantic.dtype}"
            )

    @classmethod
    def empty(cls) -> Target:
        """Create a target without objects."""
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))

    @property
    def ignored(self) -> Tensor:
        """(N,) bool: crowd and difficult boxes, which are neither positive nor negative in training."""
        return self.crowd | self.difficult

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Target:
        """Select objects by `index` (1-D bool mask or indices); the fields of the whole image are kept."""
        chosen = {name: tensor[index] for name, tensor in self._tensors(OBJECT_FIELDS)}
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> Target:
        """Move the tensors to `device`."""
        move = partial(_moved, device=torch.device(device))
        return replace(self, **{name: move(tensor) for name, tensor in self._tensors(OBJECT_FIELDS + IMAGE_FIELDS)})

    def copy(self) -> Target:
        """Copy the tensors."""
        return replace(self, **{name: tensor.clone() for name, tensor in self._tensors(OBJECT_FIELDS + IMAGE_FIELDS)})

    def _tensors(self, names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name in names if (tensor := getattr(self, name)) is not None]


@dataclass(frozen=True, eq=False)
class Meta:
    """The origin of an image, and the transform from source pixels to its pixels.

    Args:
        image_id: the data set's id of the image.
        source: the file, or another name of the image for messages.
        size: (height, width) of the source in pixels, after the Exif rotation.
        matrix: (3, 3) float64, maps homogeneous (x, y, 1) source pixels to pixels of the current image (scale, pad,
            crop and flip combined); None after an augmentation without an inverse.
    """

    image_id: int | str
    source: str
    size: tuple[int, int]
    matrix: np.ndarray | None = field(default_factory=lambda: np.eye(3))


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with its ground truth, before batching.

    Args:
        image: (H, W, 3) uint8 RGB.
        proposals: (P, 4) float32 xyxy pixels of the image, candidate object regions, best first; None without a source
            of proposals.
    """

    image: np.ndarray
    target: Target
    meta: Meta
    proposals: Tensor | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f"an image must be (H, W, 3) uint8, but {self.meta.source} is {self.image.shape} {self.image.dtype}"
            )
        if 0 in self.image.shape:
            raise ValueError(f"the image {self.meta.source} is empty: its shape is {self.image.shape}")
        if self.target.masks is not None and tuple(self.target.masks.shape[1:]) != self.image.shape[:2]:
            raise ValueError(
                f"the masks of {self.meta.source} are {tuple(self.target.masks.shape[1:])}, "
                f"its image {self.image.shape[:2]}"
            )
        if self.target.semantic is not None and tuple(self.target.semantic.shape) != self.image.shape[:2]:
            raise ValueError(
                f"the semantic map of {self.meta.source} is {tuple(self.target.semantic.shape)}, "
                f"its image {self.image.shape[:2]}"
            )
        if self.proposals is not None:
            _check_boxes(self.proposals, "proposals")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of equally sized images with their targets.

    Args:
        images: (B, 3, H, W) float32 RGB in 0..1, not normalised.
        sizes: (height, width) of each image in the tensor, without padding.
        targets: one per image, in pixels of `images`; masks need not cover the padding.
        metas: one per image.
        proposals: (P, 4) float32 xyxy pixels of `images`, best first, one tensor per image; None without proposals.
        features: precomputed feature maps of the backbone [(B, C_i, h_i, w_i)], or None. If given, only the shape of
            `images` is valid.
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    targets: tuple[Target, ...]
    metas: tuple[Meta, ...]
    proposals: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        count = self.images.shape[0]
        if self.images.ndim != 4 or not count == len(self.sizes) == len(self.targets) == len(self.metas):
            raise ValueError(
                f"a batch needs (B, 3, H, W) images and B sizes, targets and metas, but got images "
                f"{tuple(self.images.shape)}, {len(self.sizes)}, {len(self.targets)} and {len(self.metas)}"
            )
        _check_proposals(self.proposals, count)

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str) -> Batch:
        """Move all tensors to `device`."""
        targets = tuple(target.to(device) for target in self.targets)
        move = partial(_moved, device=torch.device(device))
        proposals = None if self.proposals is None else tuple(map(move, self.proposals))
        features = None if self.features is None else tuple(map(move, self.features))
        return replace(self, images=move(self.images), targets=targets, proposals=proposals, features=features)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A head's information about the images, besides their features.

    Args:
        size: (height, width) of the batched tensor in pixels.
        sizes: (height, width) of each image inside it, without padding.
        proposals: (P, 4) float32 xyxy pixels of the batched tensor, best first, for each image; None for a head that
            does not need them.
        targets: of each image, in training only, for heads whose forward pass depends on them (denoising queries).
            None in evaluation and prediction.
    """

    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    proposals: tuple[Tensor, ...] | None = None
    targets: tuple[Target, ...] | None = None

    def __post_init__(self) -> None:
        _check_proposals(self.proposals, len(self.sizes))


@dataclass(frozen=True, eq=False)
class Match:
    """The assignment of ground-truth boxes to anchors; no index value has a special meaning.

    Args:
        target_index: (A,) int64 index of the assigned ground-truth box; valid only where `positive`.
        positive: (A,) bool.
        ignored: (A,) bool: neither positive nor negative, excluded from the loss.
    """

    target_index: Tensor
    positive: Tensor
    ignored: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.target_index.shape)
        _check(self.target_index, "target_index", shape, torch.int64)
        _check(self.positive, "positive", shape, torch.bool)
        _check(self.ignored, "ignored", shape, torch.bool)

    @property
    def negative(self) -> Tensor:
        """(A,) bool: anchors assigned to the background."""
        return ~(self.positive | self.ignored)


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one image, by descending score.

    Args:
        boxes: (N, 4) float32 xyxy pixels.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64 in 0..C-1.
        masks: (N, H, W) bool, or None for a detector without masks.
        mask_patches: (N, m, m) float32 in 0..1, the probability of the object in a grid over its box, as the network
            predicts it; `detkit.data.transforms.undo` pastes it into `masks`. Otherwise None.
        points: (N, K, 2) float32 xy pixels, the landmarks of each object, or None for a detector without landmarks.
        class_names: names by label; empty until the predictor sets them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    mask_patches: Tensor | None = None
    points: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = _check_boxes(self.boxes)
        _check(self.scores, "scores", (count,), torch.float32)
        _check(self.labels, "labels", (count,), torch.int64)
        if self.masks is not None:
            _check(self.masks, "masks", (count, *self.masks.shape[1:]), torch.bool)
        if self.mask_patches is not None:
            side = self.mask_patches.shape[-1]
            _check(self.mask_patches, "mask_patches", (count, side, side), torch.float32)
        if self.points is not None:
            _check(self.points, "points", (count, *self.points.shape[1:2], 2), torch.float32)

    @classmethod
    def empty(cls) -> Detections:
        """Create an empty result."""
        return cls(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[list[float], float, str | int]]:
        """Iterate over (box, score, class name); without class names the label is given instead."""
        for box, score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()):
            yield box, score, self.class_names[label] if self.class_names else label

    @overload
    def __getitem__(self, index: int) -> tuple[list[float], float, str | int]: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor) -> Detections: ...

    def __getitem__(self, index: Any) -> Any:
        """One detection as iteration yields it, by an integer; several as Detections, by a slice, a bool mask of N
        values, or integers.

        Raises:
            IndexError: there is no such detection, or the mask has another length.
            TypeError: `index` is none of these.
        """
        if isinstance(index, Integral) or (isinstance(index, Tensor | np.ndarray) and index.ndim == 0):
            position = operator.index(index)
            if not -len(self) <= position < len(self):
                raise IndexError(f"there are {len(self)} detections, and so none at {position}")
            start = position % len(self)
            return next(iter(self._each(lambda tensor: tensor[start : start + 1])))
        if not isinstance(index, slice):
            index = self._indices(index)
        return self._each(lambda tensor: tensor[index])

    def _indices(self, index: Any) -> Tensor:
        """A mask or integers as a tensor beside the boxes."""
        try:
            chosen = torch.as_tensor(index, device=self.boxes.device)
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.empty(0)
        if chosen.numel() == 0 and isinstance(index, list | tuple):
            chosen = chosen.to(torch.int64)
        if chosen.ndim != 1 or chosen.is_floating_point():
            raise TypeError(f"detections are chosen by an integer, a slice, a mask or integers, not by {index!r}")
        if chosen.dtype == torch.bool and len(chosen) != len(self):
            raise IndexError(f"the mask has {len(chosen)} values for {len(self)} detections")
        return chosen

    def best(self, count: int) -> Detections:
        """Keep the first `count` detections, or all if there are fewer."""
        return self._each(lambda tensor: tensor[:count])

    def to(self, device: torch.device | str) -> Detections:
        """Move the tensors to `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Detections:
        return replace(
            self,
            boxes=change(self.boxes),
            scores=change(self.scores),
            labels=change(self.labels),
            masks=None if self.masks is None else change(self.masks),
            mask_patches=None if self.mask_patches is None else change(self.mask_patches),
            points=None if self.points is None else change(self.points),
        )

    def to_supervision(self) -> supervision.Detections:
        """Convert to supervision.Detections, for its annotators, trackers and zones."""
        import supervision

        data: dict[str, Any] = {}
        if self.class_names:
            data["class_name"] = np.array([self.class_names[label] for label in self.labels.tolist()], dtype=str)
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            mask=None if self.masks is None else self.masks.cpu().numpy(),
            data=data,
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to `device`: asynchronously to a GPU (from pinned memory), synchronously to the CPU."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def _check_boxes(boxes: Tensor, name: str = "boxes") -> int:
    """Return the number of boxes, or raise ValueError if they are not (N, 4) float32."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
        raise ValueError(f"{name} must be (N, 4) float32, but got {tuple(boxes.shape)} {boxes.dtype}")
    return boxes.shape[0]


def _check_proposals(proposals: tuple[Tensor, ...] | None, images: int) -> None:
    """Raise ValueError if proposals are given, but not one (P, 4) float32 tensor per image."""
    if proposals is None:
        return
    if len(proposals) != images:
        raise ValueError(f"expected one tensor of proposals for each of {images} images, but got {len(proposals)}")
    for boxes in proposals:
        _check_boxes(boxes, "proposals")


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {shape} {dtype}, but got {tuple(tensor.shape)} {tensor.dtype}")


class Prediction(Protocol):
    """The interface that every prediction, such as Detections, implements."""

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to `device`."""
        ...


@dataclass(frozen=True, eq=False)
class Classification:
    """The classes of a whole image.

    Args:
        scores: (C,) float32 in 0..1; they sum to 1 if an image has exactly one class.
        class_names: names by label; empty until the predictor sets them.
    """

    scores: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tensor(self.scores, "scores", 1, torch.float32)

    def to(self, device: torch.device | str) -> Classification:
        """Move the tensor to `device`."""
        return replace(self, scores=self.scores.to(device))


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """The class of every pixel.

    Args:
        labels: (H, W) uint8 in 0..C-1.
        logits: (C, H, W) float32, the network's logits, whose argmax the labels are; the task's `undo` resizes them to
            the source and takes `labels` from them. Otherwise None.
        class_names: names by label; empty until the predictor sets them.
    """

    labels: Tensor
    logits: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tensor(self.labels, "labels", 2, torch.uint8)
        if self.logits is not None:
            check_tensor(self.logits, "logits", 3, torch.float32)

    def to(self, device: torch.device | str) -> SemanticMap:
        """Move the tensors to `device`."""
        logits = None if self.logits is None else self.logits.to(device)
        return replace(self, labels=self.labels.to(device), logits=logits)


def check_tensor(tensor: Tensor, name: str, dimensions: int, dtype: torch.dtype) -> None:
    """Raise ValueError if a tensor has a different dtype or number of dimensions."""
    if tensor.ndim != dimensions or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of {dimensions} dimensions, but got {tuple(tensor.shape)} {tensor.dtype}"
        )
