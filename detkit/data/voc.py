"""Pascal VOC: one XML file for each picture, boxes counted from 1 with the last pixel inclusive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.parsers import expat

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    LEFT_OUT_IMAGE,
    Annotation,
    FileDataset,
    Picture,
    as_box,
    check_root,
    checked_classes,
    missing_split,
    number,
    read_lines,
    unknown_class,
)
from detkit.data.image import IMAGE_SUFFIXES, is_image
from detkit.data.layouts import other_layout
from detkit.errors import DataError
from detkit.registry import datasets
from detkit.types import ClassList

_LAYOUT = "the folders Annotations, ImageSets/Main and JPEGImages"


@datasets.register("voc")
class Voc(FileDataset):
    """A data set in Pascal VOC's layout: Annotations/ID.xml, ImageSets/Main/SPLIT.txt, JPEGImages/ID.jpg (or .png ...).

    xmin and ymin are 1-based and lose 1; xmax and ymax stay, because inclusive 1-based is exclusive 0-based.
    The picture of an id is the file of that name in JPEGImages, whatever <filename> says. In a split file of one
    class (aeroplane_train.txt) all ids count, those with -1 too. meta.image_id is the id.

    Args:
        root: the folder with these three.
        split: a file of ImageSets/Main, without ".txt".
        broken: what to do with broken boxes and pictures.
        class_names: the classes in the order of their labels; by default all names in Annotations, sorted, so that
            every split has the same list.

    Raises:
        DataError: a folder or split is missing or empty, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(f"The VOC data in '{root}' (split '{split}')", broken, first_pixel=1)
        self._root = check_root(root, _LAYOUT)
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            if not (self._root / name).is_dir():
                raise DataError(
                    f"The VOC data in '{root}' has no folder '{name}'. Set data.root to a folder with {_LAYOUT}."
                    f"{other_layout(root, 'voc')}"
                )
        ids = self._ids(split)
        # A file of another split is read for its classes, without which the labels of the splits would differ.
        others = sorted({file.stem for file in (self._root / "Annotations").glob("*.xml")} - set(ids))
        documents = self._documents(ids if class_names is not None else [*ids, *others])
        found = {item.name for document in documents.values() for item in document.objects if item.name}
        names = sorted(found) if class_names is None else class_names
        self.classes = checked_classes(lambda: ClassList.from_names(names), f"{root}/Annotations")
        pictures = self._pictures({image_id: documents[image_id] for image_id in ids if image_id in documents})
        for picture, size in self.check_pictures(pictures):
            self.add(picture, size, self._annotations(documents[str(picture.image_id)]))
        self.finish()

    def _ids(self, split: str) -> list[str]:
        """The ids of a split in the order of its file."""
        folder = self._root / "ImageSets" / "Main"
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise missing_split(split, path, (file.stem for file in folder.glob("*.txt")))
        ids: dict[str, int] = {}
        for line, text in read_lines(path):
            image_id = self._id(text)
            if image_id in ids:
                message = f"the image '{image_id}' stands in line {ids[image_id]} already"
                self.problems.add("duplicate image", f"{path}:{line}", message, LEFT_OUT_IMAGE)
            ids.setdefault(image_id, line)
        if not ids:
            raise DataError(f"The split file '{path}' lists no images. Write one id on each line.")
        return list(ids)

    def _id(self, text: str) -> str:
        """The id in a line, which may have a second column (1, 0 or -1) or a file's ending."""
        if Path(text).suffix.lower() in IMAGE_SUFFIXES:
            text = text[: -len(Path(text).suffix)]
        words = text.split()
        # A name may hold a space itself, so that the second column is one only where the whole line names no file.
        if len(words) > 1 and words[-1] in {"1", "0", "-1"} and not self._xml(text).is_file():
            return text[: -len(words[-1])].rstrip()
        return text

    def _xml(self, image_id: str) -> Path:
        return self._root / "Annotations" / f"{image_id}.xml"

    def _documents(self, ids: Iterable[str]) -> dict[str, _Document]:
        """The annotations of images by id; those without any that can be read are recorded as problems."""
        documents = {}
        for image_id in ids:
            path = self._xml(image_id)
            try:
                documents[image_id] = _read_document(path)
            except FileNotFoundError:
                message = f"the image '{image_id}' has no annotation file"
                self.problems.add("missing annotation", str(path), message, LEFT_OUT_IMAGE)
            except (expat.ExpatError, LookupError, ValueError) as error:  # the last two: an encoding not known to expat
                where = f"{path}:{getattr(error, 'lineno', 1)}"
                self.problems.add("malformed XML", where, f"the XML cannot be parsed ({error})", LEFT_OUT_IMAGE)
        return documents

    def _pictures(self, documents: dict[str, _Document]) -> list[Picture]:
        folder = self._root / "JPEGImages"
        files = {file.stem: file for file in sorted(folder.iterdir(), reverse=True) if is_image(file)}
        return [
            Picture(image_id, files.get(image_id, folder / f"{image_id}.jpg"), str(document.path), document.size)
            for image_id, document in documents.items()
        ]

    def _annotations(self, document: _Document) -> Iterator[Annotation]:
        labels = {name: label for label, name in enumerate(self.classes.names)}
        for index, item in enumerate(document.objects, 1):
            where = f"{document.path}:{item.line} (object {index}, '{item.name}')"
            if item.fault:
                self.problems.add("malformed annotation", where, item.fault, LEFT_OUT_BOX)
            elif item.name not in labels:
                self.problems.add("unknown class", where, unknown_class(item.name, self.classes), LEFT_OUT_BOX)
            else:
                yield Annotation(as_box(item.box), labels[item.name], where, difficult=item.difficult)


@dataclass(frozen=True)
class _Object:
    """One <object>; `fault` says why its box cannot be read."""

    line: int
    name: str
    box: tuple[float, ...] = ()
    difficult: bool = False
    fault: str = ""


@dataclass(frozen=True)
class _Document:
    """What matters of one XML file; size is (height, width), None where the file does not give it."""

    path: Path
    size: tuple[int, int] | None
    objects: list[_Object]


@dataclass
class _Element:
    tag: str
    line: int
    text: str = ""
    children: list[_Element] = field(default_factory=list)

    def find(self, tag: str) -> _Element | None:
        return next((child for child in self.children if child.tag == tag), None)

    def value(self, tag: str) -> str:
        """The text of a child.

        Raises:
            ValueError: there is no such child.
        """
        child = self.find(tag)
        if child is None:
            raise ValueError(f"<{self.tag}> has no <{tag}>")
        return child.text.strip()


def _read_document(path: Path) -> _Document:
    root = _parse(path)
    size = root.find("size")
    try:
        height_width = (0, 0) if size is None else (int(size.value("height")), int(size.value("width")))
    except ValueError:
        height_width = (0, 0)  # some tools leave the size empty or at 0; the picture has it anyway
    objects = [_read_object(child) for child in root.children if child.tag == "object"]
    return _Document(path, None if 0 in height_width else height_width, objects)


def _read_object(element: _Element) -> _Object:
    name = ""
    try:
        name = element.value("name")
        bounds = element.find("bndbox")
        if bounds is None:
            raise ValueError("<object> has no <bndbox>")
        box = tuple(number(bounds.value(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = element.find("difficult")
        return _Object(element.line, name, box, difficult is not None and difficult.text.strip() == "1")
    except ValueError as error:
        return _Object(element.line, name, fault=str(error))


def _parse(path: Path) -> _Element:
    """The elements of an XML file with their lines, which the standard library's trees do not keep.

    Raises:
        ExpatError: the file is not well-formed; the error has the line.
    """
    top = _Element("", 0)
    open_elements = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        element = _Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        open_elements.pop()

    def characters(text: str) -> None:
        open_elements[-1].text += text

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, characters
    parser.Parse(path.read_bytes(), True)
    return top.children[0]
