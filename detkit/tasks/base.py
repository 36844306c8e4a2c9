"""The task interface through which trainer, evaluation and command line handle predictions.

A head names its task. A task is a class registered in detkit.registry.tasks, one per file.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from rich.table import Table

from detkit.data.dataset import Dataset
from detkit.errors import ConfigError, nearest
from detkit.heads.base import DECODING, Head, Postprocess
from detkit.registry import tasks
from detkit.structures import ClassList, Meta, Prediction, Target
from detkit.tasks.drawing import side_by_side
from detkit.tasks.options import PredictOptions

P = TypeVar("P", bound=Prediction)
P_contra = TypeVar("P_contra", contravariant=True)


class Scores(Protocol):
    """Metrics of a whole data set."""

    @property
    def remark(self) -> str:
        """A remark appended to the metrics of an epoch, such as why there are none; usually empty."""
        ...

    def as_dict(self) -> dict[str, float | int]:
        """Return all metrics by flat name; nan if there is no ground truth to compute one."""
        ...

    def table(self) -> Table:
        """Return a table for the terminal."""
        ...


class Evaluator(Protocol[P_contra]):
    """Accumulates predictions and targets, and scores them."""

    def update(self, predictions: Sequence[P_contra], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images; predictions and targets are in pixels of the source images."""
        ...

    def compute(self) -> Scores:
        """Compute the scores of all images added so far."""
        ...

    def results(self) -> list[dict[str, Any]]:
        """Return all predictions in the format of `Task.records`."""
        ...


class Task(ABC, Generic[P]):
    """Base class of tasks.

    Attributes:
        noun: what predictions.json contains, in the plural: "detections".
        options: the names in PredictOptions that apply to this task.
    """

    noun: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def figures(self, head: Head) -> tuple[str, ...]:
        """Return the names in `Scores.as_dict` to show after each epoch; the first selects the best checkpoint."""

    def score(self, scores: Scores, head: Head) -> float:
        """Return the metric by which checkpoints are compared; higher is better."""
        return scores.as_dict()[self.figures(head)[0]]

    def keep(self, head: Head, scores: Scores) -> None:
        """Store results of the evaluation that prediction needs (such as a threshold) in the head's state."""

    def scored(self, scores: Scores, losses: Mapping[str, float]) -> Scores:
        """Return the scores, given the mean losses too, for tasks that use losses as metrics."""
        return scores

    @abstractmethod
    def evaluator(self, classes: ClassList, head: Head) -> Evaluator[P]:
        """Create the evaluator of a data set."""

    def scoring(self, classes: ClassList, head: Head, max_dets: int | None) -> tuple[Evaluator[P], Postprocess | None]:
        """Create the evaluator of a data set, with the decoding options to use for it.

        Args:
            classes: the classes of the data set.
            head: the head.
            max_dets: number of detections per class and image that count; None for the default.
        """
        self.check_max_dets(max_dets)
        return self.evaluator(classes, head), None

    def check_max_dets(self, max_dets: int | None) -> None:
        """Raise ConfigError if `train.max_dets` is set for a task that does not give detections."""
        if max_dets is not None:
            raise ConfigError(f"'train.max_dets' does not apply to this model, which gives {self.noun}. Remove it.")

    @abstractmethod
    def undo(self, prediction: P, meta: Meta, class_names: tuple[str, ...]) -> P:
        """Map a prediction from network pixels to source pixels and add its class names."""

    @abstractmethod
    def describe(self, prediction: P) -> str:
        """Summarize a prediction in one line: "3 RBC, 1 WBC"."""

    @abstractmethod
    def records(self, prediction: P, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        """Return the entries of one image in predictions.json."""

    @abstractmethod
    def draw(self, image: np.ndarray, prediction: P) -> np.ndarray:
        """Draw the prediction on a copy of the image (H, W, 3)."""

    @abstractmethod
    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        """Draw the ground truth on a copy of the image (H, W, 3)."""

    def check_options(self, head: Head, options: PredictOptions) -> None:
        """Check that all given options apply to this task and head.

        Raises:
            ConfigError: an option does not apply.
        """
        valid = self.options - (DECODING - head.decode_options)
        for name in options.given():
            if name not in valid:
                hint = nearest(name, valid) if valid else "It has no prediction options."
                raise ConfigError(f"'{name}' does not apply to this model, which gives {self.noun}. {hint}")

    def prepared(self, predictor: Any, options: PredictOptions, batch: int) -> PredictOptions:
        """Load the files that the options refer to, and return the options with their contents.

        Args:
            predictor: the detkit.inference.predictor.Predictor that is about to run.
            options: as the user gave them.
            batch: batch size.

        Raises:
            DetkitError: a file that an option refers to cannot be read.
        """
        return options

    def decoding(self, head: Head, options: PredictOptions, class_names: tuple[str, ...]) -> Postprocess | None:
        """Return the decoding options of a prediction; None for the head's defaults.

        Raises:
            ConfigError: the model has no class of that name.
        """
        return None

    def select(self, prediction: P, head: Head, options: PredictOptions, class_names: tuple[str, ...]) -> P:
        """Select the part of a prediction, in source pixels, that the options request."""
        return prediction

    def shown(self, prediction: P) -> P:
        """Select the part of a prediction to draw in sample images."""
        return prediction

    def compare(self, image: np.ndarray, prediction: P, target: Target, class_names: Sequence[str]) -> np.ndarray:
        """Draw ground truth and prediction side by side."""
        ground_truth = self.draw_target(image, target, class_names)
        return side_by_side(
            ground_truth, self.draw(image, prediction), "target", f"predicted: {self.describe(prediction)}"
        )

    def enlarged(self, prediction: P, factor: int) -> P:
        """Scale a prediction to its image enlarged by `factor` in both directions (pixels repeated)."""
        return prediction

    def write(
        self, output: Path, name: str, image: np.ndarray, prediction: P, meta: Meta, options: PredictOptions
    ) -> None:
        """Write the files that `options` request in addition to the image and predictions.json."""

    def plot(self, scores: Scores, folder: Path) -> None:
        """Write plots of the metrics of a data set, if this task has any."""

    def check_head(self, head: Head, dataset: Dataset) -> None:
        """Check that this head, as configured, can be trained on the data.

        Raises:
            DataError: it cannot; names the image.
        """

    def check_data(self, dataset: Dataset, split: str) -> None:
        """Check that a split has something to learn or to score.

        Raises:
            DataError: it does not; names the split.
        """


def task_of(head: Head | type[Head]) -> Task[Any]:
    """Return the task of a head."""
    task: Task[Any] = tasks.build({"name": head.task}, "head")
    return task
