"""Errors of landmarks against hand-computed values."""

import math
from dataclasses import replace

import pytest
import torch

from detkit.registry import heads
from detkit.structures import ClassList, Meta, Target
from detkit.zoo.faces.landmarks import object_of
from detkit.zoo.faces.metrics import LandmarksEvaluator, LandmarksScores
from detkit.zoo.faces.structures import Landmarks
from detkit.zoo.faces.task import Landmarks as Task


def target(points: list[list[float]], visible: list[bool] | None = None) -> Target:
    seen = torch.tensor([visible or [True] * len(points)])
    return Target(torch.tensor([[0.0, 0, 30, 40]]), torch.tensor([0]), points=torch.tensor([points]), visible=seen)


def evaluator(**options: object) -> LandmarksEvaluator:
    head = heads.build(
        {"name": "landmarks", "points": 2, **options}, "head", channels=(4,), strides=(8,), num_classes=1
    )
    return Task().evaluator(ClassList.from_names(["face"]), head)


def scored(targets: list[Target], found: list[list[list[float]]], **options: object) -> LandmarksScores:
    collected = evaluator(**options)
    for target, points in zip(targets, found):
        collected.update([Landmarks(torch.tensor(points))], [target], [Meta(0, "a.jpg", (60, 80))])
    return collected.compute()


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 50), ({"normalise": "image"}, 100), ({"normalise": "points", "normalise_points": [1, 0]}, 20)],
)
def test_errors_are_distances_over_a_length(options: dict[str, object], length: float) -> None:
    """The points are off by 5 (3 across, 4 down) and 1."""
    found = scored([target([[10.0, 10], [30.0, 10]])], [[[13.0, 14], [30.0, 11]]], **options)
    assert found.nme == pytest.approx(3 / length)
    assert found.by_point == pytest.approx((5 / length, 1 / length))
    assert found.failure_rate == float(3 / length >= 0.1)


def test_only_visible_points_count_and_images_without_them_are_left_out() -> None:
    targets = [
        target([[10.0, 10], [30.0, 10]], [True, False]),
        target([[10.0, 10], [30.0, 10]]),
        target([[10.0, 10], [30.0, 10]], [False, False]),
        replace(Target.empty(), points=torch.zeros(0, 2, 2), visible=torch.zeros(0, 2, dtype=torch.bool)),
    ]
    found = scored(targets, [[[10.0, 15], [900.0, 900]], [[10.0, 10], [30.0, 20]], [[0.0, 0]] * 2, [[0.0, 0]] * 2])
    assert found.nme == pytest.approx((5 / 50 + 5 / 50) / 2)
    assert found.by_point == pytest.approx((2.5 / 50, 10 / 50))
    assert found.failure_rate == 1.0
    assert (found.images, found.left_out) == (2, 2)


def test_a_length_of_zero_or_of_hidden_points_leaves_the_image_out() -> None:
    targets = [target([[10.0, 10], [10.0, 10]]), target([[10.0, 10], [20.0, 10]], [True, False])]
    found = scored(targets, [[[0.0, 0]] * 2] * 2, normalise="points")
    assert (found.images, found.left_out) == (0, 2)
    assert math.isnan(found.nme)


def test_the_object_of_an_image_is_its_largest_that_is_not_ignored() -> None:
    boxes = torch.tensor([[0.0, 0, 50, 50], [0, 0, 10, 10], [0, 0, 20, 20]])
    target = Target(boxes, torch.tensor([0, 1, 2]), crowd=torch.tensor([True, False, False]))
    assert object_of(target).labels.tolist() == [2]
    assert len(object_of(target[:1])) == 0
