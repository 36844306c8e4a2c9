"""Proposals that another program wrote to a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.convert import clip
from detkit.data.dataset import Dataset
from detkit.data.parsing.json_values import identifier, reason_of, short, whole
from detkit.data.proposals.sources import ProposalSource
from detkit.errors import ConfigError, DataError, counted
from detkit.io.files import read_json
from detkit.registry import proposal_sources

ImageId = int | str


@proposal_sources.register("file")
class FileProposals(ProposalSource):
    """Proposals from a file per split: COCO results, `[{"image_id": 1, "bbox": [x, y, width, height], "score": 0.9},
    ...]`, or with a list of images, `{"images": [{"id": 1, "height": 480, "width": 640}, ...], "proposals": [as
    above]}`.

    Only in the second form may images have no proposals. Boxes are clipped to their image; those outside are left out
    and counted in the report.

    Args:
        path: the file; {split} in it is replaced by the name of the split.
        split: that name.
        count: maximum number per image, the best; by default all.

    Raises:
        ConfigError: `count` is less than 1.
        DataError: the file is missing or malformed.
    """

    from_pixels: ClassVar[bool] = False

    def __init__(self, path: str, split: str, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise ConfigError(f"'proposals.count' must be at least 1, or null for all, but is {count}.")
        self.path = Path(path.replace("{split}", split)).expanduser()
        self.key = str(self.path)
        self._count = count
        content = _load(self.path)
        self._sizes: dict[ImageId, tuple[int, int]] | None = None
        if isinstance(content, dict):
            self._sizes = self._read_images(content["images"])
            content = content["proposals"]
        self._boxes = self._read_boxes(content)
        if self._sizes is not None:
            self._add_empty(self._sizes)

    def __call__(self, image: np.ndarray, image_id: ImageId) -> Tensor:
        if image_id not in self._boxes:
            raise DataError(f"The file of proposals '{self.path}' has no proposals for the image {image_id!r}.")
        return self._inside(image_id, (image.shape[0], image.shape[1]))

    def check(self, dataset: Dataset) -> str:
        """Compare the images of the file with those of the data set; see ProposalSource.check."""
        sizes = {dataset.image_id(index): dataset.size(index) for index in range(len(dataset))}
        example = f"The data set has ids such as {next(iter(sizes))!r}."
        unknown = [image_id for image_id in self._boxes if image_id not in sizes]
        self._refuse(unknown, "of the file {are} not in the data set", example)
        missing = [image_id for image_id in sizes if image_id not in self._boxes]
        self._refuse(
            missing,
            "of the data set {are} not in the file",
            "If some have no proposals, use the form with the list 'images'.",
        )
        if self._sizes is not None:
            wrong = [image_id for image_id, size in self._sizes.items() if size != sizes[image_id]]
            if wrong:
                first = (
                    f"The first is {self._sizes[wrong[0]]} in the file, {sizes[wrong[0]]} in the data set, as height "
                    "and width after Exif rotation."
                )
                self._refuse(wrong, "{have} another size in the file than in the data set", first)
        return self._summary(sizes)

    def _refuse(self, image_ids: list[ImageId], what: str, advice: str) -> None:
        if image_ids:
            one = len(image_ids) == 1
            what = what.format(are="is" if one else "are", have="has" if one else "have")
            raise DataError(
                f"The file of proposals '{self.path}' does not fit the data set: {len(image_ids)} "
                f"image{'' if one else 's'} {what} (the first: {image_ids[0]!r}). {advice} Set proposals.path "
                "to the file for this split."
            )

    def _summary(self, sizes: dict[ImageId, tuple[int, int]]) -> str:
        used = without = outside = cut = 0
        for image_id, size in sizes.items():
            boxes = torch.from_numpy(self._boxes[image_id])
            inside = self._inside(image_id, size)
            clipped = clip(boxes, size)
            left = _has_area(clipped)
            outside += int((~left).sum())
            cut += int((clipped != boxes)[left].any(1).sum())
            used += len(inside)
            without += not len(inside)
        return (
            f"{used:,} proposals from {self.path}, mean {used / len(sizes):,.0f} per image, "
            f"{counted(without, 'image')} without; {cut:,} clipped to their image, {outside:,} outside it left out"
        )

    def _inside(self, image_id: ImageId, size: tuple[int, int]) -> Tensor:
        """Return the best proposals of an image, clipped to it."""
        boxes = clip(torch.from_numpy(self._boxes[image_id]), size)
        return boxes[_has_area(boxes)][: self._count]

    def _add_empty(self, listed: Collection[ImageId]) -> None:
        """Add empty lists for listed images without proposals."""
        unlisted = [image_id for image_id in self._boxes if image_id not in listed]
        if unlisted:
            raise DataError(
                f"The file of proposals '{self.path}' has proposals for {len(unlisted)} images that are not in its "
                f"list 'images' (the first: {unlisted[0]!r}). Add them to the list."
            )
        for image_id in listed:
            self._boxes.setdefault(image_id, np.zeros((0, 4), dtype=np.float32))

    def _read_images(self, images: list[Any]) -> dict[ImageId, tuple[int, int]]:
        sizes: dict[ImageId, tuple[int, int]] = {}
        for position, image in enumerate(images):
            try:
                image_id = identifier(image["id"], "'id'")
                size = (whole(image["height"], "'height'"), whole(image["width"], "'width'"))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{self.path}: images[{position}] is malformed ({reason_of(error, image)}). It needs an 'id', a "
                    "'height' and a 'width'."
                ) from None
            if image_id in sizes:
                raise DataError(f"{self.path}: images[{position}] has the same id {short(image_id)} as an earlier one.")
            sizes[image_id] = size
        return sizes

    def _read_boxes(self, entries: list[Any]) -> dict[ImageId, np.ndarray]:
        """Read the (P, 4) float32 xyxy of each image, by descending score, ties in the order of the file."""
        image_ids: list[ImageId] = []
        numbers = np.empty((len(entries), 5))
        for position, entry in enumerate(entries):
            try:
                image_ids.append(identifier(entry["image_id"], "'image_id'"))
                row = (*entry["bbox"], entry["score"])
                if len(row) != 5 or not {*map(type, row)} <= {int, float}:
                    raise ValueError(f"'bbox' and 'score' are {short(entry['bbox'])} and {short(entry['score'])}")
                numbers[position] = row
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{self.path}: the proposal number {position} is malformed ({reason_of(error, entry)}). It needs "
                    "an 'image_id', a 'bbox' of [x, y, width, height] and a 'score'."
                ) from None
        # Finite float64 may overflow to infinite float32.
        with np.errstate(over="ignore"):
            boxes = np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:4]], axis=1).astype(np.float32)
        self._check_numbers(numbers, boxes, image_ids)
        return dict(_by_image(image_ids, boxes, numbers[:, 4]))

    def _check_numbers(self, numbers: np.ndarray, boxes: np.ndarray, image_ids: list[ImageId]) -> None:
        finite = np.isfinite(numbers).all(1) & np.isfinite(boxes).all(1)
        empty = finite & (numbers[:, 2:4] <= 0).any(1)
        counts = Counter({"with a number that is not finite": (~finite).sum(), "with no width or height": empty.sum()})
        problems = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        if problems:
            first = int(np.flatnonzero(~finite | empty)[0])
            *box, score = numbers[first].tolist()
            raise DataError(
                f"The file of proposals '{self.path}' has boxes that cannot be used: {problems}. The first is number "
                f"{first}, of the image {image_ids[first]!r}: bbox {box}, score {score}. Boxes are "
                "[x, y, width, height] with width and height above 0; fix the program that wrote them."
            )


def _load(path: Path) -> list[Any] | dict[str, list[Any]]:
    """Load a file and check its outer structure."""
    if not path.is_file():
        raise DataError(
            f"There is no file of proposals '{path}'. Set proposals.path; '{{split}}' in it is the split's name."
        )
    content = read_json(path, "file of proposals", allow_nan=True)
    lists = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "proposals"))
    if not isinstance(content, list) and not lists:
        raise DataError(
            f"The file '{path}' contains no proposals. It must be a list of COCO results, or have the lists 'images' "
            "and 'proposals'."
        )
    return content


def _by_image(image_ids: list[ImageId], boxes: np.ndarray, scores: np.ndarray) -> Iterator[tuple[ImageId, np.ndarray]]:
    """Group the boxes by image, by descending score."""
    numbers: dict[ImageId, int] = {}
    images = np.array([numbers.setdefault(image_id, len(numbers)) for image_id in image_ids], dtype=np.int64)
    order = np.lexsort((-scores, images))  # a stable sort, by image and then by score
    ends = np.searchsorted(images[order], np.arange(1, len(numbers) + 1))
    for image_id, chosen in zip(numbers, np.split(order, ends[:-1]) if numbers else ()):
        yield image_id, boxes[chosen]


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)
