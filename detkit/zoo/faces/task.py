"""Landmarks: the normalised error, images with points."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.data.transforms import map_points
from detkit.errors import ConfigError, DataError
from detkit.heads.base import Head
from detkit.registry import tasks
from detkit.structures import ClassList, Meta, Target
from detkit.tasks.base import Scores, Task
from detkit.tasks.drawing import side_by_side
from detkit.tasks.points_drawing import draw_points
from detkit.zoo.faces.landmarks import object_of
from detkit.zoo.faces.metrics import LandmarksEvaluator, record
from detkit.zoo.faces.structures import Landmarks as Prediction

MEASURES = {
    "box": "the diagonal of the object's box",
    "image": "the diagonal of the image",
    "points": "the distance of points {} and {}",
}


@tasks.register("landmarks")
class Landmarks(Task[Prediction]):
    """Points of the one object that an image shows."""

    noun: ClassVar[str] = "sets of landmarks"

    def figures(self, head: Head) -> tuple[str, ...]:
        return ("nme", "failure_rate")

    def score(self, scores: Scores, head: Head) -> float:
        return -scores.as_dict()["nme"]

    def evaluator(self, classes: ClassList, head: Head) -> LandmarksEvaluator:
        kind, pair = str(getattr(head, "normalise", "box")), getattr(head, "normalise_points", (0, 1))

        def measure(target: Target, size: tuple[int, int]) -> float:
            if kind == "image":
                return math.hypot(*size)
            if kind == "box":
                return float(torch.linalg.vector_norm(target.boxes[0, 2:] - target.boxes[0, :2]))
            assert target.points is not None
            assert target.visible is not None
            seen = target.visible[0, list(pair)].all()
            return (
                float(torch.linalg.vector_norm(target.points[0, pair[0]] - target.points[0, pair[1]])) if seen else 0.0
            )

        return LandmarksEvaluator(object_of, measure, MEASURES[kind].format(*pair))

    def undo(self, prediction: Prediction, meta: Meta, class_names: tuple[str, ...]) -> Prediction:
        if meta.matrix is None:
            raise ValueError(f"{meta.source} was augmented at random; its points cannot be taken back")
        return replace(prediction, points=map_points(prediction.points, np.linalg.inv(meta.matrix)))

    def describe(self, prediction: Prediction) -> str:
        return " ".join(f"({x:.0f}, {y:.0f})" for x, y in prediction.points.tolist())

    def records(self, prediction: Prediction, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        return [record(prediction, meta)]

    def draw(self, image: np.ndarray, prediction: Prediction) -> np.ndarray:
        return draw_points(image, prediction.points[None], None)

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        ground_truth = object_of(target)
        return (
            image.copy()
            if ground_truth.points is None
            else draw_points(image, ground_truth.points, ground_truth.visible)
        )

    def compare(
        self, image: np.ndarray, prediction: Prediction, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        ground_truth = self.draw_target(image, target, class_names)
        return side_by_side(ground_truth, self.draw(image, prediction), "target", "predicted")

    def enlarged(self, prediction: Prediction, factor: int) -> Prediction:
        return replace(prediction, points=prediction.points * factor)

    def check_data(self, dataset: Dataset, split: str) -> None:
        for index in range(len(dataset)):
            visible = object_of(dataset.target(index)).visible
            if visible is not None and visible.any():
                return
        raise DataError(
            f"No image of the split '{split}' has a point that is visible, so there is nothing to learn or to score. "
            f"Check what the data call this split, and its annotations.{dataset.problems.reasons()}"
        )

    def check_head(self, head: Head, dataset: Dataset) -> None:
        for index in range(len(dataset)):
            points = dataset.target(index).points
            wanted = getattr(head, "points", None)
            if points is not None and len(points) and points.shape[1] != wanted:
                raise ConfigError(
                    f"'head.points' is {wanted}, but the data has {points.shape[1]} points. Set it to that."
                )
