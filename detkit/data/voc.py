"""Pascal VOC: one XML file for each picture, boxes counted from 1 with the last pixel inclusive."""

from __future__ import annotations

from collections.abc import Iterator
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
    unknown_class,
)
from detkit.data.image import IMAGE_SUFFIXES, is_image
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
                )
        documents = self._documents(self._ids(split), every=class_names is None)
        names = class_names if class_names is not None else _class_names(documents)
        self.classes = checked_classes(lambda: ClassList.from_names(names), f"{root}/Annotations")
        usable = self.check_pictures(self._pictures(split, documents))
        for picture, size in usable:
            self.add(picture, size, self._annotations(documents[str(picture.image_id)]))
        self.finish()

    def _ids(self, split: str) -> dict[str, int]:
        """The ids of a split, each with its line in the split's file."""
        folder = self._root / "ImageSets" / "Main"
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise missing_split(split, path, (file.stem for file in folder.glob("*.txt")))
        ids: dict[str, int] = {}
        for line, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not text.strip():
                continue
            image_id = self._id(text.strip())
            if image_id in ids:
                where = f"{path}:{line}"
                self.problems.add("duplicate image", where, f"the image '{image_id}' stands here twice", LEFT_OUT_IMAGE)
            ids.setdefault(image_id, line)
        if not ids:
            raise DataError(f"The split file '{path}' lists no images. Write one id on each line.")
        return ids

    def _id(self, text: str) -> str:
        """The id in a line, which may have a second column (1, 0 or -1) or a file's ending."""
        if Path(text).suffix.lower() in IMAGE_SUFFIXES:
            text = text[: -len(Path(text).suffix)]
        words = text.split()
        # A name may hold a space itself, so that the second column is one only where the whole line names no file.
        if words[-1] in {"1", "0", "-1"} and len(words) > 1 and not self._xml(text).is_file():
            return text[: -len(words[-1])].rstrip()
        return text

    def _xml(self, image_id: str) -> Path:
        return self._root / "Annotations" / f"{image_id}.xml"

    def _documents(self, ids: dict[str, int], every: bool) -> dict[str, _Element]:
        """The parsed annotations of the split by id, in its order; with `every`, then those of all other pictures."""
        documents: dict[str, _Element] = {}
        others = sorted(file.stem for file in (self._root / "Annotations").glob("*.xml")) if every else []
        for image_id in [*ids, *(other for other in others if other not in ids)]:
            path = self._xml(image_id)
            try:
                documents[image_id] = _parse(path)
            except FileNotFoundError:
                self.problems.add(
                    "missing annotation", str(path), f"the image '{image_id}' has no annotation file", LEFT_OUT_IMAGE
                )
            except (expat.ExpatError, LookupError) as error:
                line = getattr(error, "lineno", 1)
                self.problems.add("malformed XML", f"{path}:{line}", f"it cannot be parsed ({error})", LEFT_OUT_IMAGE)
        for image_id in [*documents]:
            documents[image_id].wanted = image_id in ids
        return documents

    def _pictures(self, split: str, documents: dict[str, _Element]) -> list[Picture]:
        folder = self._root / "JPEGImages"
        files = {file.stem: file for file in sorted(folder.iterdir(), reverse=True) if is_image(file)}
        return [
            Picture(image_id, files.get(image_id, folder / f"{image_id}.jpg"), str(self._xml(image_id)), _size(document))
            for image_id, document in documents.items()
            if document.wanted
        ]
