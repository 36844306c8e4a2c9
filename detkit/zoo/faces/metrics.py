"""Landmark metrics: normalized mean error and failure rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from detkit.structures import Meta, Target
from detkit.zoo.faces.structures import Landmarks

FAILURE = 0.1
"""The normalised error from which on an image counts as failed, as is the custom with faces."""


@dataclass(frozen=True)
class LandmarksScores:
    """Metrics of a data set; nan if no image has visible points.

    Args:
        nme: normalised mean error: the mean over images of the mean distance of their visible points, divided by a
            length of the object.
        failure_rate: part of the images whose error is FAILURE or more.
        by_point: mean error of each point, over the images in which it is visible.
        images: how many were scored.
        left_out: how many have no visible point, or no length to divide by.
        measure: what that length is, for people.
    """

    nme: float
    failure_rate: float
    by_point: tuple[float, ...]
    images: int
    left_out: int
    measure: str

    @property
    def remark(self) -> str:
        """No remark."""
        return ""

    def as_dict(self) -> dict[str, float | int]:
        """Return all metrics by flat name."""
        points = {f"nme_{number}": value for number, value in enumerate(self.by_point)}
        return {"nme": self.nme, "failure_rate": self.failure_rate, **points, "images": self.images}

    def table(self) -> Table:
        """Return a table for the terminal."""
        left_out = f", {self.left_out} without visible points left out" if self.left_out else ""
        table = Table(title=f"{self.images} images{left_out}; errors as parts of {self.measure}")
        table.add_column("mean error", justify="right")
        table.add_column(f"failed ({FAILURE:g} or more)", justify="right")
        for number in range(len(self.by_point)):
            table.add_column(f"point {number}", justify="right")
        table.add_row(*(f"{value:.4f}" for value in (self.nme, self.failure_rate, *self.by_point)))
        return table


class LandmarksEvaluator:
    """Collects predicted and true points.

    Args:
        truth_of: (object, points) -> the target with the one object that counts.
        measure: (target with one object, size of the image) -> the length that errors are divided by.
        measure_name: what that is, for people.
    """

    def __init__(
        self,
        target_of: Callable[[Target], Target],
        measure: Callable[[Target, tuple[int, int]], float],
        measure_name: str,
    ) -> None:
        self._target_of, self._measure, self._measure_name = target_of, measure, measure_name
        self._errors: list[Tensor] = []
        self._left_out = 0
        self._all: list[tuple[Landmarks, Meta]] = []

    def update(self, predictions: Sequence[Landmarks], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images, in pixels of their sources."""
        for prediction, target, meta in zip(predictions, targets, metas):
            self._all.append((prediction, meta))
            ground_truth = self._target_of(target)
            if (
                not len(ground_truth)
                or ground_truth.points is None
                or ground_truth.visible is None
                or not ground_truth.visible.any()
            ):
                self._left_out += 1
                continue
            length = self._measure(ground_truth, meta.size)
            if not length > 0:
                self._left_out += 1
                continue
            errors = torch.linalg.vector_norm(prediction.points - ground_truth.points[0], dim=1) / length
            self._errors.append(errors.masked_fill(~ground_truth.visible[0], math.nan))

    def compute(self) -> LandmarksScores:
        """Compute the scores of all images added so far."""
        if not self._errors:
            return LandmarksScores(math.nan, math.nan, (), 0, self._left_out, self._measure_name)
        errors = torch.stack(self._errors).double()
        means = errors.nanmean(1)
        by_point = tuple(errors.nanmean(0).tolist())
        failed = float((means >= FAILURE).double().mean())
        return LandmarksScores(float(means.mean()), failed, by_point, len(errors), self._left_out, self._measure_name)

    def results(self) -> list[dict[str, Any]]:
        """All predictions as `record` writes them."""
        return [record(prediction, meta) for prediction, meta in self._all]


def record(prediction: Landmarks, meta: Meta) -> dict[str, Any]:
    """The entry of one image in predictions.json: COCO's keypoints, [x, y, 2] of each point in pixels."""
    values = [value for x, y in prediction.points.tolist() for value in (round(x, 2), round(y, 2), 2)]
    return {"image_id": meta.image_id, "keypoints": values}
