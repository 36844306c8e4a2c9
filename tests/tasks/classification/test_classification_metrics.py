"""Figures of classifiers against torchmetrics'."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional import classification as reference

from detkit.errors import DataError
from detkit.structures import Classification, ClassList, Meta, Target
from detkit.tasks.classification.metrics import (
    ClassificationEvaluator,
    ClassificationScores,
    average_precision,
    top_accuracy,
)

NAMES = tuple("abcdefg")


def scored(scores: np.ndarray, targets: list[list[int]], multi_label: bool) -> ClassificationEvaluator:
    evaluator = ClassificationEvaluator(ClassList.from_names(NAMES[: scores.shape[1]]), multi_label)
    for number, (row, labels) in enumerate(zip(scores, targets)):
        target = replace(Target.empty(), image_labels=torch.tensor(labels, dtype=torch.int64))
        meta = Meta(number, f"image {number}", (8, 8))
        evaluator.update([Classification(torch.from_numpy(row).float())], [target], [meta])
    return evaluator


@pytest.mark.parametrize("seed", range(20))
def test_one_class_an_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 8))
    labels = random.integers(count, size=60)
    scores = random.random((60, count)).astype(np.float32) + 0.6 * np.eye(count, dtype=np.float32)[labels]
    scores /= scores.sum(1, keepdims=True)
    found = scored(scores, [[label] for label in labels], multi_label=False).compute()
    predicted, target = torch.from_numpy(scores), torch.from_numpy(labels)
    expected = reference.multiclass_accuracy(predicted, target, count, average="micro")
    assert found.figures["top1"] == pytest.approx(expected.item())
    assert ("top5" in found.figures) == (count > 5)
    if count > 5:
        expected = reference.multiclass_accuracy(predicted, target, count, top_k=5, average="micro")
        assert found.figures["top5"] == pytest.approx(expected.item())
    confusion = reference.multiclass_confusion_matrix(predicted, target, count)
    assert np.array_equal(found.confusion, confusion)
    assert np.array_equal(found.support, confusion.sum(1))
    compare_rates(found, lambda name: getattr(reference, f"multiclass_{name}")(predicted, target, count, average=None))
    assert found.figures["mean_recall"] == pytest.approx(np.nanmean(found.recall))


def compare_rates(found: ClassificationScores, expected: Callable[[str], Tensor]) -> None:
    """Torchmetrics says 0 where there is nothing to divide by."""
    for values, name in ((found.precision, "precision"), (found.recall, "recall"), (found.f1, "f1_score")):
        np.testing.assert_allclose(np.nan_to_num(values), expected(name).numpy(), rtol=1e-6)
    assert np.array_equal(np.isnan(found.recall), found.support == 0)


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_classes_an_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.random((50, 5)) < 0.3
    target[:, 4] &= seed % 2 == 0  # sometimes a class that no image has
    # Rounded: many scores are equal.
    scores = (random.random((50, 5)) * 0.6 + 0.3 * target).round(1).astype(np.float32)
    found = scored(scores, [np.flatnonzero(row).tolist() for row in target], multi_label=True).compute()
    predicted, labels = torch.from_numpy(scores), torch.from_numpy(target.astype(np.int64))
    expected = reference.multilabel_average_precision(predicted, labels, 5, average=None, thresholds=None)
    present = target.any(0)
    np.testing.assert_allclose(found.average_precision[present], expected.numpy()[present], rtol=1e-5)
    assert np.array_equal(np.isnan(found.average_precision), ~present)
    assert found.figures["mAP"] == pytest.approx(np.nanmean(found.average_precision))
    shifted = predicted + 1e-4  # torchmetrics takes what is above the threshold, not what reaches it
    compare_rates(found, lambda name: getattr(reference, f"multilabel_{name}")(shifted, labels, 5, average=None))


def test_equal_scores_are_ranked_by_label() -> None:
    scores = np.array([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]])
    assert top_accuracy(scores, np.array([1, 2]), 1) == 0
    assert top_accuracy(scores, np.array([0, 1]), 1) == 1
    assert top_accuracy(scores, np.array([1, 2]), 2) == 1


def test_without_positives_there_is_no_average_precision() -> None:
    assert math.isnan(average_precision(np.array([0.4]), np.array([False])))
    assert math.isnan(top_accuracy(np.zeros((0, 3)), np.zeros(0, dtype=int), 1))


def test_images_without_class_do_not_count_and_several_are_refused() -> None:
    scores = np.array([[0.9, 0.1], [0.9, 0.1]], dtype=np.float32)
    assert scored(scores, [[0], []], multi_label=False).compute().figures == {
        "top1": 1.0, "mean_recall": 1.0, "mean_F1": 1.0, "images": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"'image 1' shows 2 classes.*multi_label"):
        scored(scores, [[0], [0, 1]], multi_label=False)


def test_no_image_at_all_gives_no_figure() -> None:
    found = scored(np.zeros((0, 3), dtype=np.float32), [], multi_label=False).compute()
    assert math.isnan(found.figures["top1"])
    assert found.table().row_count == 3


def test_one_guess_for_all_is_remarked() -> None:
    scores = np.tile(np.array([[0.2, 0.8]], dtype=np.float32), (3, 1))
    assert scored(scores, [[0], [1], [1]], False).compute().remark == "every image is taken for b"
    assert "no score reaches 0.5" in scored(scores / 2, [[0], [1], []], True).compute().remark


def test_a_record_has_the_score_of_every_class() -> None:
    evaluator = scored(np.array([[0.25, 0.75]], dtype=np.float32), [[1]], multi_label=False)
    assert evaluator.results() == [{"image_id": 0, "scores": {"a": 0.25, "b": 0.75}}]
