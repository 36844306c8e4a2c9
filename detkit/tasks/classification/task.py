"""Classification: accuracy, precision and recall by class, images with their best guesses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from detkit.data.dataset import Dataset
from detkit.errors import DataError
from detkit.heads.base import Head
from detkit.registry import tasks
from detkit.structures import Classification, ClassList, Meta, Target
from detkit.tasks.base import Scores, Task
from detkit.tasks.classification.drawing import best_guesses, draw_classes, draw_classification, draw_confusion
from detkit.tasks.classification.metrics import (
    GUESSES,
    ClassificationEvaluator,
    ClassificationScores,
    check_single,
    record,
)
from detkit.tasks.drawing import write_image


@tasks.register("classify")
class Classify(Task[Classification]):
    """The classes of whole images: one each, or any number with the head's `multi_label`."""

    noun: ClassVar[str] = "classifications"

    def figures(self, head: Head) -> tuple[str, ...]:
        if _multi_label(head):
            return "mAP", "mean_F1"
        classes = head.predictor.out_features  # type: ignore[union-attr]
        return ("top1", "top5", "mean_recall") if classes > GUESSES else ("top1", "mean_recall")  # type: ignore[operator]

    def evaluator(self, classes: ClassList, head: Head) -> ClassificationEvaluator:
        return ClassificationEvaluator(classes, _multi_label(head))

    def undo(self, prediction: Classification, meta: Meta, class_names: tuple[str, ...]) -> Classification:
        return replace(prediction, class_names=class_names)

    def describe(self, prediction: Classification) -> str:
        return ", ".join(f"{name} {score:.2f}" for _, name, score in best_guesses(prediction))

    def records(self, prediction: Classification, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        return [record(prediction, meta, classes)]

    def draw(self, image: np.ndarray, prediction: Classification) -> np.ndarray:
        return draw_classification(image, prediction)

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        return draw_classes(image, [class_names[label] for label in _ground_truth(target)])

    def compare(
        self, image: np.ndarray, prediction: Classification, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        ground_truth = _ground_truth(target)
        names = ", ".join(class_names[label] for label in ground_truth) or "none"
        return draw_classification(image, prediction, ground_truth, f"ground truth: {names}")

    def plot(self, scores: Scores, folder: Path) -> None:
        assert isinstance(scores, ClassificationScores)
        if scores.confusion is not None:
            write_image(folder / "confusion_matrix.png", draw_confusion(scores.confusion, scores.classes.names))

    def check_data(self, dataset: Dataset, split: str) -> None:
        if not any(_ground_truth(dataset.target(index)) for index in range(len(dataset))):
            raise DataError(
                f"No image of the split '{split}' has a class, so there is nothing to learn or to score. Check what "
                f"the data call this split.{dataset.problems.reasons()}"
            )

    def check_head(self, head: Head, dataset: Dataset) -> None:
        if not _multi_label(head):
            for index in range(len(dataset)):
                target = dataset.target(index)
                if len(_ground_truth(target)) > 1:
                    check_single(target, str(dataset.image_id(index)))


def _multi_label(head: Head) -> bool:
    return bool(getattr(head, "multi_label", False))


def _ground_truth(target: Target) -> list[int]:
    """The labels of an image's classes."""
    return [] if target.image_labels is None else target.image_labels.tolist()
