"""Classification of objects cropped from a detection data set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from detkit.data.dataset import Dataset
from detkit.errors import ConfigError, DataError
from detkit.registry import datasets, option_names
from detkit.structures import Meta, Sample, Target


class _Crop(NamedTuple):
    """Object `number` of image `image`, and the window to crop, xyxy whole pixels."""

    image: int
    number: int
    label: int
    window: tuple[int, int, int, int]


@datasets.register("crops")
class Crops(Dataset):
    """One image for each object of another data set, cropped on access, with the object's class.

    Crowds and difficult objects are left out and counted in the report. meta.image_id is the id of the image, "#", and
    the index of the object in it, from 0.

    Args:
        split: the split of that data set.
        data: `name` of its format, and its options.
        points: also provide the points of the object, if that data set has points.
        margin: margin of the crop on each side, as a fraction of the side of the object's box, limited by the image.

    Raises:
        DataError: that data set is broken or has no boxes, or no object is left.
        ConfigError: an option is unknown, or `margin` is negative.
    """

    def __init__(self, split: str, data: dict[str, Any], margin: float = 0.1, points: bool = False) -> None:
        if not 0 <= margin < math.inf:
            raise ConfigError(f"'data.margin' must be at least 0, but is {margin}.")
        has_points = points and "name" in data and "points" in option_names(datasets.get(str(data["name"])))
        asked: dict[str, Any] = {"points": True} if has_points else {}
        self.dataset: Dataset = datasets.build(data, "data.data", split=split, **asked)
        if "boxes" not in self.dataset.fields:
            raise DataError(
                f"'data.data' is of the format '{data['name']}', which has no boxes to crop. Use it as 'data'."
            )
        self.classes, self.flip_pairs = self.dataset.classes, self.dataset.flip_pairs
        # With the object's box, since heads that read points expect one object per image.
        self.fields = frozenset({"image_labels"})
        if asked:
            self.fields |= {"boxes", "labels", "points"} & self.dataset.fields
        inner = self.dataset.problems
        self.problems = replace(
            inner, source=f"The crops of {inner.source}", found=list(inner.found), remarks=inner.remarks.copy()
        )
        self._crops = [crop for image in range(len(self.dataset)) for crop in self._cut(image, margin)]
        if not self._crops:
            raise DataError(f"{self.problems.source} are empty: there are no regular objects. Check its annotations.")
        self._last: Sample | None = None
        self._last_index = -1

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> Sample:
        crop = self._crops[index]
        # Consecutive crops are mostly from the same image, which is decoded once.
        if self._last is None or self._last_index != crop.image:
            self._last, self._last_index = self.dataset[crop.image], crop.image
        left, top, right, bottom = crop.window
        whole = self._last.meta
        meta = Meta(self._id(crop, whole.image_id), self._source(crop, whole.source), self.size(index))
        return Sample(self._last.image[top:bottom, left:right].copy(), self.target(index), meta)

    def target(self, index: int) -> Target:
        crop = self._crops[index]
        label = torch.tensor([crop.label])
        if "points" not in self.fields:
            return replace(Target.empty(), image_labels=label)
        left, top, _, _ = crop.window
        inner = self.dataset.target(crop.image)[torch.tensor([crop.number])]
        assert inner.points is not None
        shift = torch.tensor([left, top], dtype=torch.float32)
        boxes, points = inner.boxes - shift.repeat(2), inner.points - shift
        size = torch.tensor(self.size(index)).flip(0)
        inside = ((points >= 0) & (points <= size)).all(-1)
        assert inner.visible is not None
        return Target(boxes, inner.labels, points=points, visible=inner.visible & inside, image_labels=label)

    def source(self, index: int) -> str:
        crop = self._crops[index]
        return self._source(crop, self.dataset.source(crop.image))

    def size(self, index: int) -> tuple[int, int]:
        left, top, right, bottom = self._crops[index].window
        return bottom - top, right - left

    def image_id(self, index: int) -> str:
        crop = self._crops[index]
        return self._id(crop, self.dataset.image_id(crop.image))

    def fingerprint(self) -> dict[str, Any]:
        return self.dataset.fingerprint() | {"images": len(self), "objects": len(self)}

    def __getstate__(self) -> Mapping[str, Any]:
        # Do not send the cached image to worker processes.
        return {**self.__dict__, "_last": None, "_last_index": -1}

    def _id(self, crop: _Crop, image_id: int | str) -> str:
        return f"{image_id}#{crop.number}"

    def _source(self, crop: _Crop, source: str) -> str:
        return f"{source} (object {crop.number})"

    def _cut(self, image: int, margin: float) -> Iterator[_Crop]:
        target, size = self.dataset.target(image), self.dataset.size(image)
        for number, (box, label, crowd, difficult) in enumerate(
            zip(target.boxes.tolist(), target.labels.tolist(), target.crowd.tolist(), target.difficult.tolist())
        ):
            if crowd or difficult:
                where = f"image {self.dataset.image_id(image)}, object {number}"
                kind = "crowd" if crowd else "difficult object"
                self.problems.add_harmless(kind, where, "it is not an example of its class", "not cropped")
            else:
                yield _Crop(image, number, label, _window(box, size, margin))


def _window(box: list[float], size: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """Return the window of whole pixels, at least one, that contains a box with its margin; xyxy."""
    height, width = size
    across, down = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    left, top = max(0, math.floor(box[0] - across)), max(0, math.floor(box[1] - down))
    left, top = min(left, width - 1), min(top, height - 1)
    right, bottom = min(width, math.ceil(box[2] + across)), min(height, math.ceil(box[3] + down))
    return left, top, max(right, left + 1), max(bottom, top + 1)
