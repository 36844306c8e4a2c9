"""Pascal VOC: one XML file per image, with 1-based inclusive boxes."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    LEFT_OUT_IMAGE,
    Annotation,
    FileDataset,
    ImageFile,
    as_box,
    check_root,
    checked_classes,
    missing_split,
    read_lines,
)
from detkit.data.image import IMAGE_SUFFIXES
from detkit.data.parsing.classes import OtherClasses
from detkit.data.parsing.layouts import other_layout
from detkit.data.parsing.voc_xml import Document, XmlError, read_document
from detkit.errors import DataError
from detkit.registry import datasets
from detkit.structures import ClassList

_LAYOUT = "the folders Annotations, ImageSets/Main and JPEGImages"


@datasets.register("voc")
class Voc(FileDataset):
    """A data set in Pascal VOC's layout: Annotations/ID.xml, ImageSets/Main/SPLIT.txt, JPEGImages/ID.jpg (or .png ...).

    xmin and ymin are 1-based and reduced by 1; xmax and ymax are kept, since 1-based inclusive is 0-based exclusive.
    The image of an id is the file of that name in JPEGImages; <filename> decides between several (a.jpg and a.png), and
    is used if there is none. Annotations and JPEGImages may have subfolders: the id is then `sub/a`, or `a` if only one
    subfolder contains it. A split file of one class (aeroplane_train.txt) lists all its ids, including those with -1.
    meta.image_id is the id.

    Args:
        root: the folder with these three.
        split: a file in ImageSets/Main, without ".txt".
        broken: the policy for broken boxes and images.
        class_names: the classes in the order of their labels; by default all names in Annotations, sorted, so that all
            splits have the same list.
        other_classes: how to treat objects of classes that `class_names` does not list: "problem" applies `broken`,
            "drop" drops and counts them.

    Raises:
        DataError: a folder or split is missing or empty, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
        other_classes: OtherClasses = "problem",
    ) -> None:
        source = f"The VOC data in '{root}' (split '{split}')"
        super().__init__(source, broken, first_pixel=1, drop_others=other_classes == "drop")
        self._root = check_root(root, _LAYOUT)
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            if not (self._root / name).is_dir():
                raise DataError(
                    f"The VOC data in '{root}' has no folder '{name}'. Set data.root to a folder with {_LAYOUT}."
                    f"{other_layout(root, 'voc')}"
                )
        self._xmls = _Files(self._root / "Annotations", {".xml"})
        self._images = _Files(self._root / "JPEGImages")
        ids = self._ids(split)
        documents = self._documents(ids)
        found = {item.name for document in documents.values() for item in document.objects if item.name}
        if class_names is None:
            # Include the classes of other splits, so that labels agree.
            used = {file for image_id in ids for file in self._xmls.find(image_id)}
            others = (self._document(file) for file in self._xmls.files if file not in used)
            found |= {item.name for other in others if other for item in other.objects if item.name}
        names = sorted(found) if class_names is None else class_names
        self.classes = checked_classes(lambda: ClassList.from_names(names), f"{root}/Annotations")
        images = list(self._described_images(documents))
        for image, size in self.check_images(images):
            self.add(image, size, self._annotations(documents[str(image.image_id)]))
        self.finish()

    def _ids(self, split: str) -> list[str]:
        """Read the ids of a split in the order of its file."""
        folder = self._root / "ImageSets" / "Main"
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise missing_split(split, path, (file.stem for file in folder.glob("*.txt")))
        ids: dict[str, int] = {}
        lines = read_lines(path)
        for line, text in lines:
            image_id = self._id(text)
            if image_id in ids:
                message = f"the image '{image_id}' is already listed in line {ids[image_id]}"
                self.problems.add("duplicate image", f"{path}:{line}", message, LEFT_OUT_IMAGE)
            elif posixpath.isabs(image_id) or image_id.split("/")[0] == "..":
                message = f"the id '{image_id}' refers to a file outside the data folder"
                self.problems.add("path out of the data", f"{path}:{line}", message, LEFT_OUT_IMAGE)
            else:
                ids[image_id] = line
        if not lines:
            raise DataError(f"The split file '{path}' lists no images. Write one id per line.")
        self._count_unlisted(folder)
        return list(ids)

    def _id(self, text: str) -> str:
        """Parse the id in a line, which may have further columns of 1, 0 or -1, or a file suffix."""
        forms = [text]
        # Names may contain spaces, so the id is the longest form with an annotation file.
        while len(words := forms[-1].rsplit(maxsplit=1)) > 1 and words[1] in {"1", "0", "-1"}:
            forms.append(words[0])
        stems = (os.path.splitext(form) for form in forms)
        forms = [posixpath.normpath(form) for form in forms]
        forms += [posixpath.normpath(stem) for stem, ending in stems if ending.lower() in {*IMAGE_SUFFIXES, ".xml"}]
        return next((form for form in forms if self._xmls.find(form)), forms[-1])

    def _count_unlisted(self, folder: Path) -> None:
        """Count the annotation files that are not listed in any split."""
        lines = {text for file in folder.glob("*.txt") for _, text in read_lines(file)}
        listed = {file for text in lines for file in self._xmls.find(self._id(text))}
        if unlisted := [file for file in self._xmls.files if file not in listed]:
            remark = f"annotation file that is not listed in ImageSets/Main: not used (first: {unlisted[0]})"
            self.problems.remarks[remark] += len(unlisted)

    def _documents(self, ids: Iterable[str]) -> dict[str, Document]:
        """Read the annotations of images by id; images without readable annotations are recorded as problems."""
        documents = {}
        for image_id in ids:
            files = self._xmls.find(image_id) or [self._root / "Annotations" / f"{image_id}.xml"]
            if len(files) > 1:
                message = f"the image '{image_id}' has several annotation files: {_listed(files)}"
                self.problems.add("ambiguous annotation", str(files[0]), message, LEFT_OUT_IMAGE)
            elif (document := self._document(files[0], image_id)) is not None:
                documents[image_id] = document
        return documents

    def _document(self, file: Path, image_id: str = "") -> Document | None:
        try:
            document = read_document(file)
        except FileNotFoundError:
            message = f"the image '{image_id}' has no annotation file"
            self.problems.add("missing annotation", str(file), message, LEFT_OUT_IMAGE)
        except XmlError as error:
            self.problems.add("malformed XML", f"{file}:{error.line}", str(error), LEFT_OUT_IMAGE)
        else:
            if document.size_fault and image_id:
                self.problems.remarks["size in an XML file that is not a number: read from the image"] += 1
            return document
        return None

    def _described_images(self, documents: dict[str, Document]) -> Iterator[ImageFile]:
        for image_id, document in documents.items():
            files = self._image_files(image_id, document.filename)
            if len(files) > 1:
                message = f"the image '{image_id}' may be any of {_listed(files)}, and <filename> does not say which"
                self.problems.add("ambiguous image", str(document.path), message, LEFT_OUT_IMAGE)
            else:
                file = files[0] if files else self._root / "JPEGImages" / f"{image_id}.jpg"
                yield ImageFile(image_id, file, str(document.path), document.size)

    def _image_files(self, image_id: str, filename: str) -> list[Path]:
        """Find the files that may be the image of an id."""
        filename = filename.replace("\\", "/")
        files = self._images.find(image_id)
        for name in (filename, posixpath.basename(filename)):
            stem = os.path.splitext(name)[0]
            # Copied XML files have the <filename> of another image with its own annotation file.
            if not files and stem and not self._xmls.find(stem):
                files = self._images.find(stem)
        named = [file for file in files if file.name == posixpath.basename(filename)]
        readable = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        return named if len(named) == 1 else readable or files

    def _annotations(self, document: Document) -> Iterator[Annotation]:
        labels = {name: label for label, name in enumerate(self.classes.names)}
        for index, item in enumerate(document.objects, 1):
            where = f"{document.path}:{item.line} (object {index}, '{item.name}')"
            if item.fault:
                self.problems.add("malformed annotation", where, item.fault, LEFT_OUT_BOX)
            elif item.name not in labels:
                self.leave_out(item.name, where)
            else:
                box, label = as_box(item.box), labels[item.name]
                yield Annotation(box, label, where, difficult=item.difficult, rotation=item.rotation)


class _Files:
    """The files in a folder and its subfolders, except hidden ones, each folder once.

    Args:
        folder: the folder to search.
        endings: suffixes of the files to include; empty for all.
    """

    def __init__(self, folder: Path, endings: Iterable[str] = ()) -> None:
        self.files: list[Path] = []
        self._by_path: dict[str, list[Path]] = defaultdict(list)
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        visited: set[str] = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            folders[:] = sorted(name for name in folders if real not in visited and not name.startswith("."))
            for name in sorted(names) if real not in visited else ():
                stem, ending = os.path.splitext(name)
                if not name.startswith(".") and (not endings or ending.lower() in endings):
                    file = Path(parent, name)
                    self.files.append(file)
                    self._by_path[(file.parent.relative_to(folder) / stem).as_posix()].append(file)
                    self._by_name[stem].append(file)
            visited.add(real)

    def find(self, path: str) -> list[Path]:
        """Find the files of a path without suffix; a path without folder also matches files in subfolders."""
        return self._by_path.get(path) or ([] if "/" in path else self._by_name.get(path, []))


def _listed(files: Iterable[Path]) -> str:
    return ", ".join(f"'{file}'" for file in files)
