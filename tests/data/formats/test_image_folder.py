"""Images without ground truth: found, split, and broken ones never silent."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.splits import open_split, open_train_and_val
from detkit.errors import ConfigError, DataError
from detkit.registry import datasets
from detkit.tasks.drawing import write_image

NOTHING: frozenset[str] = frozenset()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images in two folders and a text."""
    for number in range(10):
        folder = ("a", "b")[number % 2]
        write_image(tmp_path / folder / f"{number}.png", np.full((6 + number, 8, 3), number, dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_for_each_split(photos: Path) -> None:
    data = {"name": "images", "root": str(photos), "train": "a", "val": "b"}
    train, val = open_train_and_val(data, NOTHING)
    assert [train.image_id(index) for index in range(5)] == [f"a/{number}.png" for number in (0, 2, 4, 6, 8)]
    assert [val[index].size for index in range(5)] == [(6 + number, 8) for number in (1, 3, 5, 7, 9)]
    assert len(train.classes) == len(train[0].target) == 0


@pytest.mark.parametrize(("fraction", "count"), [(0.3, 3), (0.001, 1), (0.999, 9)])
def test_a_fraction_splits_all_images_the_same_way_every_time(photos: Path, fraction: float, count: int) -> None:
    data = {"name": "images", "root": str(photos), "val_fraction": fraction}
    train, val = open_train_and_val(data, NOTHING)
    again = open_split(data, "val", NOTHING)
    ids = [{dataset.image_id(index) for index in range(len(dataset))} for dataset in (train, val, again)]
    assert len(ids[1]) == count
    assert ids[1] == ids[2]
    assert ids[0] | ids[1] == {f"{'ab'[number % 2]}/{number}.png" for number in range(10)}
    assert not ids[0] & ids[1]


def test_a_pattern_names_the_images(photos: Path) -> None:
    root = str(photos / "*" / "[0-3].png")
    train, val = open_train_and_val({"name": "images", "root": root, "val_fraction": 0.5}, NOTHING)
    assert len(train) == len(val) == 2


def test_broken_images_stop_the_run_or_are_counted(photos: Path) -> None:
    (photos / "a" / "0.png").write_bytes((photos / "a" / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"1 x unreadable image.*0\.png"):
        datasets.build({"name": "images", "root": str(photos)}, "data", split="a")
    rest = datasets.build({"name": "images", "root": str(photos), "broken": "skip"}, "data", split="a")
    assert len(rest) == 4
    assert "1 x unreadable image: left out the image" in rest.problems.summary()


def test_mistakes_are_named(photos: Path) -> None:
    build = {"name": "images", "root": str(photos)}
    with pytest.raises(DataError, match=r"no split 'c'.*Valid: a, b"):
        datasets.build(build, "data", split="c")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        datasets.build({**build, "val_fraction": 1.0}, "data", split="val")
    with pytest.raises(ConfigError, match="this one is 'a'"):
        datasets.build({**build, "val_fraction": 0.1}, "data", split="a")
    with pytest.raises(DataError, match="one image"):
        datasets.build({**build, "root": str(photos / "a" / "2.png"), "val_fraction": 0.1}, "data", split="val")
    with pytest.raises(DataError, match="does not exist"):
        datasets.build({**build, "root": str(photos / "nowhere")}, "data", split="train")
    with pytest.raises(DataError, match="The head needs boxes"):
        open_split({**build, "train": "a"}, "train", frozenset({"boxes"}))


def test_other_files_and_dark_images_have_a_line_in_the_report(photos: Path) -> None:
    (photos / "video.mp4").write_bytes(b"x")
    Image.fromarray(np.full((5, 5), 4000, dtype=np.uint16)).save(photos / "a" / "12_bits.png")
    data = {"name": "images", "root": str(photos), "val_fraction": 0.5}
    lines = [dataset.problems.summary() for dataset in open_train_and_val(data, NOTHING)]
    assert all("files that are not images: 1 (.txt)" in line and "1 (.mp4)" in line for line in lines)
    assert sum("1 x dark 16-bit image: kept as it is" in line and "12_bits.png" in line for line in lines) == 1
