"""The data set interface, and the base class of data sets in files with their scan and their policy for broken data.

A data set in files is scanned completely when it is opened: annotations are parsed, and the header of every image is
read. Problems are therefore known before training starts; they are fatal or counted, but never silently ignored.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from detkit.data import masks as mask_coding
from detkit.data.duplicates import identical
from detkit.data.image import check_image, exchanges_sides, read_image
from detkit.data.semantic import BACKGROUND, painted
from detkit.data.sources import search
from detkit.errors import DataError, counted, nearest
from detkit.io.files import read_text
from detkit.structures import ClassList, Meta, Sample, Target

Broken = Literal["fail", "skip", "repair"]
"""The policy for broken data: raise an error, skip it, or repair it if possible and skip the rest."""

Box = tuple[float, float, float, float]

DETECTION_FIELDS = frozenset({"boxes", "labels", "image_labels"})
"""Fields of data with boxes: an image's image_labels are the classes of its objects, including crowds and difficult
ones."""

LEFT_OUT_BOX = "left out the box"
LEFT_OUT_IMAGE = "left out the image"
FATAL = "fatal"
OUTSIDE = "box outside the image"
MOST_NAMES = 10
"""Maximum number of classes that a remark names."""


@dataclass(frozen=True)
class Problem:
    """A problem in a data set.

    Args:
        kind: category by which problems are counted, such as "empty box".
        where: file, line or id, and image.
        message: description of the problem.
        action: what was done about it; "fatal" if the policy is to fail.
        harmless: the problem is not fatal under any policy.
    """

    kind: str
    where: str
    message: str
    action: str
    harmless: bool = False


@dataclass
class Problems:
    """The problems of one split of a data set, and what was done about them.

    Args:
        source: the data set and split, for messages.
        policy: data.broken.
        found: the problems, in the order of the files.
        rounded: number of boxes that exceeded their image by a rounding error and were clipped. This is common and
            only counted.
        unlabelled: number of YOLO images without a label file, which are images without objects.
        remarks: counts of other common cases, such as "rotated box: replaced by the upright box around it".
    """

    source: str
    policy: Broken
    found: list[Problem] = field(default_factory=list)
    rounded: int = 0
    unlabelled: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, where: str, message: str, action: str) -> None:
        """Record a problem; under the policy "fail" the action becomes "fatal"."""
        self.found.append(Problem(kind, where, message, FATAL if self.policy == "fail" else action))

    def add_harmless(self, kind: str, where: str, message: str, action: str) -> None:
        """Record a problem that is not fatal under any policy."""
        self.found.append(Problem(kind, where, message, action, harmless=True))

    def raise_if_fatal(self) -> None:
        """Raise DataError if there are fatal problems.

        Raises:
            DataError: with the first problem, the count of each kind, and the remedy.
        """
        fatal = [problem for problem in self.found if problem.action == FATAL]
        if not fatal:
            return
        counts = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in fatal).most_common())
        first = fatal[0]
        raise DataError(
            f"{self.source} has {counted(len(fatal), 'problem')} ({counts}). "
            f"The first: {first.where}: {first.message}. Fix the files, or set data.broken to 'repair' (repairs what "
            f"can be repaired and skips the rest) or 'skip' (skips what is broken); `detkit check` lists all problems."
        )

    def nothing_left(self) -> DataError:
        """Create the error for a split without usable images, with the problems by kind."""
        if not self.found:
            return DataError(f"{self.source} has no images. Give a split that lists some.")
        return DataError(f"{self.source} has no image left. Fix the files: {'; '.join(self._groups())}.")

    def summary(self) -> str:
        """Format a report: "no problems", or the count of each kind and action with its first location."""
        count = len(self.found)
        head = f"{counted(count, 'problem')} (broken: {self.policy})" if count else "no problems"
        return "\n".join([head, *(f"  {line}" for line in [*self._groups(), *self.counts()])])

    def counts(self) -> list[str]:
        """Format a line for each common case that is only counted."""
        counts = {
            "box outside the image by a rounding error: clipped": self.rounded,
            "image without a label file: treated as an image without objects": self.unlabelled,
            **self.remarks,
        }
        return [f"{count} x {remark}" for remark, count in counts.items() if count]

    def reasons(self) -> str:
        """Format all problems as a sentence, starting with a space, for an error about missing data; "" if none."""
        found = [*self._groups(), *self.counts()]
        return f" Problems in its files: {'; '.join(found)}." if found else ""

    def _groups(self) -> list[str]:
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.found:
            groups.setdefault((problem.kind, problem.action), []).append(problem)
        return [
            f"{len(group)} x {kind}: {action} (first: {group[0].where}: {group[0].message})"
            for (kind, action), group in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]


class Dataset(ABC):
    """Images with their ground truth, by index.

    A format is a subclass registered in detkit.registry.datasets, in its own file in detkit.data.formats.

    Attributes:
        classes: names and raw ids by label.
        fields: the Target fields that the data provides, which are checked against the needs of the head.
        problems: the problems of the data, and what was done about them.
        flip_pairs: pairs of points that are swapped when an image is mirrored, such as left and right eye; None if
            unknown.
    """

    classes: ClassList
    fields: frozenset[str]
    problems: Problems
    flip_pairs: tuple[tuple[int, int], ...] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The image `index` at source size, with its ground truth and an identity matrix.

        Raises:
            DataError: the image cannot be read.
        """

    @abstractmethod
    def target(self, index: int) -> Target:
        """The ground truth of the image `index`, without reading its pixels."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image `index` in pixels, without reading its pixels."""

    def image_id(self, index: int) -> int | str:
        """The data set's id of the image `index`."""
        return self[index].meta.image_id

    def source(self, index: int) -> str:
        """The file of the image `index`, or another name of it for messages."""
        return self[index].meta.source

    def fingerprint(self) -> dict[str, Any]:
        """Summarise the content without reading pixels, so that a resumed run can check it.

        Data sets with the same images, sizes, classes and boxes in the same order have equal fingerprints, regardless
        of where their files are. `fingerprint_change` describes a difference.

        Returns:
            Plain values for JSON: numbers of images and objects (None if unknown), classes (the names) and digest (a
            hash; empty if the content is generated).
        """
        return {"images": len(self), "objects": None, "classes": list(self.classes.names), "digest": ""}


@dataclass(frozen=True)
class Annotation:
    """One object as in its annotation file.

    Args:
        box: xyxy pixels in the convention of the format.
        label: 0..C-1.
        where: file and line or id, for messages.
        crowd: COCO's iscrowd.
        difficult: VOC's difficult.
        area: square pixels; None for the area of the box.
        mask: run lengths of the size of the image; None if neither masks nor semantic maps are read.
        points: (K, 3) float32 x and y in pixels, and whether the point is annotated; None if points are not read.
        rotation: clockwise rotation of the box about its centre in degrees (CVAT), see `rotation_of`. It is replaced
            by the upright box around it, which is counted.
        unread: other data of the object in the file; objects that differ in it are not duplicates.
    """

    box: Box
    label: int
    where: str
    crowd: bool = False
    difficult: bool = False
    area: float | None = None
    mask: mask_coding.Rle | None = None
    points: np.ndarray | None = None
    rotation: float = 0.0
    unread: Any = None


@dataclass(frozen=True)
class ImageFile:
    """An image file of a split, before it is checked.

    Args:
        image_id: the data set's id.
        path: the file.
        where: its location in the annotations, for messages.
        size: (height, width) according to the annotations, or None.
    """

    image_id: int | str
    path: Path
    where: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Record:
    """An image and its checked objects in compact form: every worker holds all, maybe a hundred thousand."""

    image_id: int | str
    path: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray
    masks: tuple[mask_coding.Rle, ...]
    points: tuple[np.ndarray, ...]


class FileDataset(Dataset):
    """Base class of data sets in files. The constructor of a format finds images and annotations.

    It must call `check_images`, then `add` for each image, then `finish`.

    Args:
        source: the data set and split, for messages.
        broken: the policy.
        masks: targets have masks.
        first_pixel: the coordinate of the first pixel, 1 in VOC, whose last pixel is inclusive.
        semantic: targets have a semantic map, drawn from the masks of the objects; `classes` then contains
            "background".
        points: targets have points; the format sets `_points` to their number.
        drop_others: drop and count objects of classes that the user did not choose, which otherwise are problems.
    """

    def __init__(
        self,
        source: str,
        broken: Broken,
        masks: bool = False,
        first_pixel: int = 0,
        semantic: bool = False,
        points: bool = False,
        drop_others: bool = False,
    ) -> None:
        self.problems = Problems(source, broken)
        self._drop_others = drop_others
        asked = {"masks": masks, "semantic": semantic, "points": points}
        self.fields = DETECTION_FIELDS | {name for name, wanted in asked.items() if wanted}
        self._points = 0
        self._first_pixel = first_pixel
        self._records: list[_Record] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        return Sample(self.image(index), self.target(index), Meta(record.image_id, record.path, record.size))

    def image(self, index: int, reduction: int = 1) -> np.ndarray:
        """Read the pixels of the image `index`.

        Args:
            reduction: 1, 2, 4 or 8, see `detkit.data.image.read_image`; above 1 only for JPEGs.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            DataError: the image cannot be read, or has changed since the data set was scanned.
        """
        record = self._records[index]
        expected = (-(-record.size[0] // reduction), -(-record.size[1] // reduction))
        try:
            image = read_image(record.path, reduction)
        except DataError as error:
            raise DataError(
                f"{error} Set data.broken to 'skip' to decode all images at the start and skip broken ones."
            ) from error
        if image.shape[:2] != expected:
            raise DataError(
                f"The image '{record.path}' was {_by(record.size)} when the data set was scanned, but has changed "
                f"(now {_by(image.shape[:2])}{f', read at 1/{reduction}' if reduction > 1 else ''}). Start again, and "
                f"do not change files during a run."
            )
        return image

    def target(self, index: int) -> Target:
        record = self._records[index]
        masks = None
        if "masks" in self.fields:
            masks = torch.from_numpy(mask_coding.decode(record.masks, record.size))
        semantic = None
        if "semantic" in self.fields:
            background = self.classes.names.index(BACKGROUND)
            labels, crowd = record.labels.tolist(), record.crowd.tolist()
            semantic = torch.from_numpy(painted(record.masks, labels, crowd, record.size, background))
        points = None
        if "points" in self.fields:
            points = torch.tensor(np.array(record.points, dtype=np.float32).reshape(-1, self._points, 3))
        # torch.tensor copies, so that callers cannot modify the data set.
        return Target(
            boxes=torch.tensor(record.boxes),
            labels=torch.tensor(record.labels),
            crowd=torch.tensor(record.crowd),
            difficult=torch.tensor(record.difficult),
            area=torch.tensor(record.area),
            masks=masks,
            points=None if points is None else points[..., :2].contiguous(),
            visible=None if points is None else points[..., 2] > 0,
            image_labels=torch.from_numpy(np.unique(record.labels)),
            semantic=semantic,
        )

    def size(self, index: int) -> tuple[int, int]:
        return self._records[index].size

    def image_id(self, index: int) -> int | str:
        return self._records[index].image_id

    def source(self, index: int) -> str:
        return self._records[index].path

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for record in self._records:
            digest.update(repr((record.image_id, record.size, len(record.labels))).encode("utf-8", "surrogatepass"))
            for values in (record.boxes, record.labels, record.crowd, record.difficult):
                digest.update(values.tobytes())
        objects = sum(len(record.labels) for record in self._records)
        return super().fingerprint() | {"objects": objects, "digest": digest.hexdigest()}

    def images_of(self, source: str | Path) -> list[Path]:
        """Search for images by `detkit.data.sources.search`; skipped files are reported in one line."""
        found = search(source)
        if found.passed_over:
            self.problems.add_harmless("source with other files", str(source), found.summary(), "read the images")
        return found.images

    def check_images(self, images: Sequence[ImageFile]) -> list[tuple[ImageFile, tuple[int, int]]]:
        """Return the usable images with their actual (height, width), and record problems.

        Under "fail" only the start and the end of each file are read; otherwise each image is decoded once, so that
        broken ones are skipped before training.
        """
        if not images:
            # If all annotations are broken, report that.
            self.problems.raise_if_fatal()
            raise self.problems.nothing_left()
        decode = self.problems.policy != "fail"
        repeats = _repeats(images)
        # An image that is listed several times is read once.
        notes: dict[int, list[str]] = {number: [] for number in range(len(images)) if number not in repeats}

        def check(number: int) -> tuple[int, int] | DataError:
            try:
                return check_image(images[number].path, decode, notes[number])
            except DataError as error:
                return error

        with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
            results = dict(zip(notes, pool.map(check, notes)))
        usable = []
        for number, image in enumerate(images):
            if number in repeats:
                self.problems.add("duplicate image", image.where, repeats[number], LEFT_OUT_IMAGE)
                continue
            result = results[number]
            if isinstance(result, DataError):
                # Path.is_file raises for a name that is too long.
                kind = "unreadable image" if os.path.isfile(image.path) else "missing image"
                self.problems.add(kind, image.where, str(result).rstrip("."), LEFT_OUT_IMAGE)
            elif self._size_agrees(image, result):
                usable.append((image, result))
                for remark in notes[number]:
                    self.problems.add_harmless("dark 16-bit image", image.where, remark, "kept as it is")
        for first, *others in identical([image.path for image, _ in usable]):
            message = f"it has the same content as '{usable[first][0].path}'"
            for other in others:
                self.problems.add_harmless("copy of an image", usable[other][0].where, message, "kept: it counts twice")
        return usable

    def _size_agrees(self, image: ImageFile, size: tuple[int, int]) -> bool:
        """Return whether the image can be used, given the size in its annotations."""
        if image.size is None or image.size == size:
            return True
        claim = _size_claim(image, size)
        repair = self.problems.policy == "repair"
        if image.size == size[::-1]:
            # It is unknown whether the boxes refer to the image before its Exif rotation. Without a rotation, `add`
            # decides by the boxes.
            if repair and not exchanges_sides(image.path):
                return True
            self.problems.add("size mismatch", image.where, claim, LEFT_OUT_IMAGE)
            return False
        action = "repaired: used the size of the image" if repair else LEFT_OUT_IMAGE
        self.problems.add("size mismatch", image.where, claim, action)
        return repair

    def add(self, image: ImageFile, size: tuple[int, int], annotations: Iterable[Annotation]) -> None:
        """Add an image with its valid and repaired objects, without duplicates.

        An image whose annotated width and height are swapped is only added if its boxes fit into the actual image.
        """
        given = [self._upright(annotation, size) for annotation in annotations]
        if image.size not in (None, size) and image.size == size[::-1]:
            checks = (check_box(item.box, size, self._first_pixel) for item in given)
            fits = all(check.kind != OUTSIDE for check in checks)
            action = "repaired: used the size of the image, which all boxes fit" if fits else LEFT_OUT_IMAGE
            self.problems.add("size mismatch", image.where, _size_claim(image, size), action)
            if not fits:
                return
        kept: list[Annotation] = []
        boxes: list[Box] = []
        for annotation in self._distinct(given):
            box = self._repaired(annotation, size)
            if box is not None:
                kept.append(annotation)
                boxes.append(box)
        areas = [
            (box[2] - box[0]) * (box[3] - box[1]) if item.area is None else item.area for item, box in zip(kept, boxes)
        ]
        self._records.append(
            _Record(
                image.image_id,
                str(image.path),
                size,
                np.array(boxes, dtype=np.float32).reshape(-1, 4),
                np.array([item.label for item in kept], dtype=np.int64),
                np.array([item.crowd for item in kept], dtype=bool),
                np.array([item.difficult for item in kept], dtype=bool),
                np.array(areas, dtype=np.float32),
                tuple(item.mask for item in kept if item.mask is not None),
                tuple(item.points for item in kept if item.points is not None),
            )
        )

    def _upright(self, annotation: Annotation, size: tuple[int, int]) -> Annotation:
        """Replace a rotated box by the upright box around it."""
        if annotation.rotation % 180 == 0:
            return annotation
        self.problems.remarks["rotated box: replaced by the upright box around it"] += 1
        return replace(annotation, box=upright(annotation.box, annotation.rotation, self._first_pixel))

    def _distinct(self, annotations: Iterable[Annotation]) -> Iterator[Annotation]:
        """Iterate over the annotations without duplicates that equal an earlier one in everything."""
        seen: dict[Any, list[Annotation]] = {}
        for item in annotations:
            points = None if item.points is None else item.points.tobytes()
            mask = None if item.mask is None else item.mask["counts"]
            alike = seen.setdefault(
                (item.box, item.label, item.crowd, item.difficult, item.area, item.rotation, mask, points), []
            )
            if first := next((other for other in alike if other.unread == item.unread), None):
                message = f"the object is the same as the one at {first.where}"
                self.problems.add_harmless("duplicate object", item.where, message, LEFT_OUT_BOX)
            else:
                alike.append(item)
                yield item

    def _repaired(self, annotation: Annotation, size: tuple[int, int]) -> Box | None:
        """Return the box as 0-based pixels within the image, or None if it is left out."""
        check = check_box(annotation.box, size, self._first_pixel)
        self.problems.rounded += check.rounded
        if annotation.mask is not None and not mask_coding.area(annotation.mask):
            message = "its mask covers no pixel of the image"
            self.problems.add("empty mask", annotation.where, message, LEFT_OUT_BOX)
            return None
        if check.kind is None:
            return check.box
        repaired = check.box if self.problems.policy == "repair" else None
        action = LEFT_OUT_BOX if repaired is None else f"repaired: {check.repair}"
        self.problems.add(check.kind, annotation.where, check.message, action)
        return repaired

    def leave_out(self, name: str, where: str) -> None:
        """Record that an object of the class `name`, which is not in `classes`, is left out."""
        if self._drop_others:
            self.problems.remarks["object of a class that data.class_names does not list: left out"] += 1
        else:
            message = (
                f"{unknown_class(name, self.classes)}; to leave out such objects, set data.other_classes to 'drop'"
            )
            self.problems.add("unknown class", where, message, LEFT_OUT_BOX)

    def finish(self) -> None:
        """Apply the policy for broken data.

        Raises:
            DataError: there are fatal problems, or no image is left.
        """
        self.problems.raise_if_fatal()
        if not self._records:
            raise self.problems.nothing_left()
        if "boxes" in self.fields:
            self._name_absent_classes()

    def _name_absent_classes(self) -> None:
        """Record the classes without objects, since a name in data.class_names may be misspelt."""
        seen = {label for record in self._records for label in record.labels.tolist()}
        names = [name for label, name in enumerate(self.classes.names) if label not in seen]
        if "semantic" in self.fields:
            names = [name for name in names if name != BACKGROUND]
        if names:
            shown = ", ".join(names[:MOST_NAMES]) + (" ..." if len(names) > MOST_NAMES else "")
            self.problems.remarks[f"class without an object in this split: {shown}"] = len(names)


@dataclass(frozen=True)
class BoxCheck:
    """The result of checking a box.

    Args:
        box: xyxy 0-based pixels within the image, repaired if needed; None if that is impossible.
        kind: kind of problem; None for a valid box.
        message: description of the problem.
        repair: description of the repair.
        rounded: the box exceeded the image by a rounding error and was clipped.
    """

    box: Box | None
    kind: str | None = None
    message: str = ""
    repair: str = ""
    rounded: bool = False


def check_box(raw: Box, size: tuple[int, int], first_pixel: int = 0) -> BoxCheck:
    """Check a box and convert it to 0-based pixels with exclusive right and bottom edges.

    Exceeding the image by up to 2 pixels or 0.5 % of its side, whichever is more, counts as a rounding error, so that a
    coordinate of 1.0021 does not discard an image.

    Args:
        raw: xyxy pixels as in the file.
        size: (height, width) of the image in pixels.
        first_pixel: the coordinate of the first pixel. For 1, as in VOC, the last pixel is inclusive, so only the left
            and top edges are shifted; but a box with equal edges still counts as empty: it is a click without a drag,
            not an object one pixel wide.
    """
    shown = f"the box ({', '.join(f'{value:g}' for value in raw)})"
    if not all(math.isfinite(value) for value in raw):
        return BoxCheck(None, "not a number", f"{shown} has a coordinate that is not a finite number")
    left, right = sorted((raw[0], raw[2]))
    top, bottom = sorted((raw[1], raw[3]))
    inverted = (left, top, right, bottom) != raw
    if left == right or top == bottom:
        return BoxCheck(None, "empty box", f"{shown} is xyxy of width {right - left:g} and height {bottom - top:g}")
    height, width = size
    edges = (left - first_pixel, top - first_pixel, right, bottom)
    clipped = (max(edges[0], 0.0), max(edges[1], 0.0), min(edges[2], float(width)), min(edges[3], float(height)))
    outside = max(-edges[0], edges[2] - width) > max(2.0, 0.005 * width) or (
        max(-edges[1], edges[3] - height) > max(2.0, 0.005 * height)
    )
    message = f"{shown} reaches outside the image, which is {_by(size)}"
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return BoxCheck(None, OUTSIDE, message.replace("reaches", "lies"))
    if inverted:
        return BoxCheck(
            clipped,
            "inverted box",
            f"{shown} has its right left of its left, or its bottom above its top",
            "swapped the corners" + (" and clipped" if outside else ""),
        )
    if outside:
        return BoxCheck(clipped, OUTSIDE, message, "clipped to the image")
    return BoxCheck(clipped, rounded=clipped != edges)


def upright(box: Box, degrees: float, first_pixel: int = 0) -> Box:
    """Compute the smallest upright box around a box rotated about its centre.

    Args:
        box: xyxy pixels before the rotation, as in the file.
        degrees: angle of rotation; both directions give the same box.
        first_pixel: as in `check_box`.
    """
    left, top, right, bottom = box[0] - first_pixel, box[1] - first_pixel, box[2], box[3]
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    across = ((right - left) * cosine + (bottom - top) * sine) / 2
    down = ((right - left) * sine + (bottom - top) * cosine) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - across + first_pixel, y - down + first_pixel, x + across, y + down


def rotation_of(value: object) -> float:
    """Parse a rotation in degrees, as CVAT writes it in XML and in COCO's "attributes".

    Raises:
        ValueError: it is not a finite number.
    """
    degrees = number(value)
    if not math.isfinite(degrees):
        raise ValueError(f"the rotation {value!r} is not a finite number of degrees")
    return degrees


def fingerprint_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the difference of two results of `Dataset.fingerprint` for a sentence; empty if they are equal."""
    changes = [f"{now[key]} {key} instead of {before[key]}" for key in ("images", "objects") if before[key] != now[key]]
    if list(before["classes"]) != list(now["classes"]):
        changes.append(f"the classes {', '.join(now['classes'])} instead of {', '.join(before['classes'])}")
    if not changes and before["digest"] != now["digest"]:
        changes.append("other images, sizes, boxes or labels, or another order of the images")
    return " and ".join(changes)


def check_root(root: str, layout: str) -> Path:
    """Return the folder of a data set.

    Raises:
        DataError: it does not exist; the message has the expected layout.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"The data folder '{root}' does not exist. Set data.root to a folder with {layout}.")
    return path


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read the stripped non-blank lines of a list of images, with their line numbers.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text.
    """
    lines = read_text(path, "list of images").splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def missing_split(split: str, path: Path, available: Iterable[str]) -> DataError:
    """Create the error for a split whose file or folder `path` is missing."""
    return DataError(
        f"There is no split '{split}': '{path}' does not exist. {nearest(split, available)} "
        f"Set data.train and data.val to existing splits."
    )


def checked_classes(build: Callable[[], ClassList], where: str) -> ClassList:
    """Call `build`, turning its errors, such as a duplicate name, into DataError."""
    try:
        return build()
    except ValueError as error:
        raise DataError(
            f"The classes of '{where}' cannot be used: {error}. Give each class a unique name and id."
        ) from error


def unknown_class(name: str, classes: ClassList) -> str:
    """Format the message for an object of a class that is not in the list."""
    return f"the class '{name}' is not in the list of classes; {nearest(name, classes.names).rstrip('.')}"


def number(value: object) -> float:
    """Parse a number from JSON or text.

    Raises:
        ValueError: it is not a number.
    """
    # Unlike Python, reject underscores and digits of other scripts, which are mistakes here.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (isinstance(value, str) and ("_" in value or not value.isascii()))
    ):
        raise ValueError(f"{_short(value)} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{_short(value)} is not a number") from None


def as_box(values: Sequence[float]) -> Box:
    """Convert four numbers to a box."""
    return cast(Box, tuple(values))


def _repeats(images: Sequence[ImageFile]) -> dict[int, str]:
    """Find images with the id or file of an earlier one; return the message by position."""
    ids: set[int | str] = set()
    files: dict[str, int | str] = {}
    found = {}
    for number, image in enumerate(images):
        file = os.path.abspath(image.path)
        if image.image_id in ids:
            found[number] = f"the image {image.image_id!r} is listed twice"
        elif file in files:
            found[number] = f"its file '{image.path}' is also that of the image {files[file]!r}"
        ids.add(image.image_id)
        files.setdefault(file, image.image_id)
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size_claim(image: ImageFile, size: tuple[int, int]) -> str:
    """Format the message for an image whose size differs from that in its annotations."""
    assert image.size is not None
    claim = f"the annotations say {_by(image.size)}, the image '{image.path.name}' is {_by(size)}"
    if image.size != size[::-1]:
        return claim
    if exchanges_sides(image.path):
        return f"{claim}; that is its size before its Exif rotation, so its boxes may refer to the unrotated image"
    return f"{claim}; width and height are swapped"


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]} pixels"
