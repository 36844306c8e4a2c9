"""Scores of semantic maps against torchmetrics and plain loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from detkit.data.masks import decode
from detkit.structures import IGNORED_PIXEL, ClassList, Meta, SemanticMap, Target
from detkit.tasks.segmentation.metrics import SegmentationEvaluator, confusion_matrix

COUNT = 6
CLASSES = ClassList(tuple("abcdef"), (0, 7, 3, 9, 90, 5))


def maps(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ground truths and predictions of three images; some classes in neither, some in one of them only."""
    random = np.random.default_rng(seed)
    allowed = random.choice(COUNT, int(random.integers(1, COUNT + 1)), replace=False)
    predicted = random.choice(COUNT, int(random.integers(1, COUNT + 1)), replace=False)
    pairs = []
    for _ in range(3):
        size = tuple(random.integers(1, 30, 2))
        target = random.choice(allowed, size).astype(np.uint8)
        found = np.where(random.random(size) < 0.6, target, random.choice(predicted, size)).astype(np.uint8)
        target[random.random(size) < 0.2] = IGNORED_PIXEL
        pairs.append((torch.from_numpy(target), torch.from_numpy(found)))
    return pairs


def scored(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> SegmentationEvaluator:
    evaluator = SegmentationEvaluator(CLASSES)
    for number, (truth, found) in enumerate(pairs):
        target = replace(Target.empty(), semantic=truth)
        evaluator.update([SemanticMap(found)], [target], [Meta(number, f"{number}.jpg", tuple(truth.shape))])
    return evaluator


@pytest.mark.parametrize("seed", range(40))
def test_figures_equal_torchmetrics(seed: int) -> None:
    pairs = maps(seed)
    target = torch.cat([target.flatten() for target, _ in pairs]).long()
    found = torch.cat([found.flatten() for _, found in pairs]).long()
    scores = scored(pairs).compute()
    options = {"num_classes": COUNT, "ignore_index": IGNORED_PIXEL}
    assert torch.equal(scores.confusion, MulticlassConfusionMatrix(**options)(found, target))
    present = (scores.confusion.sum(0) + scores.confusion.sum(1)) > 0
    theirs = MulticlassJaccardIndex(**options, average="none")(found, target).double()
    torch.testing.assert_close(scores.iou[present], theirs[present], rtol=1e-6, atol=1e-7)
    figures = scores.as_dict()
    assert figures["mIoU"] == pytest.approx(theirs[present].mean().item(), rel=1e-5)
    micro = MulticlassAccuracy(**options, average="micro")(found, target)
    assert figures["pixel_accuracy"] == pytest.approx(micro.item(), rel=1e-5)
    recall = MulticlassAccuracy(**options, average="none")(found, target).double()
    occurs = scores.confusion.sum(1) > 0
    assert figures["mean_accuracy"] == pytest.approx(recall[occurs].mean().item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_iou_is_that_of_plain_sets_of_pixels(seed: int) -> None:
    pairs = maps(seed)
    scores = scored(pairs).compute()
    for label in range(COUNT):
        intersection = union = 0
        for target, found in pairs:
            for a, b in zip(target.flatten().tolist(), found.flatten().tolist()):
                if a != IGNORED_PIXEL:
                    intersection += a == label and b == label
                    union += a == label or b == label
        value = scores.iou[label].item()
        assert math.isnan(value) if union == 0 else value == pytest.approx(intersection / union)


def test_a_class_that_is_absent_has_no_figure_and_one_predicted_in_vain_counts_as_0() -> None:
    target = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    found = torch.tensor([[0, 0, 1, 2]], dtype=torch.uint8)
    figures = scored([(target, found)]).compute().as_dict()
    assert figures["IoU/a"] == 1
    assert figures["IoU/b"] == 0.5
    assert figures["IoU/c"] == 0
    assert math.isnan(figures["accuracy/c"])
    assert math.isnan(figures["IoU/d"])
    assert figures["mIoU"] == pytest.approx(0.5)
    assert figures["mean_accuracy"] == pytest.approx(0.75)


def test_nothing_but_ignored_pixels_has_no_figures() -> None:
    target = torch.full((2, 2), IGNORED_PIXEL, dtype=torch.uint8)
    figures = scored([(target, torch.zeros(2, 2, dtype=torch.uint8))]).compute().as_dict()
    assert all(math.isnan(figures[name]) for name in ("mIoU", "pixel_accuracy", "mean_accuracy", "IoU/a"))
    assert figures["pixels"] == 0


def test_one_class_everywhere_is_remarked() -> None:
    target = torch.tensor([[0, 1]], dtype=torch.uint8)
    assert scored([(target, torch.zeros_like(target))]).compute().remark == "every pixel was taken for a"
    assert scored([(target, target)]).compute().remark == ""


def test_results_are_run_lengths_of_the_classes_found() -> None:
    found = torch.tensor([[0, 4, 4], [4, 4, 0]], dtype=torch.uint8)
    records = scored([(found, found)]).results()
    assert [(item["image_id"], item["category_id"], item["fraction"]) for item in records] == [
        (0, 0, pytest.approx(1 / 3, abs=1e-6)),
        (0, 90, pytest.approx(2 / 3, abs=1e-6)),
    ]
    (mask,) = decode([records[1]["segmentation"]], (2, 3))
    assert (mask == (found == 4).numpy()).all()


def test_targets_and_predictions_that_do_not_go_together_are_refused() -> None:
    zeros = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"0\.jpg: the target is \(2, 2\), the prediction \(3, 2\)"):
        scored([(zeros, torch.zeros(3, 2, dtype=torch.uint8))])
    with pytest.raises(ValueError, match="there are 2 classes, but a pixel is 3"):
        confusion_matrix(zeros + 3, zeros, 2)


def test_counts_do_not_overflow_32_bits() -> None:
    evaluator = scored([])
    evaluator._confusion += 2**40
    assert evaluator.compute().as_dict()["pixels"] == 2**40 * COUNT * COUNT
    assert evaluator.compute().table().row_count == COUNT + 1
