"""Proposals from a file: both forms, and everything that does not fit the data set refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detkit.data.dataset import Dataset, Problems
from detkit.data.proposals.file import FileProposals
from detkit.errors import ConfigError, DataError
from detkit.structures import ClassList, Meta, Sample, Target


class Images(Dataset):
    """Black images with the ids and sizes that are given."""

    def __init__(self, sizes: dict[int | str, tuple[int, int]]) -> None:
        self.classes, self.fields = ClassList.from_names(["a"]), frozenset({"boxes", "labels"})
        self.problems = Problems("the images", "fail")
        self.images = list(sizes.items())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image_id, size = self.images[index]
        return Sample(np.zeros((*size, 3), np.uint8), Target.empty(), Meta(image_id, str(image_id), size))

    def target(self, index: int) -> Target:
        return Target.empty()

    def size(self, index: int) -> tuple[int, int]:
        return self.images[index][1]


DATA = Images({7: (40, 60), "b": (30, 30)})


def box(image_id: Any, values: list[Any], score: Any = 0.5) -> dict[str, Any]:
    return {"image_id": image_id, "bbox": values, "score": score}


GOOD = [
    box(7, [1, 2, 3, 4], 0.1),
    box("b", [0, 0, 30, 30], 0.3),
    box(7, [5.5, 6, 10, 10], 0.9),
    box(7, [20, 20, 5, 5], 0.1),
    box(7, [0, 0, 60, 40], 0.4),
]
IMAGES = [{"id": 7, "height": 40, "width": 60}, {"id": "b", "height": 30, "width": 30}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proposals_{split}.json"


def write(path: Path, content: Any) -> str:
    Path(str(path).replace("{split}", "val")).write_text(json.dumps(content))
    return str(path)


def proposals(source: FileProposals, index: int, data: Dataset = DATA) -> list[list[float]]:
    sample = data[index]
    found = source(sample.image, sample.meta.image_id)
    assert found.dtype == torch.float32
    assert found.shape[1] == 4
    return found.tolist()


@pytest.mark.parametrize("content", [GOOD, {"images": IMAGES, "proposals": GOOD}], ids=["list", "with images"])
def test_the_best_come_first_and_equal_ones_in_the_order_of_the_file(path: Path, content: Any) -> None:
    source = FileProposals(write(path, content), "val")
    line = source.check(DATA)
    assert line.startswith("5 proposals from")
    assert line.endswith("mean 2 per image, 0 images without; 0 clipped to their image, 0 outside it left out")
    assert proposals(source, 0) == [[5.5, 6, 15.5, 16], [0, 0, 60, 40], [1, 2, 4, 6], [20, 20, 25, 25]]
    assert proposals(source, 1) == [[0, 0, 30, 30]]


def test_many_images_equal_a_plain_loop(path: Path) -> None:
    random = np.random.default_rng(0)
    data = Images(dict.fromkeys(range(40), (50, 70)))
    entries = [
        box(int(number), [*random.uniform(0, 40, 2).tolist(), *random.uniform(1, 10, 2).tolist()], round(score, 1))
        for number, score in zip(random.integers(0, 40, 3000), random.uniform(0, 1, 3000))
    ]
    source = FileProposals(write(path, entries), "val", count=50)
    source.check(data)
    for index in range(40):
        mine = sorted((e for e in entries if e["image_id"] == index), key=lambda entry: -entry["score"])[:50]
        expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (e["bbox"] for e in mine)])
        assert torch.equal(torch.tensor(proposals(source, index, data)), expected)


def test_boxes_are_cut_to_their_image_and_counted(path: Path) -> None:
    entries = [
        box(7, [-5, -5, 20, 20], 0.9),
        box(7, [100, 0, 5, 5], 0.8),
        box(7, [60, 0, 5, 5], 0.7),
        box(7, [50, 30, 100, 100], 0.6),
        box("b", [-9, -9, 9, 9], 0.5),
    ]
    source = FileProposals(write(path, entries), "val")
    line = source.check(DATA)
    assert "2 proposals from" in line
    assert "1 image without; 2 clipped to their image, 3 outside it left out" in line
    assert proposals(source, 0) == [[0, 0, 15, 15], [50, 30, 60, 40]]
    assert proposals(source, 1) == []
    best = FileProposals(write(path, entries), "val", count=1)
    assert "1 proposals from" in best.check(DATA)
    assert proposals(best, 0) == [[0, 0, 15, 15]]
    # One that lies outside does not use up the place of one that counts.
    second = FileProposals(write(path, entries[1:]), "val", count=1)
    assert proposals(second, 0) == [[50, 30, 60, 40]]


def test_a_listed_image_may_have_none(path: Path) -> None:
    source = FileProposals(write(path, {"images": IMAGES, "proposals": GOOD[:1]}), "val")
    assert "1 image without" in source.check(DATA)
    assert proposals(source, 1) == []
    nothing = FileProposals(write(path, {"images": IMAGES, "proposals": []}), "val")
    assert "2 images without" in nothing.check(DATA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*GOOD, box(8, [0, 0, 1, 1]), box(9, [0, 0, 1, 1])], r"2 images of the file are not in .* first: 8"),
        ([*GOOD, box("7", [0, 0, 1, 1])], r"1 image of the file is not in .* first: '7'\).* ids such as 7"),
        (GOOD[:1], r"1 image of the data set is not in the file .*first: 'b'.*'images'"),
        ([], "2 images of the data set are not in the file"),
        ({"images": IMAGES[:1], "proposals": GOOD[:1]}, r"1 image of the data set is not in the file .*'b'"),
        ({"images": [*IMAGES, {"id": 9, "height": 1, "width": 1}], "proposals": GOOD}, r"of the file is not in .*: 9"),
        (
            {"images": [{"id": 7, "height": 60, "width": 40}, IMAGES[1]], "proposals": GOOD},
            r"1 image has another size .* first: 7\)\. The first is \(60, 40\) in the file, \(40, 60\) in the data",
        ),
    ],
)
def test_a_file_of_other_images_is_refused(path: Path, content: Any, message: str) -> None:
    source = FileProposals(write(path, content), "val")
    with pytest.raises(DataError, match=message) as caught:
        source.check(DATA)
    assert "proposals_val.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*GOOD, box(7, [0, 0, 0, 5]), box(7, [0, 0, 5, -1])], r"2 with no width or height\. The first is number 5"),
        (
            [*GOOD, box(7, [float("nan"), 0, 5, 5]), box(7, [1, 1, 0, 1])],
            r"1 with a number that is not finite, 1 with no width.*number 5, of the image 7: bbox \[nan",
        ),
        ([box(7, [1e300, 0, 1, 1])], "not finite"),
        ([box(7, [0, 0, 5, 5], float("inf"))], r"not finite.*score inf"),
        ([box(7, [0, 0, None, 5])], r"number 0 is malformed \('bbox' and 'score' are \[0, 0, None, 5\] and"),
        ([box(7, [0, 0, True, 5])], r"number 0 is malformed \('bbox' and 'score' are \[0, 0, True, 5\] and"),
        ([box(7, [0, 0, "5", 5])], "number 0 is malformed"),
        ([box(7, [0, 0, 10**400, 5])], "number 0 is malformed"),
        ([box(7, [0, 0, 5, 5], "0.5")], r"number 0 is malformed .* and '0\.5'\)"),
        ([GOOD[0], {"image_id": 7, "bbox": [1, 2, 3, 4]}], r"number 1 is malformed \(it has no 'score'\)"),
        ([box(7, [1, 2, 3])], "number 0 is malformed"),
        ([box(7, [1, 2, 3, 4, 5])], "number 0 is malformed"),
        ([box(7, 5)], "number 0 is malformed"),
        ([box(None, [1, 2, 3, 4])], r"number 0 is malformed .*'image_id' must be a whole number or text"),
        ([box(7.5, [1, 2, 3, 4])], r"number 0 is malformed .* but is 7\.5"),
        ([box(True, [1, 2, 3, 4])], "number 0 is malformed .* but is True"),
        ([3], "number 0 is malformed .* must be an object with keys and values, but is 3"),
        ({"images": IMAGES}, "contains no proposals"),
        ("text", "contains no proposals"),
        ({"images": [{"id": 7}], "proposals": []}, r"images\[0\] is malformed \(it has no 'height'\)"),
        (
            {"images": [IMAGES[0] | {"height": "40"}], "proposals": []},
            "'height' must be a whole number, but is '40'",
        ),
        ({"images": [IMAGES[0] | {"width": float("inf")}], "proposals": []}, "'width' must be a whole number"),
        ({"images": [7], "proposals": []}, r"images\[0\] is malformed .* object with keys and values"),
        ({"images": [IMAGES[0], IMAGES[0]], "proposals": []}, r"images\[1\] has the same id 7 as an earlier one"),
        ({"images": IMAGES[1:], "proposals": GOOD}, r"1 images that are not in its list 'images' \(the first: 7\)"),
    ],
)
def test_what_cannot_be_used_is_refused(path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        FileProposals(write(path, content), "val")
    assert "proposals_val.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of proposals '.*proposals_train\.json'.*proposals\.path"):
        FileProposals(write(path, GOOD), "train")
    (tmp_path / "proposals_val.json").write_text('[{"image_id": 1,\n}]')
    with pytest.raises(DataError, match=r"proposals_val\.json' is not valid JSON: .* line 2"):
        FileProposals(str(path), "val")
    (tmp_path / "proposals_val.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="is not UTF-8"):
        FileProposals(str(path), "val")
    (tmp_path / "proposals_val.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match=r"proposals_val\.json' is nested too deeply"):
        FileProposals(str(path), "val")
    (tmp_path / "proposals_val.json").write_bytes(b"[" + b"1" * 5000 + b"]")
    with pytest.raises(DataError, match=r"proposals_val\.json' is not valid JSON"):
        FileProposals(str(path), "val")
    with pytest.raises(ConfigError, match=r"'proposals\.count' must be at least 1"):
        FileProposals(write(path, GOOD), "val", count=0)


def test_an_image_that_was_not_checked_is_refused(path: Path) -> None:
    source = FileProposals(write(path, GOOD), "val")
    with pytest.raises(DataError, match="has no proposals for the image 99"):
        source(np.zeros((5, 5, 3), np.uint8), 99)
