"""The word on what a folder seems to hold, through the messages of the formats it is not for."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from detkit.data.splits import open_split
from detkit.errors import ConfigError, DataError

LAYOUTS = {
    "coco": ("annotations/instances_train.json",),
    "voc": ("Annotations/a.xml", "ImageSets/Main/train.txt", "JPEGImages/a.jpg"),
    "yolo": ("my.yaml", "train/labels/a.txt"),
}


def folder(root: Path, name: str) -> Path:
    for file in LAYOUTS.get(name, ()):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def message(asked: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_split({"name": asked, "root": str(root)}, "train", frozenset({"boxes"}))
    return str(caught.value)


@pytest.mark.parametrize(("asked", "there"), permutations(LAYOUTS, 2))
def test_a_folder_of_another_format_is_named(asked: str, there: str, tmp_path: Path) -> None:
    said = message(asked, folder(tmp_path, there))
    assert said.endswith(f"It looks like data of the format {there}: --data '{{name: {there}, root: \"{tmp_path}\"}}'.")


@pytest.mark.parametrize("asked", LAYOUTS)
def test_nothing_is_said_of_a_folder_of_no_format(asked: str, tmp_path: Path) -> None:
    assert "looks like" not in message(asked, tmp_path)


def test_options_of_the_data_inside_are_pointed_to() -> None:
    options: dict[str, Any] = {"name": "crops", "root": "here", "data": {"name": "shapes"}}
    with pytest.raises(ConfigError, match=r"'data\.root' is not an option .* write 'data\.data\.root'"):
        open_split(options, "train", frozenset({"boxes"}))
