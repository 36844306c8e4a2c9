"""What surrounds classifiers: refused data, lines for people, images, and whole runs by the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import detkit
from detkit.cli import main
from detkit.data.dataset import Problems
from detkit.engine.train import train
from detkit.errors import ConfigError, DataError
from detkit.registry import heads, tasks
from detkit.structures import Classification, ClassList, Meta, Target
from detkit.tasks.classification.drawing import draw_classes, draw_classification, draw_confusion

CROPS = ("--data", "{name: crops, data: {name: shapes, train_count: 6, val_count: 4, size: 64}}")
CLASSIFY = ("--head", "{name: classify}", "--augment", "[{name: random_resized_crop}, {name: flip}]")
NAMES = ("RBC", "WBC", "血小板")


def prediction(*scores: float) -> Classification:
    return Classification(torch.tensor(scores), NAMES[: len(scores)])


def test_the_best_guesses_are_described() -> None:
    task = tasks.build({"name": "classify"}, "head")
    assert task.describe(prediction(0.013, 0.98)) == "WBC 0.98, RBC 0.01"
    assert task.describe(prediction(0.001, 0.999)) == "WBC 1.00"
    assert task.describe(Classification(torch.tensor([0.001, 0.002]))) == "1 0.00"
    classes = ClassList.from_names(NAMES[:2])
    record = task.records(prediction(0.25, 0.75), Meta("a#1", "a", (5, 5)), classes)
    assert record == [{"image_id": "a#1", "scores": {"RBC": 0.25, "WBC": 0.75}}]


@pytest.mark.parametrize("size", [(40, 30), (400, 600)])
def test_guesses_stand_below_the_image_whatever_its_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    before = image.copy()
    plain = draw_classification(image, prediction(0.6, 0.3, 0.1))
    judged = draw_classification(image, prediction(0.6, 0.3, 0.1), [0], "ground truth: RBC")
    assert np.array_equal(image, before)
    for drawn in (plain, judged, draw_classes(image, NAMES), draw_classes(image, [])):
        left = (drawn.shape[1] - size[1]) // 2
        assert np.array_equal(drawn[: size[0], left : left + size[1]], image)
        assert drawn.shape[0] > size[0]
        assert drawn[size[0] :].max() > 200  # there is text
    assert judged.shape[0] > plain.shape[0]
    colors = {tuple(pixel) for pixel in judged[size[0] :].reshape(-1, 3).tolist()}
    assert {(120, 230, 120), (255, 130, 120)} <= colors
    assert not {(120, 230, 120), (255, 130, 120)} & {tuple(p) for p in plain[size[0] :].reshape(-1, 3).tolist()}


@pytest.mark.parametrize("count", [2, 15, 90])
def test_a_confusion_matrix_is_an_image_of_any_number_of_classes(count: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 9, (count, count))
    confusion[0] = 0  # no image of this class
    drawn = draw_confusion(confusion, [f"class {label}" for label in range(count)])
    assert drawn.dtype == np.uint8
    assert drawn.shape[2] == 3
    assert 300 < drawn.shape[0] < 2000


def test_several_classes_are_refused_at_the_start_and_named(tiny: Any) -> None:
    with pytest.raises(DataError, match=r"'\d+' shows \d classes.*head\.multi_label"):
        train(tiny(*CLASSIFY))


def test_data_without_any_class_are_refused() -> None:
    task = tasks.build({"name": "classify"}, "head")

    class Empty(list):
        problems = Problems("data", "fail")

        def target(self, index: int) -> Target:
            return replace(Target.empty(), image_labels=torch.zeros(0, dtype=torch.int64))

    with pytest.raises(DataError, match="No image of the split 'val' has a class"):
        task.check_data(Empty([1, 2]), "val")


def test_mixed_images_have_no_class(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"mixes images .*random_resized_crop"):
        train(tiny(*CROPS, "--head", "{name: classify}", "--augment", "[{name: mosaic}]"))


def test_figures_fit_the_head() -> None:
    task = tasks.build({"name": "classify"}, "head")

    def figures(classes: int, **options: bool) -> tuple[str, ...]:
        head = heads.build({"name": "classify", **options}, "head", channels=(4,), strides=(8,), num_classes=classes)
        return task.figures(head)

    assert figures(5) == ("top1", "mean_recall")
    assert figures(6) == ("top1", "top5", "mean_recall")
    assert figures(6, multi_label=True) == ("mAP", "mean_F1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return call


def test_train_then_eval_then_infer(run: Callable[..., str], tiny_config: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, value in (("dark", 10), ("light", 240)):
            for number in range(4):
                path = tmp_path / "data" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((40, 50, 3), value + number, dtype=np.uint8)).save(path)
    data = f'{{name: folder, root: "{tmp_path / "data"}"}}'
    output = run("train", tiny_config, "--data", data, *CLASSIFY, "--train.epochs", "20", "--train.lr", "0.05")
    folder = tmp_path / "runs" / "classify" / "tiny"
    assert "top1 1.000" in output
    assert (folder / "images" / "confusion_matrix.png").is_file()
    output = run("eval", folder, "--save-json", tmp_path / "found.json")
    assert "8 classifications" in output
    assert "true class (row)" in output
    assert len(json.loads((tmp_path / "found.json").read_text())) == 8
    output = run("infer", folder, "--source", tmp_path / "data" / "val" / "dark", "--output", tmp_path / "out")
    assert "0.png: dark" in output
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [record["image_id"] for record in records] == [0, 1, 2, 3]
    assert all(sum(record["scores"].values()) == pytest.approx(1) for record in records)
    found = detkit.load(folder).predict(np.full((30, 30, 3), 250, dtype=np.uint8))
    assert found.class_names[int(found.scores.argmax())] == "light"


def test_classes_of_detection_data_are_learnt_without_boxes(tiny: Any) -> None:
    folder = train(tiny("--head", "{name: classify, multi_label: true}", "--augment", "[{name: flip}]"))
    header = folder.metrics.read_text().splitlines()[0]
    assert header.endswith("mAP,mean_F1")
    assert not (folder.images / "confusion_matrix.png").exists()
    assert len(list(folder.images.glob("val_*.jpg"))) == 6
