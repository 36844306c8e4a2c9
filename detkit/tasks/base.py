"""The contract of a task: what the trainer, the evaluation and the command line need to know of its predictions.

A head names its task, and a task is a class registered in detkit.registry.tasks, in a file of its own in this package.
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
    """The figures of a whole data set."""

    @property
    def remark(self) -> str:
        """Behind the figures of an epoch: why there is nothing to see; empty where all is well."""
        ...

    def as_dict(self) -> dict[str, float | int]:
        """Every figure under one flat name, nan where no ground truth supports it."""
        ...

    def table(self) -> Table:
        """For the terminal."""
        ...


class Evaluator(Protocol[P_contra]):
    """Collects predictions and ground truths, and scores them."""

    def update(self, predictions: Sequence[P_contra], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images, all in pixels of their sources."""
        ...

    def compute(self) -> Scores:
        """Score all that was added."""
        ...

    def results(self) -> list[dict[str, Any]]:
        """All predictions as `Task.records` writes them."""
        ...


class Task(ABC, Generic[P]):
    """What surrounds the heads of one kind.

    Attributes:
        noun: what predictions.json holds, in the plural: "detections".
        options: the names in PredictOptions that apply to this task.
    """

    noun: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def figures(self, head: Head) -> tuple[str, ...]:
        """Names in `Scores.as_dict` that are shown after each epoch; the first decides which checkpoint is the best."""

    def score(self, scores: Scores, head: Head) -> float:
        """The figure by which checkpoints are compared, the larger the better."""
        return scores.as_dict()[self.figures(head)[0]]

    def keep(self, head: Head, scores: Scores) -> None:
        """Put what the evaluation found out and predictions need (a threshold) into the head, to be saved with it."""

    def scored(self, scores: Scores, losses: Mapping[str, float]) -> Scores:
        """The figures of a data set, given its mean losses as well; for tasks whose figures these are."""
        return scores

    @abstractmethod
    def evaluator(self, classes: ClassList, head: Head) -> Evaluator[P]:
        """What scores one data set."""

    def scoring(self, classes: ClassList, head: Head, max_dets: int | None) -> tuple[Evaluator[P], Postprocess | None]:
        """The evaluator of a data set, and the options by which the head decodes for it.

        Args:
            classes: the classes of the data set.
            head: the head.
            max_dets: the number of detections of each class in an image that count; None for the usual one.
        """
        self.check_max_dets(max_dets)
        return self.evaluator(classes, head), None

    def check_max_dets(self, max_dets: int | None) -> None:
        """Refuse `train.max_dets` for predictions that are not detections.

        Raises:
            ConfigError: it is given.
        """
        if max_dets is not None:
            raise ConfigError(f"'train.max_dets' does not apply to this model, which gives {self.noun}. Remove it.")

    @abstractmethod
    def undo(self, prediction: P, meta: Meta, class_names: tuple[str, ...]) -> P:
        """A prediction in the network's pixels as one in the source's own, with its class names."""

    @abstractmethod
    def describe(self, prediction: P) -> str:
        """One line for people: "3 RBC, 1 WBC"."""

    @abstractmethod
    def records(self, prediction: P, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        """What predictions.json says of one image."""

    @abstractmethod
    def draw(self, image: np.ndarray, prediction: P) -> np.ndarray:
        """The image (H, W, 3) with the prediction on it."""

    @abstractmethod
    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        """The image (H, W, 3) with the ground truth on it."""

    def check_options(self, head: Head, options: PredictOptions) -> None:
        """Refuse options that do not apply to this task or this head.

        Raises:
            ConfigError: naming the option.
        """
        valid = self.options - (DECODING - head.decode_options)
        for name in options.given():
            if name not in valid:
                hint = nearest(name, valid) if valid else "It has no options of its own."
                raise ConfigError(f"'{name}' does not apply to this model, which gives {self.noun}. {hint}")

    def prepared(self, predictor: Any, options: PredictOptions, batch: int) -> PredictOptions:
        """The options with everything read that they name.

        Args:
            predictor: the detkit.inference.predictor.Predictor that is about to run.
            options: as the user gave them.
            batch: images in a batch.

        Raises:
            DetkitError: something that an option names cannot be read.
        """
        return options

    def decoding(self, head: Head, options: PredictOptions, class_names: tuple[str, ...]) -> Postprocess | None:
        """The options by which the head decodes for a prediction; None for its own.

        Raises:
            ConfigError: the model has no class of that name.
        """
        return None

    def select(self, prediction: P, head: Head, options: PredictOptions, class_names: tuple[str, ...]) -> P:
        """The part of a prediction, in pixels of its source, that the options ask for."""
        return prediction

    def shown(self, prediction: P) -> P:
        """What of a prediction a person wants to see in an image."""
        return prediction

    def compare(self, image: np.ndarray, prediction: P, target: Target, class_names: Sequence[str]) -> np.ndarray:
        """Ground truth and prediction side by side."""
        ground_truth = self.draw_target(image, target, class_names)
        return side_by_side(
            ground_truth, self.draw(image, prediction), "target", f"predicted: {self.describe(prediction)}"
        )

    def enlarged(self, prediction: P, factor: int) -> P:
        """The prediction on an image whose pixels are each repeated `factor` times in both directions."""
        return prediction

    def write(
        self, output: Path, name: str, image: np.ndarray, prediction: P, meta: Meta, options: PredictOptions
    ) -> None:
        """Write what `options` ask for besides image and predictions.json."""

    def plot(self, scores: Scores, folder: Path) -> None:
        """Write images of the figures of a whole data set, where this task has such."""

    def check_head(self, head: Head, dataset: Dataset) -> None:
        """Refuse data from which this head, as it was built, cannot learn.

        Raises:
            DataError: naming the image.
        """

    def check_data(self, dataset: Dataset, split: str) -> None:
        """Refuse data that have nothing to learn or to score.

        Raises:
            DataError: naming the split.
        """


def task_of(head: Head | type[Head]) -> Task[Any]:
    """The task of a head."""
    task: Task[Any] = tasks.build({"name": head.task}, "head")
    return task
