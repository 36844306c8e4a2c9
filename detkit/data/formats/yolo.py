"""YOLO: one text file per image, one line per object, in fractions of the image size."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    LEFT_OUT_IMAGE,
    Annotation,
    FileDataset,
    ImageFile,
    missing_split,
    read_lines,
)
from detkit.data.image import IMAGE_SUFFIXES
from detkit.data.masks import polygon_area, rle_from_polygons
from detkit.data.parsing.classes import ClassMap, OtherClasses
from detkit.data.parsing.layouts import other_layout
from detkit.data.parsing.yolo_lines import (
    LabelLine,
    LineError,
    PointShape,
    PolygonEvidence,
    looks_like_labels,
    parse_line,
    parse_numbers,
    read_label_file,
)
from detkit.data.sources import CLOSED, DEAD_LINK, KNOWN_FOLDER, UNREAD, Found, is_image, search
from detkit.errors import DataError, counted, nearest
from detkit.io.files import read_yaml
from detkit.registry import datasets

LEFT_OUT_LABELS = "left out the label file"
MOST_POINTS = 1000
NULL = ("", "~", "null", "Null", "NULL")
"""YAML's spellings of null: data.yaml is read as text, so that a class may be called `no`."""
NOT_IMAGES = frozenset({".txt", ".json", ".xml", ".npy"})
"""Suffixes of files that accompany images under the same names."""
NOT_SPLITS = frozenset({"path", "names", "nc", "kpt_shape", "flip_idx", "download"})


@datasets.register("yolo")
class Yolo(FileDataset):
    """A data set in YOLO's layout: data.yaml, folders of images, and for images/a.jpg a file labels/a.txt.

    A line is `class x y width height` (centre and size), `class x1 y1 x2 y2 ...` (a polygon, whose extent is the box;
    an oriented box has four corners), or, if data.yaml has kpt_shape, `class x y width height` and the points, in
    fractions of the image. An image without a label file has no objects; their number is in `problems.unlabelled`.
    Duplicate lines in a file count once. meta.image_id is the image's path relative to the data folder.

    Args:
        root: data.yaml or its folder. Its keys: names (a list, or names by id), train, val ... (each a folder, a .txt
            list of images, or a list of these), and path. Relative paths refer to `path`, which refers to the folder of
            data.yaml; those in a list may also refer to the list's folder or to the working folder. For points:
            kpt_shape, [K, 2] (x y) or [K, 3] (x y visibility), and flip_idx, the index of each point in a mirrored
            image. Points of visibility 0 are not annotated; without visibility, neither are negative x y or 0 0.
            Nothing is downloaded.
        split: a key of data.yaml.
        broken: the policy for broken boxes and images.
        class_names: the classes in the order of their labels; by default all of data.yaml by id.
        masks: read polygons as masks; lines with plain boxes are then problems.
        semantic: create semantic maps from polygons as for COCO; lines with plain boxes are then problems.
        points: read points.
        merge_classes: merge classes of the same name into one with the smallest of their ids.
        other_classes: how to treat objects of classes that `class_names` does not list: "problem" applies `broken`,
            "drop" drops and counts them.

    Raises:
        DataError: data.yaml or something that it refers to is missing or malformed, no image has a label file, lines
            can be read both as polygons and as points, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
        masks: bool = False,
        semantic: bool = False,
        points: bool = False,
        merge_classes: bool = False,
        other_classes: OtherClasses = "problem",
    ) -> None:
        source = f"The YOLO data in '{root}' (split '{split}')"
        drop = other_classes == "drop"
        super().__init__(source, broken, masks, semantic=semantic, points=points, drop_others=drop)
        self._yaml = _read_data_file(root)
        self._classes = ClassMap(self._yaml.classes, str(self._yaml.path), class_names, merge_classes, semantic)
        self.classes = self._classes.classes
        if points:
            self._points, self.flip_pairs = self._yaml.points.count, self._yaml.flip_pairs
        self._evidence = PolygonEvidence()
        files, searched = self._yaml.images_of(split)
        for found in searched.values():
            for reason in (UNREAD, DEAD_LINK, KNOWN_FOLDER, CLOSED):
                self.problems.remarks[f"{reason}: skipped"] += len(found.passed_over.get(reason, ()))
        images = [ImageFile(self._yaml.image_id(file), file, where) for file, where in files]
        usable = self.check_images(images)
        label_files = {image.path: file for image in images if os.path.isfile(file := label_file(image.path))}
        if not usable:
            self.problems.raise_if_fatal()
            raise self.problems.nothing_left()
        self._check_labelled(images, label_files)
        self._check_unused(set(label_files.values()), list(searched))
        owners: dict[Path, Path] = {}
        for image, size in usable:
            path = label_files.get(image.path)
            if path is not None and (owner := owners.setdefault(path, image.path)) != image.path:
                message = f"its label file '{path}' is also that of '{owner}'; rename one of the images"
                self.problems.add("label file of two images", image.where, message, LEFT_OUT_IMAGE)
                continue
            try:
                lines = [] if path is None else read_label_file(path)
            except DataError as error:
                self.problems.add("unreadable label file", image.where, str(error).rstrip("."), LEFT_OUT_IMAGE)
            else:
                self.add(image, size, self._annotations(lines, path, size))
        if not self._yaml.decided:
            self._evidence.check(self._yaml.path)
        self.finish()

    def _check_labelled(self, images: list[ImageFile], label_files: dict[Path, Path]) -> None:
        """Count images without a label file; if no image has one, report a wrong layout."""
        self.problems.unlabelled = sum(image.path not in label_files for image in images)
        if not label_files:
            first = images[0].path
            raise DataError(
                f"{self.problems.source} has {counted(len(images), 'image')}, but none has a label file: '{first}', "
                f"for example, needs '{label_file(first)}'. Put the labels there; leave the file empty for images "
                f"without objects."
            )

    def _check_unused(self, used: set[Path], folders: list[Path]) -> None:
        """Record label files in the folders of the split that do not belong to any of its images."""
        roots = {_swapped(folder, "images", "labels") for folder in folders}
        if folders:
            roots |= {file.parent for file in used}
        neighbours: dict[Path, dict[str, list[Path]]] = {}
        for file in _text_files(roots):
            if file in used or not looks_like_labels(file):
                continue
            image_folder = _swapped(file.parent, "labels", "images")
            found = []
            for folder in {image_folder, file.parent}:
                if folder not in neighbours:
                    neighbours[folder] = _by_stem(folder)
                found += neighbours[folder].get(file.stem, [])
            if file.suffix != ".txt":
                message = f"its suffix must be .txt, but is {file.suffix}; rename it"
                self.problems.add("label file with another suffix", str(file), message, LEFT_OUT_LABELS)
            elif not found:
                message = f"there is no image '{file.stem}.*' in '{image_folder}'"
                self.problems.add("label file without an image", str(file), message, LEFT_OUT_LABELS)
            elif not any(map(is_image, found)):
                message = (
                    f"the image has labels ('{file}'), but the suffix '{found[0].suffix}' is not supported (supported: "
                    f"{' '.join(sorted(IMAGE_SUFFIXES))}); convert it"
                )
                self.problems.add("image of an unsupported format", str(found[0]), message, LEFT_OUT_IMAGE)

    def _annotations(
        self, lines: list[tuple[int, tuple[str, ...]]], path: Path | None, size: tuple[int, int]
    ) -> Iterator[Annotation]:
        seen: dict[tuple[float, ...], int] = {}
        for line, words in lines:
            where = f"{path}:{line}"
            try:
                values = parse_numbers(words)
                if values in seen:
                    message = f"the line is the same as line {seen[values]}"
                    self.problems.add_harmless("duplicate line", where, message, LEFT_OUT_BOX)
                    continue
                seen[values] = line
                parsed = parse_line(values, self._yaml.shape, size)
                if parsed.polygon is not None:
                    self._evidence.add(values, where)
                label = self._label(values[0])
                if label is None:
                    self.leave_out(self._classes.names[int(values[0])], where)
                    continue
                annotation = self._annotation(label, parsed, where, size, values)
            except LineError as error:
                self.problems.add(error.kind, where, str(error), LEFT_OUT_BOX)
            else:
                yield annotation

    def _annotation(
        self, label: int, line: LabelLine, where: str, size: tuple[int, int], values: tuple[float, ...]
    ) -> Annotation:
        if "points" in self.fields and line.points_outside:
            message = f"{line.points_outside} of its points are outside the image"
            self.problems.add("point outside the image", where, message, "treated as not visible")
        points = line.points if "points" in self.fields else None
        wants_mask = bool(self.fields & {"masks", "semantic"})
        if line.polygon is None:
            if wants_mask:
                raise LineError(
                    "no mask", "the line is a box, but the head needs polygons; use data with polygons or another head"
                )
            return Annotation(line.box, label, where, points=points, unread=values)
        mask = rle_from_polygons([line.polygon], size) if wants_mask else None
        return Annotation(line.box, label, where, area=polygon_area(line.polygon), mask=mask, unread=values)

    def _label(self, raw_id: float) -> int | None:
        """Return the label of a class; None if data.class_names does not list it."""
        if raw_id in self._classes.names:
            return self._classes.labels.get(int(raw_id))
        raise LineError(
            "class out of range", f"the class {raw_id:g} is not in '{self._yaml.path}', which has {self.classes}"
        )


def label_file(image: Path) -> Path:
    """Return the label file of an image: images/a.jpg to labels/a.txt, replacing the last "images" of the path."""
    folder = _swapped(image.parent, "images", "labels")
    return folder / f"{os.path.splitext(image.name)[0]}.txt"


@dataclass(frozen=True)
class _DataFile:
    """The content of data.yaml.

    Args:
        path: the file.
        content: the content, with every scalar as its source text.
        base: the folder that its paths are relative to.
        classes: raw id and name of each class, sorted by raw id.
        shape: the shape of the points, or None.
        flip_pairs: pairs of points that are swapped when mirrored, or None if unknown.
    """

    path: Path
    content: dict[str, Any]
    base: Path
    classes: list[tuple[int, str]]
    shape: PointShape | None
    flip_pairs: tuple[tuple[int, int], ...] | None

    @property
    def decided(self) -> bool:
        """Whether the file declares if lines contain points."""
        return "kpt_shape" in self.content

    @property
    def points(self) -> PointShape:
        """The shape of the points.

        Raises:
            DataError: the file does not declare points.
        """
        if self.shape is None:
            raise DataError(
                f"The head needs points, but '{self.path}' declares none. Add kpt_shape, such as [17, 3] for x y "
                f"visibility of 17 points or [5, 2] for x y of 5, if its label files have them; else use another head."
            )
        return self.shape

    def image_id(self, file: Path) -> str:
        """Return the path of an image relative to the data folder."""
        file = Path(os.path.normpath(file))
        return file.relative_to(self.base).as_posix() if file.is_relative_to(self.base) else file.as_posix()

    def images_of(self, split: str) -> tuple[list[tuple[Path, str]], dict[Path, Found]]:
        """Find the image files of a split, with their locations for messages, and the searched folders.

        Raises:
            DataError: there is no such split, or it refers to something that is missing.
        """
        splits = {
            key: [source] if isinstance(source, str) else source
            for key, source in self.content.items()
            if key not in NOT_SPLITS and _is_source(source)
        }
        if split not in splits:
            if split in self.content:
                raise DataError(
                    f"The key '{split}' in '{self.path}' is {_short(self.content[split])}, which is not a valid split. "
                    f"Set it to a folder, a .txt file that lists images, or a list of these."
                )
            raise DataError(
                f"There is no split '{split}' in '{self.path}'. {nearest(split, splits)} Set data.train and data.val "
                f"to splits that exist."
            )
        files: list[tuple[Path, str]] = []
        searched: dict[Path, Found] = {}
        for path in map(self._resolve, splits[split]):
            if os.path.isdir(path):
                searched[path] = search(path)
                files += [(file, str(file)) for file in searched[path].images]
            elif os.path.isfile(path):
                files += [(self._listed(text, path), f"{path}:{line}") for line, text in read_lines(path)]
            elif not os.path.isdir(self.base):
                raise DataError(
                    f"The key 'path' in '{self.path}' is the folder '{self.base}', which does not exist. Fix it; a "
                    f"relative one refers to the folder of that file, and so do all paths if it is removed."
                )
            else:
                raise missing_split(split, path, (key for key in splits if key != split))
        return files, searched

    def _resolve(self, source: str) -> Path:
        # Roboflow writes ../train/images into a data.yaml beside the folder train.
        names = [name for text in _spellings(source) for name in (text, text.removeprefix("../"))]
        return _first_existing(self.base / name for name in names)

    def _listed(self, text: str, path: Path) -> Path:
        """Resolve the path of an image in a list: relative to the data folder, with './' to the list's folder, and in
        lists of Darknet to Darknet's working folder."""
        folders = [self.base, path.parent, Path.cwd()]
        if text.startswith("./"):
            folders = [path.parent, self.base, Path.cwd()]
        return _first_existing(folder / name for folder in folders for name in _spellings(text))


def _read_data_file(root: str) -> _DataFile:
    path = _find_yaml(root)
    content = read_yaml(path, "data file", as_text=True)
    if not isinstance(content, dict):
        raise DataError(f"The data file '{path}' is not a mapping. It needs the keys names, train and val.")
    content = {str(key): value for key, value in content.items()}
    folder = content.get("path", "")
    if not isinstance(folder, str):
        raise DataError(f"The key 'path' in '{path}' must be a folder, but is {_short(folder)}.")
    base = path.parent
    if folder not in NULL:
        base = Path(os.path.normpath(_first_existing(base / name for name in _spellings(folder))))
    shape = _point_shape(content, path)
    return _DataFile(path, content, base, _declared(content, path), shape, _flip_pairs(content, path, shape))


def _find_yaml(root: str) -> Path:
    path = Path(os.path.expanduser(root))
    is_folder = os.path.isdir(path)
    file = path / "data.yaml" if is_folder else path
    if not os.path.isfile(file):
        others = ", ".join(sorted(item.name for item in path.glob("*.y*ml"))) if is_folder else ""
        hint = f" The folder has {others}: set data.root to the file." if others else other_layout(root, "yolo")
        raise DataError(f"There is no '{file}'. Set data.root to data.yaml or its folder.{hint}")
    return file.resolve()


def _declared(content: dict[str, Any], path: Path) -> list[tuple[int, str]]:
    """Read the classes of data.yaml."""
    names = content.get("names")
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    if (
        not isinstance(names, dict)
        or not names
        or not all(_is_whole(key) for key in names)
        or not all(isinstance(name, str) and name.strip() for name in names.values())
    ):
        raise DataError(
            f"The key 'names' in '{path}' must be a list of class names, or names by id (0: person), none of them "
            f"empty, but is {_short(content.get('names'))}."
        )
    count = content.get("nc", "")
    if count not in NULL and not (_is_whole(count) and int(count) == len(names)):
        raise DataError(
            f"The keys in '{path}' disagree: nc is {_short(count)}, but names has {len(names)} classes. Fix one of "
            f"them, or remove nc."
        )
    return sorted((int(raw_id), name) for raw_id, name in names.items())


def _point_shape(content: dict[str, Any], path: Path) -> PointShape | None:
    """Read the shape of the points; null declares that there are none."""
    shape = content.get("kpt_shape", "null")
    if shape in ("null", "~"):
        return None
    if isinstance(shape, list) and len(shape) == 2 and all(map(_is_whole, shape)):
        count, numbers = map(int, shape)
        if 1 <= count <= MOST_POINTS and numbers in (2, 3):
            return PointShape(count, numbers)
    raise DataError(
        f"The key 'kpt_shape' in '{path}' must be [number of points, 2] for x y or [number of points, 3] for x y "
        f"visibility, with at most {MOST_POINTS} points, or null for none, but is {_short(shape)}."
    )


def _flip_pairs(content: dict[str, Any], path: Path, shape: PointShape | None) -> tuple[tuple[int, int], ...] | None:
    order = content.get("flip_idx", "null")
    if shape is None or order in NULL:
        return None
    if isinstance(order, list) and len(order) == shape.count and all(map(_is_whole, order)):
        partners = list(map(int, order))
        if all(other < len(partners) and partners[other] == index for index, other in enumerate(partners)):
            return tuple((index, other) for index, other in enumerate(partners) if index < other)
    raise DataError(
        f"The key 'flip_idx' in '{path}' must list for each of {shape.count} points the one with which it is swapped "
        f"in a mirrored image, itself or another, such as [0, 2, 1], but is {_short(order)}."
    )


def _is_source(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and _is_source(item) for item in value)
    return isinstance(value, str) and value not in NULL and "\0" not in value


def _is_whole(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9]{1,9}", text) is not None


def _short(value: object) -> str:
    text = value if isinstance(value, str) and _is_whole(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spellings(text: str) -> Iterable[str]:
    """Return a path as written, and with Windows separators replaced."""
    return dict.fromkeys(os.path.expanduser(name) for name in (text, text.replace("\\", "/")))


def _first_existing(paths: Iterable[Path]) -> Path:
    """Return the first existing path, or the first path if none exists."""
    candidates = list(paths)
    return next((path for path in candidates if os.path.exists(path)), candidates[0])


def _swapped(folder: Path, old: str, new: str) -> Path:
    """Replace the last part of a path that equals `old` by `new`."""
    parts = list(folder.parts)
    if old in parts:
        parts[len(parts) - 1 - parts[::-1].index(old)] = new
    return Path(*parts)


def _text_files(roots: Iterable[Path]) -> list[Path]:
    """Find the text files below folders, entering each folder once, regardless of links."""
    entered: set[str] = set()
    found: set[Path] = set()
    for root in sorted(roots):
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            found |= {Path(folder, name) for name in names if name.lower().endswith(".txt") and name[0] != "."}
    return sorted(found)


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """Group the files of a folder that may be images by their names without suffix."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in folder.iterdir() if os.path.isdir(folder) else ():
        if file.suffix.lower() not in NOT_IMAGES and file.is_file():
            found[file.stem].append(file)
    return found
