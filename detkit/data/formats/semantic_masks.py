"""Semantic segmentation data with a mask image per photograph, whose pixels are class indices: Pascal VOC
(SegmentationClass) and plain folders."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from detkit.data.dataset import (
    LEFT_OUT_IMAGE,
    FileDataset,
    ImageFile,
    check_root,
    checked_classes,
    missing_split,
    read_lines,
)
from detkit.data.image import IMAGE_SUFFIXES, check_image, open_image, stored_values
from detkit.data.semantic import names_with_background
from detkit.data.sources import is_image
from detkit.errors import DataError
from detkit.registry import datasets
from detkit.structures import IGNORED_PIXEL, ClassList, Target

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MODES = ("P", "L", "1", "I;16", "I")
"""Pillow's names for palettes, grey, black and white, and grey of more than 8 bits."""


class SemanticMasks(FileDataset):
    """Photographs with a mask of the same size each: a palette or grey PNG whose pixels are labels, or 255 if ignored.

    The sizes of masks are checked when the data set is opened; their pixels only for `broken` skip and repair, which
    leave out masks with a value that is not a class. Otherwise such a mask raises an error when it is read.
    """

    def __init__(self, source: str, broken: Literal["fail", "skip", "repair"], class_names: Sequence[str]) -> None:
        super().__init__(source, broken)
        self.fields = frozenset({"semantic"})
        self.classes = checked_classes(lambda: ClassList.from_names(class_names), "data.class_names")
        if not 1 <= len(self.classes) <= IGNORED_PIXEL:
            raise DataError(f"A semantic map supports 1 to {IGNORED_PIXEL} classes, but there are {len(class_names)}.")
        self._masks: list[Path] = []

    def target(self, index: int) -> Target:
        labels = read_labels(self._masks[index], self.classes)
        if labels.shape != self.size(index):
            raise DataError(f"The mask '{self._masks[index]}' has changed during the run. Start again.")
        return replace(Target.empty(), semantic=torch.from_numpy(labels))

    def add_all(self, pairs: Sequence[tuple[ImageFile, Path]]) -> None:
        """Add images with their masks, and apply the policy for broken data."""
        masks = {image.image_id: mask for image, mask in pairs}
        usable = self.check_images([image for image, _ in pairs])
        with ThreadPoolExecutor(max_workers=8) as pool:
            faults = pool.map(lambda item: self._fault(masks[item[0].image_id], item[1]), usable)
            for (image, size), fault in zip(usable, faults):
                mask = masks[image.image_id]
                if fault:
                    kind = "broken mask" if mask.is_file() else "missing mask"
                    self.problems.add(kind, str(mask), fault, LEFT_OUT_IMAGE)
                else:
                    self._masks.append(mask)
                    self.add(image, size, ())
        self.finish()

    def _fault(self, mask: Path, size: tuple[int, int]) -> str:
        """Describe the problem of a mask for an image of (height, width) `size`; empty if there is none."""
        try:
            found = check_image(mask, decode=False)
            if found != size:
                return f"the mask is {found[1]} x {found[0]} pixels, but its image {size[1]} x {size[0]}" + (
                    " (before its Exif rotation?)" if found == size[::-1] else ""
                )
            if self.problems.policy != "fail":
                read_labels(mask, self.classes)
        except DataError as error:
            return str(error).rstrip(".")
        return ""


@datasets.register("masks")
class MaskFolders(SemanticMasks):
    """Photographs and masks of the same names in two folders: `images/train/a.jpg` and `masks/train/a.png`.

    meta.image_id is the image's path relative to its folder, without suffix.

    Args:
        root: the folder that `images` and `annotations` are relative to.
        split: replaces {split} in these two.
        class_names: the classes in the order of the values in the masks, from 0.
        broken: the policy for broken images and masks.
        images: the folder of photographs, including subfolders.
        annotations: the folder of masks, with the same subfolders.

    Raises:
        DataError: a folder is missing or empty, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        class_names: tuple[str, ...],
        broken: Literal["fail", "skip", "repair"] = "fail",
        images: str = "images/{split}",
        annotations: str = "masks/{split}",
    ) -> None:
        super().__init__(f"The masks in '{root}' (split '{split}')", broken, class_names)
        top = check_root(root, f"the folders '{images}' and '{annotations}' (data.images, data.annotations)")
        folders = [top / option.replace("{split}", split) for option in (images, annotations)]
        for folder, option in zip(folders, ("images", "annotations")):
            if not folder.is_dir():
                beside = [path.name for path in folder.parent.glob("*") if path.is_dir()]
                raise DataError(
                    f"{missing_split(split, folder, beside)} Or set data.{option} to the folder below data.root; "
                    f"'{{split}}' in it becomes '{split}'."
                )
        pairs = []
        for file in self.images_of(folders[0]):
            name = file.relative_to(folders[0]).with_suffix("")
            mask = folders[1] / f"{name}.png"
            pairs.append((ImageFile(name.as_posix(), file, str(file)), mask))
        self.add_all(pairs)


@datasets.register("voc_segmentation")
class VocSegmentation(SemanticMasks):
    """Pascal VOC's semantic segmentation: JPEGImages/ID.jpg, SegmentationClass/ID.png with VOC's palette, and
    ImageSets/Segmentation/SPLIT.txt (ImageSets/Main/SPLIT.txt if there is no folder Segmentation).

    The border of 255 around objects is ignored. meta.image_id is the id.

    Args:
        root: the folder with these three, for example VOCdevkit/VOC2012.
        split: a list in ImageSets/Segmentation, without ".txt".
        broken: the policy for broken images and masks.
        class_names: the classes in the order of the values in the masks, where "background" for 0 may be left out; by
            default VOC's 20 and background.

    Raises:
        DataError: a folder or split is missing or empty, or something is broken and `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] = VOC_NAMES,
    ) -> None:
        super().__init__(f"The VOC data in '{root}' (split '{split}')", broken, names_with_background(class_names))
        layout = "the folders JPEGImages, SegmentationClass and ImageSets/Segmentation"
        top = check_root(root, layout)
        lists = top / "ImageSets" / "Segmentation"
        if not lists.is_dir():
            lists = top / "ImageSets" / "Main"
        for folder in (top / "JPEGImages", top / "SegmentationClass", lists):
            if not folder.is_dir():
                raise DataError(f"There is no folder '{folder}'. Set data.root to a folder with {layout}.")
        path = lists / f"{split}.txt"
        if not path.is_file():
            raise missing_split(split, path, (file.stem for file in lists.glob("*.txt")))
        files = {file.stem: file for file in sorted((top / "JPEGImages").iterdir(), reverse=True) if is_image(file)}
        pairs = []
        for line, text in read_lines(path):
            image_id = text[: -len(Path(text).suffix)] if Path(text).suffix.lower() in IMAGE_SUFFIXES else text
            file = files.get(image_id, top / "JPEGImages" / f"{image_id}.jpg")
            image = ImageFile(image_id, file, f"{path}:{line}")
            pairs.append((image, top / "SegmentationClass" / f"{image_id}.png"))
        self.add_all(pairs)


def read_labels(path: Path, classes: ClassList) -> np.ndarray:
    """Read the (H, W) uint8 labels of a mask, including IGNORED_PIXEL.

    Raises:
        DataError: it is not a grey or palette image, or a value is not a class; the message has the file and the pixel.
    """
    with open_image(path) as image:
        if image.mode not in MODES:
            raise DataError(
                f"The mask '{path}' is a colour image (mode {image.mode}), but its pixels must be class indices. "
                f"Convert it to grey or to a palette in which colour 0 is '{classes.names[0]}'."
            )
        values = stored_values(image)
    wrong = (values >= len(classes)) & (values != IGNORED_PIXEL) | (values < 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"The mask '{path}' has the value {int(values[row, column])} in row {row}, column {column} (from 0), but "
            f"there are {len(classes)} classes: {classes}. {IGNORED_PIXEL} means ignored. List all classes in "
            f"data.class_names, in the order of their values, or fix the mask."
        )
    return values.astype(np.uint8)
