"""The style-transfer task: images rendered in the style of another; a network is scored by its losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from rich.table import Table

from detkit.heads.base import Head
from detkit.registry import tasks
from detkit.structures import ClassList, Meta, Target
from detkit.tasks.base import Task
from detkit.tasks.drawing import side_by_side
from detkit.zoo.style.structures import Rendering

FIGURES = ("total", "content", "style", "variation")


@dataclass(frozen=True)
class StyleScores:
    """The mean losses over a data set, weighted as in the config, and their sum; lower is better."""

    losses: Mapping[str, float]
    remark: ClassVar[str] = ""

    def as_dict(self) -> dict[str, float | int]:
        """Return `total`, `content`, `style` and `variation`."""
        return {"total": sum(self.losses.values()), **self.losses}

    def table(self) -> Table:
        """Return a table with one row per loss."""
        table = Table("loss", "mean")
        for name, value in self.as_dict().items():
            table.add_row(name, f"{value:.4g}")
        return table


class StyleEvaluator:
    """Collects the predictions.json entries of images; the scores are the losses."""

    def __init__(self, task: "StyleTransfer", classes: ClassList) -> None:
        self.task, self.classes = task, classes
        self._records: list[dict[str, Any]] = []

    def update(self, predictions: Sequence[Rendering], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images."""
        for prediction, meta in zip(predictions, metas):
            self._records += self.task.records(prediction, meta, self.classes)

    def compute(self) -> StyleScores:
        """Return scores without losses, which `Task.scored` adds."""
        return StyleScores({})

    def results(self) -> list[dict[str, Any]]:
        """Return all records."""
        return self._records


@tasks.register("style")
class StyleTransfer(Task[Rendering]):
    """Rendering of images."""

    noun: ClassVar[str] = "renderings"

    def figures(self, head: Head) -> tuple[str, ...]:
        return FIGURES

    def score(self, scores: Any, head: Head) -> float:
        return -float(scores.as_dict()["total"])

    def scored(self, scores: Any, losses: Mapping[str, float]) -> StyleScores:
        return StyleScores(losses)

    def evaluator(self, classes: ClassList, head: Head) -> StyleEvaluator:
        return StyleEvaluator(self, classes)

    def undo(self, prediction: Rendering, meta: Meta, class_names: tuple[str, ...]) -> Rendering:
        image = prediction.image
        if tuple(image.shape[1:]) == meta.size:
            return prediction
        return Rendering(F.interpolate(image[None], meta.size, mode="bilinear", antialias=True)[0].clamp(0, 1))

    def describe(self, prediction: Rendering) -> str:
        height, width = prediction.image.shape[1:]
        return f"{width} x {height} pixels"

    def records(self, prediction: Rendering, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        height, width = prediction.image.shape[1:]
        return [{"image_id": meta.image_id, "width": width, "height": height}]

    def draw(self, image: np.ndarray, prediction: Rendering) -> np.ndarray:
        return prediction.pixels()

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        return image

    def compare(
        self, image: np.ndarray, prediction: Rendering, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        return side_by_side(image, prediction.pixels(), "content", "rendering")

    def enlarged(self, prediction: Rendering, factor: int) -> Rendering:
        return Rendering(prediction.image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2))
