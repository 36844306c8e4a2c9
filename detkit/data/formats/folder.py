"""Classification data with one folder per class, as for torchvision's ImageFolder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from detkit.data.dataset import (
    LEFT_OUT_IMAGE,
    FileDataset,
    ImageFile,
    check_root,
    checked_classes,
    missing_split,
    unknown_class,
)
from detkit.data.sources import is_image
from detkit.errors import DataError
from detkit.registry import datasets
from detkit.structures import ClassList, Target

_LAYOUT = "a folder for each split, and in it a folder of images for each class: train/cat/1.jpg"


@datasets.register("folder")
class Folder(FileDataset):
    """Images in SPLIT/CLASS/ and its subfolders. meta.image_id is the path relative to SPLIT, with slashes.

    Other files, and classes without images in this split, are counted in the report.

    Args:
        root: the folder of the splits.
        split: the folder of the classes.
        broken: the policy for images that cannot be read.
        class_names: the classes in the order of their labels; by default all folders in any split, sorted, so that all
            splits have the same list.

    Raises:
        DataError: the folder or split is missing or has no classes, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(f"The images in '{root}' (split '{split}')", broken)
        self.fields = frozenset({"image_labels"})
        splits = {folder.name: folder for folder in _folders(check_root(root, _LAYOUT))}
        if split not in splits:
            raise missing_split(split, Path(root) / split, splits)
        self._split = splits[split]
        names = class_names
        if names is None:
            names = tuple(sorted({folder.name for inner in splits.values() for folder in _folders(inner)}))
        if not names:
            raise DataError(f"The split '{splits[split]}' has no folders. Set data.root to a folder with {_LAYOUT}.")
        self.classes = checked_classes(lambda: ClassList.from_names(names), root)
        self._labels: list[int] = []
        images, labels = self._find()
        for image, size in self.check_images(images):
            self.add(image, size, ())
            self._labels.append(labels[image.image_id])
        self.finish()

    def target(self, index: int) -> Target:
        return replace(super().target(index), image_labels=torch.tensor([self._labels[index]]))

    def _find(self) -> tuple[list[ImageFile], dict[int | str, int]]:
        """Find the images of the split, sorted by path, and their labels by id."""
        found: list[ImageFile] = []
        labels: dict[int | str, int] = {}
        for path in sorted(self._split.iterdir()):
            if not path.is_dir():
                self.problems.add_harmless(
                    "file without a class", str(path), "it is not in the folder of a class", "skipped"
                )
            elif path.name not in self.classes.names:
                if not path.name.startswith("."):
                    self.problems.add(
                        "unknown class", str(path), unknown_class(path.name, self.classes), f"{LEFT_OUT_IMAGE}s"
                    )
            else:
                images = self._image_files(path)
                found += images
                labels |= {image.image_id: self.classes.names.index(path.name) for image in images}
        self._name_empty_classes(set(labels.values()))
        return found, labels

    def _image_files(self, folder: Path) -> list[ImageFile]:
        images = []
        for path in sorted(folder.rglob("*")):
            if is_image(path):
                images.append(ImageFile(path.relative_to(self._split).as_posix(), path, str(path)))
            elif path.is_dir() and path.is_symlink():
                self.problems.add_harmless(
                    "link to a folder", str(path), "links within a class are not followed", "skipped"
                )
            elif not path.is_dir():
                self.problems.add_harmless("file that is not an image", str(path), "by its suffix", "skipped")
        return images

    def _name_empty_classes(self, labels: set[int]) -> None:
        for label, name in enumerate(self.classes.names):
            if label not in labels:
                message = "there is no image of this class"
                self.problems.add_harmless("class without images", str(self._split / name), message, "kept")


def _folders(path: Path) -> Sequence[Path]:
    """Return the folders in a folder, except hidden ones."""
    return [item for item in sorted(path.iterdir()) if item.is_dir() and not item.name.startswith(".")]
