"""The task of detectors: options, limits while decoding, what has nothing to learn from."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from detkit.config import TrainOptions
from detkit.data.formats.shapes import Shapes
from detkit.errors import ConfigError, DataError
from detkit.heads.base import Postprocess
from detkit.registry import heads, tasks
from detkit.structures import ClassList, Detections, Target
from detkit.tasks.base import task_of
from detkit.tasks.detection.task import Detect
from detkit.tasks.options import PredictOptions


def head() -> Any:
    return heads.build({"name": "ssd"}, "head", channels=(4, 4), strides=(8, 16), num_classes=3)


def test_every_head_names_a_task() -> None:
    for name in heads.names():
        assert heads.get(name).task in tasks.names()  # type: ignore[attr-defined]
        task_of(heads.get(name))  # type: ignore[arg-type]


def test_options_of_other_tasks_are_refused() -> None:
    Detect().check_options(head(), PredictOptions(conf=0.5, save_txt=True))
    with pytest.raises(ConfigError, match="'gallery' does not apply to this model, which gives detections"):
        Detect().check_options(head(), PredictOptions(gallery="."))


def test_options_that_the_head_does_not_read_are_refused() -> None:
    localize = heads.build({"name": "localize"}, "head", channels=(4,), strides=(8,), num_classes=3)
    Detect().check_options(localize, PredictOptions(conf=0.5))
    for options in (PredictOptions(iou=0.5), PredictOptions(max_det=3)):
        with pytest.raises(ConfigError, match="does not apply to this model"):
            Detect().check_options(localize, options)


def test_options_become_those_of_the_decoding_and_leave_the_head_alone() -> None:
    ssd, task = head(), Detect()
    options = PredictOptions(conf=0.6, max_det=2, classes=["b"])
    before = ssd.postprocess
    boxes = torch.tensor([[0.0, 0, 1, 1]] * 4)
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 1]))
    decoding = task.decoding(ssd, options, ("a", "b", "c"))
    assert decoding.score_threshold == 0.6
    assert decoding.max_detections > 1000
    assert task.select(found, ssd, options, ("a", "b", "c")).scores.tolist() == pytest.approx([0.9, 0.7])
    assert task.decoding(ssd, PredictOptions(), ("a",)).score_threshold == 0.25
    assert ssd.postprocess == before


def test_more_detections_than_candidates_may_be_asked_for() -> None:
    ssd, task = head(), Detect()
    ssd.postprocess = Postprocess(max_candidates=10)
    assert task.decoding(ssd, PredictOptions(max_det=50), ("a",)).max_candidates == 50


CLASSES = ClassList.from_names(["a", "b", "c"])


def test_an_evaluation_may_count_more_detections_than_the_head_gives() -> None:
    ssd, task = head(), Detect()
    evaluator, decoding = task.scoring(CLASSES, ssd, 500)
    assert decoding is not None
    assert evaluator.max_detections == decoding.max_detections == decoding.max_candidates == 500
    evaluator, decoding = task.scoring(CLASSES, ssd, 50)
    assert (evaluator.max_detections, decoding) == (50, ssd.postprocess)
    evaluator, decoding = task.scoring(CLASSES, ssd, None)
    assert (evaluator.max_detections, decoding) == (100, None)


def test_max_dets_is_refused_where_it_means_nothing_or_too_little() -> None:
    classifier = task_of(heads.get("classify"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'train\.max_dets' does not apply to this model, which gives"):
        classifier.check_max_dets(300)
    classifier.check_max_dets(None)
    for few in (10, 0, -1):
        with pytest.raises(ConfigError, match=rf"'train\.max_dets' must be above 10, .* but is {few}\."):
            TrainOptions(max_dets=few)


def test_data_without_an_object_that_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Shapes("val", val_count=2, size=32)
    Detect().check_data(dataset, "val")
    crowd = Target(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), crowd=torch.tensor([True]))
    monkeypatch.setattr(dataset, "target", lambda index: crowd)
    with pytest.raises(DataError, match="'val' has an object that counts"):
        Detect().check_data(dataset, "val")
    dataset.problems.add_harmless("empty box", "a.txt:1", "it is empty", "left out the box")
    with pytest.raises(
        DataError, match=r"Problems in its files: 1 x empty box: left out the box \(first: a\.txt:1: it is empty"
    ):
        Detect().check_data(dataset, "val")


def test_a_target_keeps_what_is_of_the_image_when_objects_are_chosen() -> None:
    target = replace(
        Target(torch.tensor([[0.0, 0, 9, 9], [0, 0, 5, 5]]), torch.tensor([0, 1])),
        points=torch.zeros(2, 3, 2),
        visible=torch.ones(2, 3, dtype=torch.bool),
        image_labels=torch.tensor([4]),
        semantic=torch.zeros(8, 9, dtype=torch.uint8),
    )
    chosen = target[torch.tensor([1])]
    assert chosen.points is not None
    assert chosen.semantic is not None
    assert chosen.image_labels is not None
    assert (len(chosen), chosen.points.shape, chosen.semantic.shape) == (1, (1, 3, 2), (8, 9))
    assert chosen.image_labels.tolist() == [4]
