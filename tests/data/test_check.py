"""`detkit check` sees what training sees, and the reasons why nothing is left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.cli import main
from detkit.data.check import check
from detkit.data.dataset import check_box, fingerprint_change, number, rotation_of, upright
from detkit.data.dataset_wrapper import DatasetWrapper
from detkit.data.formats.coco import Coco
from detkit.data.formats.crops import Crops
from detkit.data.splits import open_train_and_val
from detkit.errors import ConfigError, DataError

BOXES = frozenset({"boxes"})


def split(root: Path, name: str, boxes: list[dict[str, Any]], categories: tuple[str, ...] = ("cat",)) -> dict[str, Any]:
    """A COCO split of one image of 80 x 60 pixels; returns the options to open it."""
    root.mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{name}.png")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], **box} for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": f"{name}.png"}],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": text, "keypoints": ["left_eye", "right_eye"]} for i, text in enumerate(categories, 1)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return {"name": "coco", "root": str(root), "images": "."}


POLYGON = [[1, 2, 11, 2, 11, 14]]
BAD = [
    ({"segmentation": [[1, 2]]}, "masks", "malformed mask"),
    ({"keypoints": [1, 2]}, "points", "malformed keypoints"),
    ({"segmentation": None}, "semantic", "malformed mask"),
]


@pytest.mark.parametrize(("broken", "field", "kind"), BAD)
def test_check_reads_what_the_head_needs(tmp_path: Path, capsys: Any, broken: Any, field: str, kind: str) -> None:
    sound = {"segmentation": POLYGON, "keypoints": [2, 3, 2, 4, 5, 2], "bbox": [2, 2, 10, 12]}
    data = split(tmp_path, "train", [sound, {**sound, "bbox": [3, 3, 10, 12], **broken}])
    split(tmp_path, "val", [sound])
    assert check(data, BOXES) == 0
    assert check(data, BOXES | {field}) == 1
    assert kind in capsys.readouterr().out
    with pytest.raises(DataError, match=f"1 x {kind}"):
        open_train_and_val(data, BOXES | {field})


def test_check_counts_crowds_masks_points_and_rounding(tmp_path: Path, capsys: Any) -> None:
    sound = {"segmentation": POLYGON, "keypoints": [2, 3, 2, 4, 5, 0]}
    data = split(tmp_path, "train", [sound, {**sound, "iscrowd": 1, "bbox": [-0.5, 2, 10, 12]}])
    split(tmp_path, "val", [sound])
    assert check(data, BOXES | {"masks", "points"}) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "2 objects, 1 crowd regions, 2 masks, 2 with points, 2 visible points" in output
    assert "1 x box outside the image by a rounding error: clipped" in output


def test_check_compares_the_splits_as_training_does(tmp_path: Path) -> None:
    data = split(tmp_path, "train", [{}])
    split(tmp_path, "val", [{}], ("cat", "dog"))
    for open_both in (check, open_train_and_val):
        with pytest.raises(DataError, match="disagree on the classes"):
            open_both(data, BOXES)
    assert check(data, BOXES, open_set=True) == 0


def test_check_refuses_images_of_both_splits_and_what_the_task_refuses(tmp_path: Path) -> None:
    data = split(tmp_path, "train", [{}])
    split(tmp_path, "val", [{}])
    (tmp_path / "val.png").write_bytes((tmp_path / "train.png").read_bytes())
    with pytest.raises(DataError, match="1 image of the validation split"):
        check(data, BOXES)
    asked = []
    assert check({**data, "allow_leaks": True}, BOXES, check_data=lambda dataset, name: asked.append(name)) == 0
    assert asked == ["train", "val"]


def test_harmless_problems_are_told_from_those_that_the_policy_decides_on(tmp_path: Path, capsys: Any) -> None:
    data = split(tmp_path, "train", [{}, {}, {"bbox": [1, 2, 0, 3]}])
    split(tmp_path, "val", [{}])
    assert check(data, BOXES) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "-> left out the box" in output
    assert "-> repair: left out the box" in output


def test_check_does_not_fail_for_what_training_goes_on_with(tmp_path: Path, capsys: Any) -> None:
    data = split(tmp_path, "train", [{}, {}])
    split(tmp_path, "val", [{}])
    config = tmp_path / "check.yaml"
    config.write_text(f"{{data: {json.dumps(data)}, backbone: {{name: small_ssd}}, head: {{name: ssd}}}}")
    assert main(["check", str(config)]) == 0
    assert "duplicate object" in capsys.readouterr().out
    split(tmp_path, "train", [{}, {}, {"bbox": [1, 2, 0, 3]}])
    assert main(["check", str(config)]) == 1
    assert "1 problem found, listed above. With data.broken = fail, as set in this config, training stops at them" in (
        capsys.readouterr().err
    )


def test_classes_without_an_object_are_named(tmp_path: Path, capsys: Any) -> None:
    data = split(tmp_path, "train", [{"segmentation": POLYGON}], ("cat", "dog", "cow"))
    split(tmp_path, "val", [{}], ("cat", "dog", "cow"))
    remark = "2 x class without an object in this split: dog, cow"
    assert check(data, BOXES) == 0
    assert capsys.readouterr().out.count(remark) == 2
    options = {"root": data["root"], "images": "."}
    chosen = Coco(split="train", class_names=("dog",), other_classes="drop", **options)
    assert "1 x class without an object in this split: dog" in chosen.problems.summary()
    assert remark in Coco(split="train", semantic=True, **options).problems.summary()  # "background" is no object
    with pytest.raises(ConfigError, match=r"'data\.class_names' is empty"):
        check({**data, "class_names": []}, BOXES)
    many = tuple(f"class {number}" for number in range(13))
    split(tmp_path, "train", [{}], many)
    assert Coco(split="train", **options).problems.summary().endswith("class 9, class 10 ...")


@pytest.mark.parametrize("policy", ["skip", "repair"])
def test_the_reasons_are_named_where_no_image_is_left(tmp_path: Path, policy: Any) -> None:
    split(tmp_path, "train", [{}])
    file = tmp_path / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["images"] = [{"id": number, "name": f"{number}.jpg"} for number in range(3)]
    file.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"no image left\. Fix the files: 3 x malformed image entry: .*images\[0\].*file_name"
    ):
        Coco(str(tmp_path), "train", policy, images=".")
    content["images"] = [{"id": 1, "file_name": "none.png"}, {"id": 2, "file_name": "neither.png"}, {}]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"2 x missing image: .*none\.png.*; 1 x malformed image entry: .*images\[2\]"):
        Coco(str(tmp_path), "train", policy, images=".")


def test_a_split_that_lists_nothing_says_so(tmp_path: Path) -> None:
    split(tmp_path, "train", [])
    file = tmp_path / "annotations/instances_train.json"
    file.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match=r"has no images\. Give a split that lists some"):
        Coco(str(tmp_path), "train", "repair", images=".")


def test_the_fingerprint_changes_with_the_content_alone(tmp_path: Path) -> None:
    split(tmp_path / "a", "train", [{}, {"bbox": [1, 2, 3, 4]}])
    split(tmp_path / "b", "train", [{}, {"bbox": [1, 2, 3, 4]}])
    first, moved = (Coco(str(tmp_path / name), "train", images=".") for name in "ab")
    before = json.loads(json.dumps(first.fingerprint()))
    assert fingerprint_change(before, moved.fingerprint()) == ""
    assert fingerprint_change(before, DatasetWrapper(moved).fingerprint()) == ""
    split(tmp_path / "b", "train", [{}, {"bbox": [1, 2, 3, 5]}])
    assert "other images, sizes, boxes" in fingerprint_change(
        before, Coco(str(tmp_path / "b"), "train", images=".").fingerprint()
    )
    split(tmp_path / "b", "train", [{}], ("dog",))
    change = fingerprint_change(before, Coco(str(tmp_path / "b"), "train", images=".").fingerprint())
    assert change == "1 objects instead of 2 and the classes dog instead of cat"
    crops = Crops("train", {"name": "coco", "root": str(tmp_path / "a"), "images": "."}).fingerprint()
    assert (crops["images"], crops["objects"]) == (2, 2)


@pytest.mark.parametrize("text", ["1_000", "0x10", "\uff11", "", " ", "12,5", "one", True, None, [1], "1e", 10**400])
def test_what_is_not_a_number(text: object) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        number(text)


@pytest.mark.parametrize("text", ["1e400", "nan", "-inf", float("nan")])
def test_numbers_that_are_not_finite_are_named_in_boxes_and_rotations(text: Any) -> None:
    assert check_box((0, 0, 5, number(text)), (10, 10)).kind == "not a number"
    with pytest.raises(ValueError, match="not a finite number of degrees"):
        rotation_of(text)


@pytest.mark.parametrize(
    ("degrees", "first_pixel", "expected"),
    [
        (90, 0, (30, 0, 50, 40)),
        (-90, 0, (30, 0, 50, 40)),
        (180, 0, (20, 10, 60, 30)),
        (45, 0, (40 - 30 / 2**0.5, 20 - 30 / 2**0.5, 40 + 30 / 2**0.5, 20 + 30 / 2**0.5)),
        (450, 0, (30, 0, 50, 40)),
        (90, 1, (31, 1, 50, 40)),
    ],
)
def test_the_upright_box_around_a_rotated_one(degrees: float, first_pixel: int, expected: Any) -> None:
    box = (20 + first_pixel, 10 + first_pixel, 60, 30)
    assert upright(box, degrees, first_pixel) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rotation", "expected"), [(90.0, [10, 5, 30, 35]), ("450", [10, 5, 30, 35]), (0, None), (None, None)]
)
def test_boxes_rotated_in_cvat_are_read_upright_from_coco(tmp_path: Path, rotation: Any, expected: Any) -> None:
    split(tmp_path, "train", [{"bbox": [5, 10, 30, 20], "attributes": {"occluded": False, "rotation": rotation}}])
    data = Coco(str(tmp_path), "train", images=".")
    assert data.target(0).boxes[0].tolist() == pytest.approx(expected or [5, 10, 35, 30])
    assert data.problems.remarks.total() == (expected is not None)


@pytest.mark.parametrize("rotation", ["left", [90], True, "1e999"])
def test_a_rotation_that_is_not_a_number_is_a_problem(tmp_path: Path, rotation: Any) -> None:
    split(tmp_path, "train", [{"attributes": {"rotation": rotation}}])
    with pytest.raises(DataError, match=r"1 x malformed annotation.*number"):
        Coco(str(tmp_path), "train", images=".")
