"""VOC average precision against a plain-loop one that follows VOCevaldet.m line by line, class by class."""

import math
import random

import numpy as np
import pytest
import torch

from detkit.structures import Detections, Target
from detkit.tasks.detection.voc_metrics import average_precision, match, voc_average_precisions


def detections_of(rows: list[tuple[list[float], float, int]]) -> Detections:
    boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    return Detections(
        boxes, torch.tensor([s for _, s, _ in rows]).float(), torch.tensor([c for _, _, c in rows]).long()
    )


def targets_of(rows: list[tuple[list[float], int, bool]]) -> Target:
    boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    difficult = torch.tensor([d for _, _, d in rows], dtype=torch.bool)
    return Target(boxes, torch.tensor([c for _, c, _ in rows]).long(), difficult=difficult)


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inside = width * height
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def devkit(found: list, target: list, label: int) -> tuple[float, float]:
    """(11-point, area) of one class from the same rows as `detections_of` and `truths_of`, one list per image."""
    queue = [(score, image, box) for image, rows in enumerate(found) for box, score, of in rows if of == label]
    queue.sort(key=lambda entry: entry[0], reverse=True)  # stable also in reverse
    objects = [[(box, difficult) for box, of, difficult in rows if of == label] for rows in target]
    total = sum(not difficult for rows in objects for _, difficult in rows)
    if not total:
        return math.nan, math.nan
    taken = set()
    hits = misses = 0
    curve = []
    for _, image, box in queue:
        largest, winner = -math.inf, -1
        for index, (other, _) in enumerate(objects[image]):
            overlap = plain_iou(box, other)
            if overlap > largest:
                largest, winner = overlap, index
        if largest >= 0.5 and objects[image][winner][1]:
            continue
        if largest >= 0.5 and (image, winner) not in taken:
            taken.add((image, winner))
            hits += 1
        else:
            misses += 1
        curve.append((hits, hits / (hits + misses)))
    # recall >= tenth / 10 in whole numbers, so that no rounding decides.
    levels = [max((p for h, p in curve if 10 * h >= tenth * total), default=0.0) for tenth in range(11)]
    gains = [max((p for h, p in curve if h >= needed), default=0.0) for needed in range(1, total + 1)]
    return sum(levels) / 11, sum(gains) / total


def random_rows(random_: random.Random, images: int, num_classes: int) -> tuple[list, list]:
    """Small integer boxes and scores in tenths, so that equal overlaps, exact halves and tied scores are common."""

    def box() -> list[float]:
        x, y = random_.randrange(12), random_.randrange(12)
        return [x, y, x + random_.randrange(1, 9), y + random_.randrange(1, 9)]

    found, target = [], []
    for _ in range(images):
        objects = [
            (box(), random_.randrange(num_classes), random_.random() < 0.25) for _ in range(random_.randrange(6))
        ]
        near = [([edge + random_.choice([0, 0, 0, 1]) for edge in b], c) for b, c, _ in objects for _ in range(2)]
        others = [(box(), random_.randrange(num_classes)) for _ in range(random_.randrange(6))]
        found.append([(b, random_.randrange(11) / 10, c) for b, c in near + others])
        target.append(objects)
    return found, target


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_kit_in_plain_loops(seed: int) -> None:
    found, target = random_rows(random.Random(seed), images=seed % 12 + 1, num_classes=3)
    eleven, area = voc_average_precisions([detections_of(r) for r in found], [targets_of(r) for r in target], 3)
    expected = np.array([devkit(found, target, label) for label in range(3)])
    np.testing.assert_allclose(eleven, expected[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(area, expected[:, 1], rtol=0, atol=1e-12)


def test_a_target_is_found_once_and_by_the_best_score() -> None:
    target = targets_of([([0, 0, 10, 10], 0, False)])
    found = detections_of([([0, 0, 10, 9], 0.5, 0), ([0, 0, 10, 8], 0.9, 0)])
    right, ignored = match(found, target)
    assert right.tolist() == [False, True]
    assert not ignored.any()


def test_an_overlap_of_exactly_half_is_enough() -> None:
    right, _ = match(detections_of([([0, 0, 10, 5], 0.5, 0)]), targets_of([([0, 0, 10, 10], 0, False)]))
    assert right.all()


def test_a_difficult_target_forgives_every_detection_on_it() -> None:
    target = targets_of([([0, 0, 10, 10], 0, True)])
    right, ignored = match(detections_of([([0, 0, 10, 9], 0.5, 0), ([0, 0, 10, 8], 0.9, 0)]), target)
    assert not right.any()
    assert ignored.all()


def test_another_class_is_no_match() -> None:
    right, ignored = match(detections_of([([0, 0, 10, 10], 0.5, 1)]), targets_of([([0, 0, 10, 10], 0, True)]))
    assert not right.any()
    assert not ignored.any()


def test_recall_of_three_tenths_reaches_the_level_0_3() -> None:
    eleven, area = average_precision(np.array([0.9, 0.8, 0.7]), np.ones(3, dtype=bool), targets=10)
    assert eleven == pytest.approx(4 / 11)
    assert area == pytest.approx(0.3)


def test_without_targets_it_is_nan_and_without_detections_zero() -> None:
    nothing = np.zeros(0), np.zeros(0, dtype=bool)
    assert np.isnan(average_precision(*nothing, targets=0)).all()
    assert average_precision(*nothing, targets=3) == (0.0, 0.0)
