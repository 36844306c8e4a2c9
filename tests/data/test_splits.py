"""Both splits of a data set: the same classes by name, whatever their numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.cli import main
from detkit.data.dataset_wrapper import in_order
from detkit.data.splits import open_split, open_train_and_val
from detkit.errors import DataError
from detkit.structures import Detections
from detkit.tasks.detection.metrics import DetectionEvaluator

CAT, DOG = {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def write(root: Path, split: str, categories: list[dict], names: list[str]) -> None:
    """One image with an object of each name, beside one another."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / split).mkdir()
    pixels = np.random.default_rng(len(list(root.iterdir()))).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / split / "1.png")
    ids = {category["name"]: category["id"] for category in categories}
    annotations = [
        {"id": n, "image_id": 1, "category_id": ids[name], "bbox": [20 * n, 10, 15, 20], "segmentation": SQUARE}
        for n, name in enumerate(names)
    ]
    images = [{"id": 1, "file_name": "1.png"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def exchanged(tmp_path: Path) -> dict:
    """train numbers cat 1 and dog 2, val the other way round."""
    write(tmp_path, "train", [CAT, DOG], ["cat", "dog", "dog"])
    write(tmp_path, "val", [CAT | {"id": 2}, DOG | {"id": 1}], ["cat", "dog", "dog"])
    return {"name": "coco", "root": str(tmp_path)}


@pytest.mark.parametrize("options", [{}, {"class_names": ["cat", "dog"]}])
def test_classes_are_mapped_by_name(exchanged: dict, options: dict) -> None:
    train, val = open_train_and_val(exchanged | options, frozenset({"masks"}))
    assert train.classes.names == val.classes.names == ("cat", "dog")
    assert (train.classes.raw_ids, val.classes.raw_ids) == ((1, 2), (2, 1))
    assert train.target(0).labels.tolist() == val.target(0).labels.tolist() == [0, 1, 1]
    assert val[0].target.labels.tolist() == [0, 1, 1]
    assert val[0].target.masks.shape == (3, 60, 80)  # type: ignore[union-attr]


def test_scores_and_results_of_the_mapped_split_have_its_own_ids(exchanged: dict) -> None:
    _, val = open_train_and_val(exchanged, frozenset())
    target = val.target(0)
    evaluator = DetectionEvaluator(val.classes)
    evaluator.update([Detections(target.boxes, target.area / 1000, target.labels)], [target], [val[0].meta])
    assert evaluator.compute().coco["mAP"] == pytest.approx(1)
    content = json.loads((Path(exchanged["root"]) / "annotations/instances_val.json").read_text())
    expected = [entry["category_id"] for entry in content["annotations"]]
    assert [record["category_id"] for record in evaluator.results()] == expected


def test_semantic_maps_are_mapped_by_name(tmp_path: Path) -> None:
    write(tmp_path, "train", [CAT, DOG], ["cat", "dog"])
    write(tmp_path, "val", [CAT | {"id": 2}, DOG | {"id": 1}], ["cat", "dog"])
    data = {"name": "coco", "root": str(tmp_path)}
    train, val = open_train_and_val(data, frozenset({"semantic"}))
    assert val.classes.names == train.classes.names == ("background", "cat", "dog")
    assert val.classes.raw_ids == (0, 2, 1)
    first, second = train.target(0).semantic, val.target(0).semantic
    assert first is not None
    assert second is not None
    assert first.dtype == second.dtype
    assert first.equal(second)
    assert len(first.unique()) > 1


def test_crops_are_mapped_by_name(exchanged: dict) -> None:
    train, val = open_train_and_val({"name": "crops", "data": exchanged}, frozenset({"image_labels"}))
    labels = [[data.target(n).image_labels.tolist() for n in range(3)] for data in (train, val)]  # type: ignore[union-attr]
    assert labels == [[[0], [1], [1]], [[0], [1], [1]]]


def test_other_classes_are_an_error_whose_remedy_works(tmp_path: Path) -> None:
    bird = {"id": 3, "name": "bird"}
    write(tmp_path, "train", [CAT, DOG, bird], ["cat", "bird"])
    write(tmp_path, "val", [{"id": 9, "name": "cow"}, DOG, CAT], ["dog", "cow"])
    data = {"name": "coco", "root": str(tmp_path)}
    remedy = r"data\.class_names: \[cat, dog\] and data\.other_classes: drop"
    with pytest.raises(DataError, match=rf"Only in training: bird; only in validation: cow\..*{remedy}"):
        open_train_and_val(data, frozenset())
    train, val = open_train_and_val(data | {"class_names": ["cat", "dog"], "other_classes": "drop"}, frozenset())
    assert (train.target(0).labels.tolist(), val.target(0).labels.tolist()) == ([0], [1])
    write(tmp_path, "none", [{"id": 9, "name": "cow"}], ["cow"])
    with pytest.raises(DataError, match=r"Declare the same classes in the files of both\.$"):
        open_train_and_val(data | {"val": "none"}, frozenset())


def test_a_data_set_of_other_classes_is_left_as_it_is(exchanged: dict) -> None:
    dataset = open_split(exchanged, "val", frozenset())
    assert in_order(dataset, ["dog", "cat"]) is dataset
    assert in_order(dataset, ["cat"]) is dataset
    assert in_order(dataset, ["cat", "cow"]) is dataset


def test_check_takes_the_classes_by_name_too(exchanged: dict, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": exchanged, "backbone": {"name": "vgg"}, "head": {"name": "ssd"}}))
    assert main(["check", str(config)]) == 0
