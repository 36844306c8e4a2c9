"""COCO: one JSON file for each split, boxes as xywh, masks as polygons or run lengths."""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    LEFT_OUT_IMAGE,
    Annotation,
    FileDataset,
    Picture,
    check_root,
    checked_classes,
    fixed_classes,
    missing_split,
    number,
    unknown_class,
)
from detkit.data.keypoints import keypoint_names, parse_keypoints
from detkit.data.layouts import other_layout
from detkit.data.masks import rle_from_coco
from detkit.data.points import flip_pairs_of
from detkit.data.semantic import names_with_background, with_background
from detkit.errors import DataError
from detkit.registry import datasets
from detkit.types import ClassList


@datasets.register("coco")
class Coco(FileDataset):
    """A data set in COCO's layout: a JSON file of images, categories and annotations, and a folder of pictures.

    Category ids, sorted, become the labels 0..C-1 and stay as raw ids; meta.image_id is the image's id. Crowd regions
    carry Target.crowd. An image without annotations is kept as background. An annotation without an area has
    that of its box.

    Args:
        root: the folder that `annotations` and `images` start from.
        split: put in place of {split} in these two.
        broken: what to do with broken boxes and pictures.
        class_names: the classes in the order of their labels; by default all categories by id.
        masks: read segmentations.
        semantic: make semantic maps of segmentations: the smaller objects over the larger ones, crowd regions not
            counted, and "background" for all else, which becomes the first class unless it is a category already.
        points: read keypoints. Points whose names differ in left and right change places where a picture is mirrored.
        annotations: the JSON file.
        images: the folder that file_name starts from.

    Raises:
        DataError: a file or folder is missing, the JSON malformed or without images, or something is broken and
            `broken` is "fail".
    """

    def __init__(
        self,
        root: str,
        split: str,
        broken: Literal["fail", "skip", "repair"] = "fail",
        class_names: tuple[str, ...] | None = None,
        masks: bool = False,
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        semantic: bool = False,
        points: bool = False,
    ) -> None:
        source = f"The COCO data in '{root}' (split '{split}')"
        super().__init__(source, broken, masks, semantic=semantic, points=points)
        folder = check_root(root, f"the file '{annotations}' and the folder '{images}' (data.annotations, data.images)")
        self._json = folder / annotations.replace("{split}", split)
        if not self._json.is_file():
            if not (available := _splits(folder, annotations)):
                files = sorted(str(file.relative_to(folder)) for file in folder.glob("**/*.json"))[:10]
                raise DataError(
                    f"There is no annotation file '{self._json}' of the split '{split}'. Set data.annotations, now "
                    f"'{annotations}', and data.images, now '{images}', to where yours lie below '{root}'; '{{split}}' "
                    f"in them becomes '{split}'. JSON files there: {', '.join(files) or '(none)'}."
                    f"{other_layout(root, 'coco')}"
                )
            raise missing_split(split, self._json, available)
        image_folder = folder / images.replace("{split}", split)
        if not image_folder.is_dir():
            raise DataError(
                f"The folder of pictures '{image_folder}' does not exist. Set data.images to the folder, below "
                f"data.root, that the file names in '{self._json}' start from; '{{split}}' in it becomes '{split}'."
            )
        content = _load(self._json)
        declared = self._declared(content["categories"])
        if semantic:
            declared = with_background(declared)
            class_names = None if class_names is None else names_with_background(class_names)
        self.classes = declared if class_names is None else fixed_classes(class_names, declared, str(self._json))
        if points:
            names = keypoint_names(content["categories"], str(self._json))
            self._points, self.flip_pairs = len(names), flip_pairs_of(names)
        self._declared_names = dict(zip(declared.raw_ids, declared.names))
        pictures = self._pictures(content["images"], image_folder)
        usable = self.check_pictures(pictures)
        by_image = self._by_image(content["annotations"], {picture.image_id for picture in pictures})
        for picture, size in usable:
            self.add(picture, size, self._annotations(by_image[picture.image_id], picture, size))
        self.finish()

    def _declared(self, categories: list[dict[str, Any]]) -> ClassList:
        try:
            pairs = sorted((int(category["id"]), str(category["name"])) for category in categories)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"The file '{self._json}' has a category without a usable 'id' and 'name' ({error!r}). "
                f'Write each as {{"id": 1, "name": "person"}}.'
            ) from error
        ids, names = tuple(raw_id for raw_id, _ in pairs), tuple(name for _, name in pairs)
        return checked_classes(lambda: ClassList(names, ids), str(self._json))

    def _pictures(self, images: list[dict[str, Any]], folder: Path) -> list[Picture]:
        pictures = []
        for position, image in enumerate(images):
            where = f"{self._json}, images[{position}]"
            try:
                name, image_id = image["file_name"], image["id"]
                if not isinstance(image_id, int | str) or not isinstance(name, str):
                    raise TypeError("'id' must be a whole number or a text, and 'file_name' a text")
                size = (int(image.get("height") or 0), int(image.get("width") or 0))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self.problems.add(
                    "malformed image entry", where, f"it needs 'id' and 'file_name' ({error!r})", LEFT_OUT_IMAGE
                )
                continue
            where = f"{where} (id {image_id}, '{name}')"
            pictures.append(Picture(image_id, folder / name, where, None if 0 in size else size))
        return pictures

    def _by_image(self, annotations: list[dict[str, Any]], image_ids: set[int | str]) -> dict[int | str, list[Any]]:
        """The annotations of each image, as (where, entry)."""
        by_image: dict[int | str, list[Any]] = defaultdict(list)
        for position, entry in enumerate(annotations):
            where = f"{self._json}, annotations[{position}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
                self.problems.add("malformed annotation", where, "it has no 'image_id'", LEFT_OUT_BOX)
                continue
            where = f"{where} (id {entry.get('id')})"
            if entry["image_id"] in image_ids:
                by_image[entry["image_id"]].append((where, entry))
            else:
                message = f"there is no image with its image_id {entry['image_id']!r}"
                self.problems.add("unknown image", where, message, LEFT_OUT_BOX)
        return by_image

    def _annotations(
        self, entries: list[tuple[str, dict[str, Any]]], picture: Picture, size: tuple[int, int]
    ) -> Iterator[Annotation]:
        labels = {raw_id: label for label, raw_id in enumerate(self.classes.raw_ids)}
        for where, entry in entries:
            where = f"{where} of '{picture.path.name}'"
            raw_id = entry.get("category_id")
            if not isinstance(raw_id, int):
                message = f"'category_id' must be a whole number, but it is {raw_id!r}"
                self.problems.add("malformed annotation", where, message, LEFT_OUT_BOX)
            elif raw_id in labels:
                annotation = self._annotation(entry, labels[raw_id], where, size)
                if annotation is not None:
                    yield annotation
            elif raw_id in self._declared_names:
                message = unknown_class(self._declared_names[raw_id], self.classes)
                self.problems.add("unknown class", where, message, LEFT_OUT_BOX)
            else:
                message = f"there is no category with its category_id {raw_id!r}; there are: {self.classes}"
                self.problems.add("unknown category", where, message, LEFT_OUT_BOX)

    def _annotation(self, entry: dict[str, Any], label: int, where: str, size: tuple[int, int]) -> Annotation | None:
        try:
            box = entry.get("bbox")
            if not isinstance(box, list) or len(box) != 4:
                raise ValueError(f"'bbox' must be [x, y, width, height], but it is {box!r}")
            x, y, width, height = (number(value) for value in box)
            area = None if entry.get("area") is None else number(entry["area"])
            crowd = bool(entry.get("iscrowd", 0))
        except ValueError as error:
            self.problems.add("malformed annotation", where, str(error), LEFT_OUT_BOX)
            return None
        mask = None
        if self.fields & {"masks", "semantic"}:
            try:
                mask = rle_from_coco(entry.get("segmentation"), size)
            except (ValueError, TypeError) as error:
                self.problems.add("malformed mask", where, str(error), LEFT_OUT_BOX)
                return None
        points = None
        if "points" in self.fields:
            try:
                points, outside = parse_keypoints(entry, self._points, size)
            except ValueError as error:
                self.problems.add("malformed keypoints", where, str(error), LEFT_OUT_BOX)
                return None
            if outside:
                message = f"{outside} of its points lie outside the image"
                self.problems.add("point outside the image", where, message, "taken as not visible")
        box = (x, y, x + width, y + height)
        return Annotation(box, label, where, crowd=crowd, area=area, mask=mask, points=points)


def _load(path: Path) -> dict[str, list[Any]]:
    """The three lists of a COCO file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: the JSON cannot be parsed, column {error.colno}: {error.msg}. Mend the file, or "
            f"export it again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file '{path}' is not UTF-8 text ({error}). Export it again as JSON.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"The file '{path}' has no list '{key}', so it is not a COCO annotation file. It needs the lists "
                f"images, annotations and categories."
            )
    return content


def _splits(folder: Path, annotations: str) -> list[str]:
    """The splits for which there is an annotation file."""
    template = str(folder / annotations)
    before, _, after = template.partition("{split}")
    files = glob.glob(f"{glob.escape(before)}*{after.replace('{split}', '*')}")
    found = (re.match(re.escape(before) + "(.+?)" + re.escape(after.partition("{split}")[0]), file) for file in files)
    return [match[1] for match in found if match]
