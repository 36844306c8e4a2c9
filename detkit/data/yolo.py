"""YOLO: one text file for each picture, one line for each object, in fractions of the picture's size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    Annotation,
    FileDataset,
    Picture,
    checked_classes,
    fixed_classes,
    missing_split,
    number,
    read_lines,
    unknown_class,
)
from detkit.data.image import find_images
from detkit.data.layouts import other_layout
from detkit.data.masks import polygon_area, rle_from_polygons
from detkit.data.semantic import names_with_background, with_background
from detkit.errors import DataError, nearest
from detkit.registry import datasets
from detkit.types import ClassList

# Beyond this no fraction is a careless one: the numbers are pixels.
_LARGEST_FRACTION = 2.0


@datasets.register("yolo")
class Yolo(FileDataset):
    """A data set in YOLO's layout: data.yaml, folders of pictures, and for images/a.jpg a file labels/a.txt.

    A line is `class x y width height` (centre and size) or, for segmentation, `class x1 y1 x2 y2 ...` (a polygon,
    whose extent is the box), in fractions of the picture. A picture without a label file has no objects; how many
    there are is in `problems.unlabelled`. Lines that stand twice in a file count once. meta.image_id is the picture's
    path below the data's folder.

    Args:
        root: data.yaml, or the folder that holds it. Its keys: names (a list, or names by id), train, val ... (each a
            folder, a .txt list of pictures, or a list of these), and path. Relative paths start from `path`, which
            starts from the folder of data.yaml.
        split: a key of data.yaml.
        broken: what to do with broken boxes and pictures.
        class_names: the classes in the order of their labels; by default all of data.yaml by id.
        masks: read polygons as masks; a line with a plain box is a problem then.
        semantic: make semantic maps of polygons, as COCO's; likewise.

    Raises:
        DataError: data.yaml or something that it names is missing or malformed, no picture has a label file, or
            something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
        masks: bool = False,
        semantic: bool = False,
    ) -> None:
        super().__init__(f"The YOLO data in '{root}' (split '{split}')", broken, masks, semantic=semantic)
        self._yaml = _find_yaml(root)
        content = _load(self._yaml)
        declared = _declared(content, self._yaml)
        if semantic:
            declared = with_background(declared)
            class_names = None if class_names is None else names_with_background(class_names)
        self.classes = declared if class_names is None else fixed_classes(class_names, declared, str(self._yaml))
        self._declared_names = dict(zip(declared.raw_ids, declared.names))
        self._labels = {raw_id: label for label, raw_id in enumerate(self.classes.raw_ids)}
        self._base = (self._yaml.parent / Path(str(content.get("path") or ".")).expanduser()).resolve()
        pictures = self._pictures(self._split_files(content, split))
        usable = self.check_pictures(pictures)
        self._check_labelled(pictures)
        for picture, size in usable:
            self.add(picture, size, self._annotations(_label_file(picture.path), size))
        self.finish()

    def _split_files(self, content: dict[str, Any], split: str) -> list[tuple[Path, str]]:
        """The picture files of a split, each with what names it."""
        available = [key for key, value in content.items() if _is_source(value) and key not in {"path", "names"}]
        if split not in content:
            raise DataError(
                f"There is no split '{split}' in '{self._yaml}'. {nearest(split, available)} "
                f"Set data.train and data.val to splits that are there."
            )
        if not _is_source(content[split]):
            raise DataError(
                f"The key '{split}' in '{self._yaml}' is {content[split]!r}, which is no split. Give it a folder, a "
                f".txt file that lists pictures, or a list of these."
            )
        sources = content[split] if isinstance(content[split], list) else [content[split]]
        files: list[tuple[Path, str]] = []
        for source in sources:
            path = self._resolve(source)
            if path.is_dir():
                files += [(file, str(file)) for file in find_images(path)]
            elif path.is_file():
                files += self._listed(path)
            else:
                raise missing_split(split, path, (key for key in available if key != split))
        return files

    def _resolve(self, source: str) -> Path:
        path = self._base / source
        # Roboflow writes ../train/images into a data.yaml that lies beside train.
        beside = self._base / source.removeprefix("../")
        return beside if not path.exists() and beside.exists() else path

    def _listed(self, path: Path) -> list[tuple[Path, str]]:
        """The pictures in a .txt list: paths that start from the data's folder, or from the list's with './'."""
        return [
            ((path.parent if text.startswith("./") else self._base) / text, f"{path}:{line}")
            for line, text in read_lines(path)
        ]

    def _pictures(self, files: list[tuple[Path, str]]) -> list[Picture]:
        return [Picture(_below(file, self._base), file, where) for file, where in files]

    def _check_labelled(self, pictures: list[Picture]) -> None:
        """Count pictures without a label file; if none has one, the layout is wrong rather than all pictures empty."""
        self.problems.unlabelled = sum(not _label_file(picture.path).is_file() for picture in pictures)
        if self.problems.unlabelled == len(pictures):
            first = pictures[0].path
            raise DataError(
                f"None of the {len(pictures)} images of {self.problems.source} has a label file: '{first}', say, needs "
                f"'{_label_file(first)}'. Put the labels there; for images without objects, leave the file empty."
            )

    def _annotations(self, path: Path, size: tuple[int, int]) -> Iterator[Annotation]:
        if not path.is_file():
            return
        seen: dict[tuple[float, ...], int] = {}
        for line, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            if not text.strip():
                continue
            where = f"{path}:{line}"
            try:
                values = tuple(number(word) for word in text.split())
                if values in seen:
                    message = f"the line is the same as line {seen[values]}"
                    self.problems.add_harmless("duplicate line", where, message, LEFT_OUT_BOX)
                    continue
                seen[values] = line
                annotation = self._annotation(values, where, size)
            except _LineError as error:
                self.problems.add(error.kind, where, str(error), LEFT_OUT_BOX)
            except ValueError as error:
                self.problems.add("malformed line", where, str(error), LEFT_OUT_BOX)
            else:
                yield annotation

    def _annotation(self, values: tuple[float, ...], where: str, size: tuple[int, int]) -> Annotation:
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise ValueError(
                f"the line has {len(values)} columns, but a box has 5 (class x y width height) and a polygon an odd "
                f"number from 7 on (class x1 y1 x2 y2 x3 y3 ...)"
            )
        label = self._label(values[0])
        fractions = values[1:]
        if not all(math.isfinite(value) for value in fractions):
            raise _LineError("not a number", f"a coordinate is not a finite number: {fractions}")
        if max(map(abs, fractions)) > _LARGEST_FRACTION:
            raise _LineError(
                "not a fraction",
                f"the coordinate {max(fractions, key=abs):g} is far above 1; coordinates are fractions of the width "
                f"and height of the picture, {size[1]} x {size[0]} here, not pixels",
            )
        height, width = size
        pixels = [value * (height if index % 2 else width) for index, value in enumerate(fractions)]
        if len(pixels) == 4:
            if self.fields & {"masks", "semantic"}:
                raise _LineError("no mask", "the line is a box, but data.masks asks for polygons; set it to false")
            x, y, box_width, box_height = pixels
            box = (x - box_width / 2, y - box_height / 2, x + box_width / 2, y + box_height / 2)
            return Annotation(box, label, where)
        xs, ys = pixels[0::2], pixels[1::2]
        mask = rle_from_polygons([pixels], size) if self.fields & {"masks", "semantic"} else None
        return Annotation((min(xs), min(ys), max(xs), max(ys)), label, where, area=polygon_area(pixels), mask=mask)

    def _label(self, raw_id: float) -> int:
        if raw_id in self._labels:
            return self._labels[int(raw_id)]
        if raw_id in self._declared_names:
            raise _LineError("unknown class", unknown_class(self._declared_names[int(raw_id)], self.classes))
        raise _LineError(
            "class out of range", f"the class {raw_id:g} is not in '{self._yaml}', which has {self.classes}"
        )


class _LineError(ValueError):
    """What is wrong with one line, and the kind to count it by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _find_yaml(root: str) -> Path:
    path = Path(root).expanduser()
    file = path / "data.yaml" if path.is_dir() else path
    if not file.is_file():
        others = ", ".join(sorted(item.name for item in path.glob("*.y*ml"))) if path.is_dir() else ""
        hint = f" The folder has {others}: set data.root to the file." if others else other_layout(root, "yolo")
        raise DataError(f"There is no '{file}'. Set data.root to data.yaml or to the folder that holds it.{hint}")
    return file.resolve()


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DataError(f"{path}{line}: the YAML cannot be parsed ({reason}). Mend the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"The file '{path}' does not hold keys and values. It needs the keys names, train and val.")
    return {str(key): value for key, value in content.items()}


def _declared(content: dict[str, Any], path: Path) -> ClassList:
    """The classes of data.yaml."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise DataError(
            f"The key 'names' in '{path}' must be a list of class names, or names by id (0: person), but it is "
            f"{names!r}."
        )
    if content.get("nc", len(names)) != len(names):
        raise DataError(
            f"The keys in '{path}' disagree: nc is {content['nc']}, but names has {len(names)} classes. "
            f"Mend one of them."
        )
    ids = sorted(names)
    return checked_classes(lambda: ClassList(tuple(str(names[raw_id]) for raw_id in ids), tuple(ids)), str(path))


def _is_source(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _label_file(picture: Path) -> Path:
    """images/a.jpg to labels/a.txt; the last "images" of the path counts."""
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _below(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix() if file.is_relative_to(base) else file.as_posix()
