"""Images that stand twice in a split or in both splits, and objects that stand twice in an image."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data.duplicates import identical
from detkit.data.formats.coco import Coco
from detkit.data.image import check_image
from detkit.data.splits import open_train_and_val
from detkit.errors import ConfigError, DataError

BOXES = frozenset({"boxes"})


def save(path: Path, seed: int, size: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco(root: Path, split: str, images: dict[int, str], boxes: dict[int, list[Any]] | None = None) -> None:
    """A COCO split whose images lie in `root`; each has one box unless `boxes` says otherwise."""
    annotations = [
        {"id": number, "image_id": image_id, "category_id": 1, "bbox": box, "iscrowd": 0}
        for number, (image_id, box) in enumerate(
            (image_id, box) for image_id in images for box in (boxes or {}).get(image_id, [[1, 2, 10, 12]])
        )
    ]
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images.items()],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def options(root: Path, **more: Any) -> dict[str, Any]:
    return {"name": "coco", "root": str(root), "images": ".", **more}


def test_files_are_told_apart_by_size_ends_and_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    middle = content[:10_000] + b"!" + content[10_001:]
    for name, data in (("a", content), ("b", middle), ("c", content), ("d", content[:-1]), ("e", content[::-1])):
        (tmp_path / name).write_bytes(data)
    os.link(tmp_path / "b", tmp_path / "f")
    (tmp_path / "g").symlink_to(tmp_path / "d")
    paths = [tmp_path / name for name in "abcdefg"] + [tmp_path / "none", tmp_path, "\0"]
    assert identical(paths) == [[0, 2], [1, 5], [3, 6]]
    assert identical(paths, border=3) == [[1, 5]]
    assert identical(paths, border=5) == [[1, 5], [3, 6]]


def test_images_of_one_colour_are_no_copies_but_one_file_is_one_file(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (20, 20), (3, 4, 5)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    assert identical(paths[:2]) == []
    assert identical([paths[0], paths[2]]) == [[0, 1]]


@pytest.mark.parametrize("kind", ["same path", "dotted path", "copy", "hard link", "symbolic link", "other ending"])
def test_an_image_of_both_splits_is_refused_unless_allowed(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a.png", 0)
    save(tmp_path / "b.png", 1)
    (tmp_path / "sub").mkdir()
    names = {"same path": "a.png", "dotted path": "sub/../a.png", "other ending": "sub/z.jpg"}
    name = names.get(kind, "sub/z.png")
    other = tmp_path / name
    if kind in ("copy", "other ending"):
        other.write_bytes((tmp_path / "a.png").read_bytes())
    elif kind == "hard link":
        os.link(tmp_path / "a.png", other)
    elif kind == "symbolic link":
        other.symlink_to(tmp_path / "a.png")
    coco(tmp_path, "train", {1: "a.png"})
    coco(tmp_path, "val", {7: "b.png", 8: name})
    copy = r"which has the same content as '.*a\.png', " if kind != "same path" else ""
    with pytest.raises(
        DataError, match=rf"1 image of the validation split is in .*{copy}for example.*data\.allow_leaks"
    ):
        open_train_and_val(options(tmp_path), BOXES)
    train, val = open_train_and_val(options(tmp_path, allow_leaks=True), BOXES)
    assert (len(train), len(val)) == (1, 2)


def test_splits_without_a_common_image_pass_and_equal_sizes_do_not_matter(tmp_path: Path) -> None:
    for number in range(4):
        Image.fromarray(np.full((40, 60, 3), number, dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
    coco(tmp_path, "train", {1: "0.bmp", 2: "1.bmp"})
    coco(tmp_path, "val", {1: "2.bmp", 2: "3.bmp"})
    assert len(open_train_and_val(options(tmp_path), BOXES)) == 2


def test_one_split_for_both_is_refused_unless_allowed(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    coco(tmp_path, "train", {1: "a.png"})
    with pytest.raises(ConfigError, match=r"both name the split 'train'.*data\.allow_leaks to true"):
        open_train_and_val(options(tmp_path, val="train"), BOXES)
    train, val = open_train_and_val(options(tmp_path, val="train", allow_leaks=True), BOXES)
    assert train.image_id(0) == val.image_id(0)
    with pytest.raises(ConfigError, match=r"'data\.allow_leaks' must be true or false, but is 'yes'"):
        open_train_and_val(options(tmp_path, val="train", allow_leaks="yes"), BOXES)


def test_crops_of_one_image_in_both_splits_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    for split in ("train", "val"):
        coco(tmp_path, split, {1: "a.png"})
    crops = {"name": "crops", "data": options(tmp_path)}
    with pytest.raises(DataError, match=r"1 image of the validation split .*a\.png', for example"):
        open_train_and_val(crops, frozenset({"image_labels"}))


@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub/../a.png"])
def test_one_file_under_two_ids_is_a_problem(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png", 0)
    (tmp_path / "sub").mkdir()
    coco(tmp_path, "train", {1: "a.png", 2: name})
    with pytest.raises(DataError, match=r"1 x duplicate image.*images\[1\] .*is also that of the image 1"):
        Coco(str(tmp_path), "train", images=".")
    data = Coco(str(tmp_path), "train", images=".", broken="repair")
    assert [data.image_id(index) for index in range(len(data))] == [1]


def test_a_copy_within_a_split_is_counted_and_kept(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(save(tmp_path / "a.png", 0).read_bytes())
    coco(tmp_path, "train", {1: "a.png", 2: "b.png"})
    data = Coco(str(tmp_path), "train", images=".")
    assert len(data) == 2
    assert "1 x copy of an image: kept: it counts twice (first: " in data.problems.summary()
    assert data.problems.found[0].harmless


def test_an_object_that_stands_twice_counts_once(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    box, other = [1, 2, 10, 12], [1, 2, 10, 13]
    coco(tmp_path, "train", {1: "a.png"}, {1: [box, other, box, box]})
    data = Coco(str(tmp_path), "train", images=".")
    assert data.target(0).boxes.tolist() == [[1, 2, 11, 14], [1, 2, 11, 15]]
    assert "2 x duplicate object: left out the box" in data.problems.summary()


@pytest.mark.parametrize(
    "change",
    [
        {"iscrowd": 1},
        {"area": 5},
        {"segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"bbox": [1, 2, 10, 12.5]},
        {"keypoints": []},
    ],
)
def test_objects_that_differ_in_anything_are_two(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path / "a.png", 0)
    box = [1, 2, 10, 12]
    coco(tmp_path, "train", {1: "a.png"}, {1: [box, box]})
    file = tmp_path / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][1].update(change)
    file.write_text(json.dumps(content))
    data = Coco(str(tmp_path), "train", images=".")
    assert len(data.target(0)) == 2
    assert data.problems.found == []


def test_an_image_that_a_list_repeats_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", 0)
    coco(tmp_path, "train", {1: "a.png", 2: "./a.png", 3: "none.png", 4: "x/../a.png"})
    read = []
    monkeypatch.setattr(
        "detkit.data.dataset.check_image",
        lambda path, *rest: (read.append(os.path.normpath(path)), check_image(path, *rest))[1],
    )
    data = Coco(split="train", broken="repair", root=str(tmp_path), images=".")
    assert sorted(read) == [str(tmp_path / "a.png"), str(tmp_path / "none.png")]
    found = data.problems.found
    assert [problem.kind for problem in found] == ["duplicate image", "missing image", "duplicate image"]
    assert "also that of the image 1" in found[0].message
