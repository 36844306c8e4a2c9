"""COCO: one JSON file per split, boxes as xywh, masks as polygons or run lengths."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from detkit.data.dataset import (
    LEFT_OUT_BOX,
    LEFT_OUT_IMAGE,
    Annotation,
    FileDataset,
    ImageFile,
    check_root,
    missing_split,
    rotation_of,
)
from detkit.data.masks import rle_from_coco
from detkit.data.parsing.classes import ClassMap, OtherClasses
from detkit.data.parsing.json_values import finite, finite_list, identifier, reason_of, short, whole
from detkit.data.parsing.keypoints import keypoint_names, parse_keypoints
from detkit.data.parsing.layouts import other_layout
from detkit.data.points import flip_pairs_of
from detkit.errors import DataError
from detkit.io.files import read_json
from detkit.registry import datasets

LARGEST_AREA = 1e10
"""Square pixels: the largest object that the COCO metrics consider; no image is larger."""


@datasets.register("coco")
class Coco(FileDataset):
    """A data set in COCO's layout: a JSON file of images, categories and annotations, and a folder of images.

    Sorted category ids become the labels 0..C-1 and are kept as raw ids; meta.image_id is the image's id. Crowd regions
    set Target.crowd. Images without annotations are kept as background. Annotations without an area get that of their
    box. Images without file_name are found by their coco_url, as in LVIS. Category 0 of Roboflow's files, which only
    groups the others, is dropped, unless `class_names` lists it or an object has it.

    Args:
        root: the folder that `annotations` and `images` are relative to.
        split: replaces {split} in these two.
        broken: the policy for broken boxes and images.
        class_names: the classes in the order of their labels; by default all categories by id.
        masks: read segmentations.
        semantic: create semantic maps from segmentations: smaller objects over larger ones, crowd regions ignored, and
            "background" elsewhere, which becomes the first class unless it is a category.
        merge_classes: merge categories of the same name into one class with the smallest of their ids.
        other_classes: how to treat objects of categories that `class_names` does not list: "problem" applies `broken`,
            "drop" drops and counts them.
        points: read keypoints. Points whose names differ in left and right are swapped when an image is mirrored.
        annotations: the JSON file.
        images: the folder that file_name is relative to.

    Raises:
        DataError: a file or folder is missing, the JSON is malformed or has no images, or something is broken and
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
        merge_classes: bool = False,
        other_classes: OtherClasses = "problem",
    ) -> None:
        source = f"The COCO data in '{root}' (split '{split}')"
        drop = other_classes == "drop"
        super().__init__(source, broken, masks, semantic=semantic, points=points, drop_others=drop)
        folder = check_root(root, f"the file '{annotations}' and the folder '{images}' (data.annotations, data.images)")
        self._json = folder / annotations.replace("{split}", split)
        if not self._json.is_file():
            if not (available := _splits(folder, annotations)):
                files = sorted(str(file.relative_to(folder)) for file in folder.glob("**/*.json"))[:10]
                raise DataError(
                    f"There is no annotation file '{self._json}' of the split '{split}'. Set data.annotations, now "
                    f"'{annotations}', and data.images, now '{images}', to your files below '{root}'; '{{split}}' in "
                    f"them becomes '{split}'. JSON files there: {', '.join(files) or '(none)'}."
                    f"{other_layout(root, 'coco')}"
                )
            raise missing_split(split, self._json, available)
        image_folder = folder / images.replace("{split}", split)
        if not image_folder.is_dir():
            raise DataError(
                f"The folder of images '{image_folder}' does not exist. Set data.images to the folder below data.root "
                f"that the file names in '{self._json}' are relative to; '{{split}}' in it becomes '{split}'."
            )
        content = _load(self._json)
        declared = self._without_group(self._declared(content["categories"]), content, class_names or ())
        self._classes = ClassMap(declared, str(self._json), class_names, merge_classes, semantic)
        self.classes = self._classes.classes
        if points:
            names = keypoint_names(content["categories"], str(self._json))
            self._points, self.flip_pairs = len(names), flip_pairs_of(names)
        photos = self._image_files(content["images"], image_folder)
        usable = self.check_images(photos)
        by_image = self._by_image(content["annotations"], {image.image_id for image in photos})
        for image, size in usable:
            self.add(image, size, self._annotations(by_image[image.image_id], image, size))
        self.finish()

    def _declared(self, categories: list[Any]) -> list[tuple[int, str]]:
        """Return the id and name of each category, sorted by id."""
        pairs = []
        for position, category in enumerate(categories):
            try:
                if not isinstance(category["name"], str):
                    raise ValueError(f"'name' must be text, but is {short(category['name'])}")
                pairs.append((whole(category["id"], "'id'"), category["name"]))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{self._json}, categories[{position}]: the category has no valid 'id' and 'name' "
                    f'({reason_of(error, category)}). Write each as {{"id": 1, "name": "person"}}.'
                ) from None
        return sorted(pairs)

    def _without_group(
        self, declared: list[tuple[int, str]], content: dict[str, list[Any]], chosen: Sequence[str]
    ) -> list[tuple[int, str]]:
        """Remove Roboflow's first category, the supercategory of the others, which has no objects."""
        categories = content["categories"]
        root = next((item for item in categories if item["id"] == 0 and item.get("supercategory") == "none"), None)
        if root is None:
            return declared
        name = root["name"]
        groups = any(item.get("supercategory") == name for item in categories)
        used = any(isinstance(entry, dict) and entry.get("category_id") == 0 for entry in content["annotations"])
        wanted = name in chosen and [other for _, other in declared].count(name) == 1
        if used or wanted or not groups:
            return declared
        self.problems.remarks[f"category '{name}' (id 0) without objects that only groups the others: left out"] += 1
        return [pair for pair in declared if pair[0] != 0]

    def _image_files(self, images: list[Any], folder: Path) -> list[ImageFile]:
        photos = []
        for position, image in enumerate(images):
            where = f"{self._json}, images[{position}]"
            try:
                image_id, path = identifier(image["id"], "'id'"), _path(image, folder)
                size = (_side(image, "height"), _side(image, "width"))
            except (KeyError, TypeError, ValueError) as error:
                message = f"it needs a valid 'id' and 'file_name' ({reason_of(error, image)})"
                self.problems.add("malformed image entry", where, message, LEFT_OUT_IMAGE)
                continue
            where = f"{where} (id {short(image_id)}, '{path.name}')"
            photos.append(ImageFile(image_id, path, where, None if 0 in size else size))
        return photos

    def _by_image(self, annotations: list[Any], image_ids: set[int | str]) -> dict[int | str, list[Any]]:
        """Group the annotations by image, as (where, entry)."""
        by_image: dict[int | str, list[Any]] = defaultdict(list)
        for position, entry in enumerate(annotations):
            where = f"{self._json}, annotations[{position}]"
            try:
                image_id = identifier(entry["image_id"], "'image_id'")
            except (KeyError, TypeError, ValueError) as error:
                self.problems.add("malformed annotation", where, reason_of(error, entry), LEFT_OUT_BOX)
                continue
            where = f"{where} (id {short(entry.get('id'))})"
            if image_id in image_ids:
                by_image[image_id].append((where, entry))
            else:
                message = f"there is no image with its image_id {short(image_id)}"
                self.problems.add("unknown image", where, message, LEFT_OUT_BOX)
        return by_image

    def _annotations(
        self, entries: list[tuple[str, dict[str, Any]]], image: ImageFile, size: tuple[int, int]
    ) -> Iterator[Annotation]:
        for where, entry in entries:
            where = f"{where} of '{image.path.name}'"
            try:
                raw_id = whole(entry.get("category_id"), "'category_id'")
            except ValueError as error:
                self.problems.add("malformed annotation", where, str(error), LEFT_OUT_BOX)
                continue
            if raw_id in self._classes.labels:
                annotation = self._annotation(entry, self._classes.labels[raw_id], where, size)
                if annotation is not None:
                    yield annotation
            elif raw_id in self._classes.names:
                self.leave_out(self._classes.names[raw_id], where)
            else:
                message = f"there is no category with its category_id {short(raw_id)}; there are: {self.classes}"
                self.problems.add("unknown category", where, message, LEFT_OUT_BOX)

    def _annotation(self, entry: dict[str, Any], label: int, where: str, size: tuple[int, int]) -> Annotation | None:
        try:
            x, y, width, height = finite_list(entry.get("bbox"), 4, "'bbox' must be [x, y, width, height]")
            area, crowd = _area(entry.get("area")), _flag(entry.get("iscrowd"))
            attributes = entry.get("attributes")  # of CVAT
            rotation = rotation_of(attributes.get("rotation") or 0) if isinstance(attributes, dict) else 0.0
        except ValueError as error:
            self.problems.add("malformed annotation", where, str(error), LEFT_OUT_BOX)
            return None
        mask = None
        if self.fields & {"masks", "semantic"}:
            try:
                mask = rle_from_coco(entry.get("segmentation"), size)
            except ValueError as error:
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
                message = f"{outside} of its points are outside the image"
                self.problems.add("point outside the image", where, message, "treated as not visible")
        box = (x, y, x + width, y + height)
        unread = (entry.get("segmentation"), entry.get("keypoints"))
        return Annotation(
            box, label, where, crowd=crowd, area=area, mask=mask, points=points, rotation=rotation, unread=unread
        )


def _load(path: Path) -> dict[str, list[Any]]:
    """Read the three lists of a COCO file."""
    content = read_json(path, "COCO annotation file", allow_nan=True)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"The file '{path}' has no list '{key}', so it is not a COCO annotation file, which has the lists "
                f"images, annotations and categories."
            )
    return content


def _path(image: dict[str, Any], folder: Path) -> Path:
    """Return the file of an entry of 'images'.

    Raises:
        KeyError, ValueError: the entry does not contain it.
    """
    name = image.get("file_name")
    if name is None and isinstance(url := image.get("coco_url"), str):
        # As in LVIS: .../train2017/000000391895.jpg, where images of the val split may be from COCO's train2017.
        name = "/".join(url.split("/")[-2:])
        if "\0" in name or not (folder / name).is_file():
            name = name.rpartition("/")[2]
    if name is None:
        raise KeyError("file_name")
    if not isinstance(name, str) or not name.strip("/. ") or "\0" in name:
        raise ValueError(f"'file_name' must be the path of a file, but is {short(name)}")
    return folder / name


def _side(image: dict[str, Any], key: str) -> int:
    """Return the height or width of an entry of 'images'; 0 if it is missing."""
    value = 0 if image.get(key) is None else whole(image[key], f"'{key}'")
    if value < 0:
        raise ValueError(f"'{key}' must be above 0, but is {short(value)}")
    return value


def _area(value: object) -> float | None:
    if value is None:
        return None
    try:
        area = finite(value)
    except ValueError as error:
        raise ValueError(f"'area' must be in square pixels, but {error}") from None
    if not 0 <= area <= LARGEST_AREA:
        raise ValueError(f"'area' must be in 0..{LARGEST_AREA:g} square pixels, but is {area:g}")
    return area


def _flag(value: object) -> bool:
    """Parse COCO's iscrowd, which some programs write as true or false."""
    if value is None:
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"'iscrowd' must be 0 or 1, but is {short(value)}")
    return bool(value)


def _splits(folder: Path, annotations: str) -> list[str]:
    """Return the splits that have an annotation file."""
    template = str(folder / annotations)
    before, _, after = template.partition("{split}")
    files = glob.glob(f"{glob.escape(before)}*{after.replace('{split}', '*')}")
    found = (re.match(re.escape(before) + "(.+?)" + re.escape(after.partition("{split}")[0]), file) for file in files)
    return [match[1] for match in found if match]
