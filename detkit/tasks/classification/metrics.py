"""Figures of classifiers: accuracy of the best guesses, precision and recall by class, average precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from detkit.errors import DataError
from detkit.structures import Classification, ClassList, Meta, Target

SMALL = 12
"""The most classes for which the terminal shows the confusion matrix."""
GUESSES = 5
PRESENT_FROM = 0.5
"""With any number of classes an image, those of at least this score are said to be there."""


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """The figures of a data set.

    Args:
        classes: by label.
        confusion: (C, C) images by true class (row) and best guess (column); None with any number of classes.
        figures: all by name.
        precision, recall, f1: (C,) by class, nan where undefined: no image was given the class, or has it.
        average_precision: (C,), nan where no image has the class; None with one class an image.
        support: (C,) images that have the class.
        remark: why there is nothing to see; empty where all is well.
    """

    classes: ClassList
    confusion: np.ndarray | None
    figures: dict[str, float | int]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    average_precision: np.ndarray | None
    support: np.ndarray
    remark: str = ""

    def as_dict(self) -> dict[str, float | int]:
        """Every figure under one flat name, nan where no ground truth supports it."""
        return self.figures

    def table(self) -> Table:
        """The classes, and what was taken for what where there are few of them."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items() if name != "images")
        page = Table.grid()
        page.add_row(f"{self.figures['images']} images: {shown}")
        page.add_row(self._by_class())
        if self.confusion is not None and len(self.classes) <= SMALL:
            page.add_row(self._confusion_table(self.confusion))
        return page

    def _by_class(self) -> Table:
        table = Table()
        table.add_column("class")
        columns = {"images": self.support, "precision": self.precision, "recall": self.recall, "F1": self.f1}
        if self.average_precision is not None:
            columns["AP"] = self.average_precision
        for header in columns:
            table.add_column(header, justify="right")
        for label, name in enumerate(self.classes.names):
            cells = [values[label] for values in columns.values()]
            table.add_row(escape(name), str(cells[0]), *("" if np.isnan(cell) else f"{cell:.3f}" for cell in cells[1:]))
        return table

    def _confusion_table(self, confusion: np.ndarray) -> Table:
        table = Table(title="true class (row) and best guess (column)")
        table.add_column("")
        for name in self.classes.names:
            table.add_column(escape(name), justify="right")
        for name, row in zip(self.classes.names, confusion.tolist()):
            table.add_row(escape(name), *(str(count) if count else "" for count in row))
        return table


class ClassificationEvaluator:
    """Collects the scores of images, and their true classes.

    Args:
        classes: of the data set.
        multi_label: an image has any number of classes instead of exactly one.
    """

    def __init__(self, classes: ClassList, multi_label: bool) -> None:
        self.classes, self.multi_label = classes, multi_label
        self._scores: list[np.ndarray] = []
        self._ground_truths: list[np.ndarray] = []
        self._records: list[dict[str, Any]] = []

    def update(self, predictions: Sequence[Classification], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images. One without a class is left out of the scores where it must have one.

        Raises:
            DataError: an image has several classes where it must have one.
        """
        for prediction, target, meta in zip(predictions, targets, metas, strict=True):
            self._records.append(record(prediction, meta, self.classes))
            assert target.image_labels is not None
            ground_truth = np.zeros(len(self.classes), dtype=bool)
            ground_truth[target.image_labels.numpy()] = True
            if not self.multi_label:
                check_single(target, meta.source)
                if not ground_truth.any():
                    continue
            self._ground_truths.append(ground_truth)
            self._scores.append(prediction.scores.double().numpy())

    def results(self) -> list[dict[str, Any]]:
        """A record for every image that was added."""
        return self._records

    def compute(self) -> ClassificationScores:
        """Score all that was added."""
        count = len(self.classes)
        scores = np.array(self._scores).reshape(-1, count)
        target = np.array(self._ground_truths, dtype=bool).reshape(-1, count)
        return _of_many(scores, target, self.classes) if self.multi_label else _of_one(scores, target, self.classes)


def check_single(target: Target, source: str) -> None:
    """Refuse an image of several classes.

    Raises:
        DataError: naming it.
    """
    if target.image_labels is not None and len(target.image_labels) > 1:
        raise DataError(
            f"The image '{source}' shows {len(target.image_labels)} classes, but this classifier gives one a "
            "image. Set head.multi_label to true, or cut the objects out: data {name: crops, data: {...}}."
        )


def record(prediction: Classification, meta: Meta, classes: ClassList) -> dict[str, Any]:
    """The entry of one image in predictions.json: the score of every class."""
    scores = dict(zip(classes.names, prediction.scores.tolist()))
    return {"image_id": meta.image_id, "scores": scores}


def top_accuracy(scores: np.ndarray, labels: np.ndarray, guesses: int) -> float:
    """Part of the images whose class is among the best `guesses`; nan without images.

    Of equal scores the class with the lower label counts as the better guess.

    Args:
        scores: (N, C).
        labels: (N,) of the true class.
    """
    if not len(labels):
        return float("nan")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :guesses]
    return float((best == labels[:, None]).any(axis=1).mean())


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The sum over thresholds of precision times the gain in recall, without interpolation; nan without positives.

    Images of equal score come in together.

    Args:
        scores: (N,).
        positive: (N,) bool.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    hits = np.cumsum(positive[order])[ends]
    gained = np.diff(hits, prepend=0)
    return float((hits / (ends + 1) * gained).sum() / positive.sum())


def _of_one(scores: np.ndarray, target: np.ndarray, classes: ClassList) -> ClassificationScores:
    count = len(classes)
    labels, guesses = target.argmax(axis=1), scores.argmax(axis=1)
    confusion = np.bincount(labels * count + guesses, minlength=count**2).reshape(count, count)
    figures: dict[str, float | int] = {"top1": top_accuracy(scores, labels, 1)}
    if count > GUESSES:
        figures["top5"] = top_accuracy(scores, labels, GUESSES)
    right = confusion.diagonal()
    precision, recall, f1 = _rates(right, confusion.sum(axis=0), confusion.sum(axis=1))
    figures |= {"mean_recall": _mean(recall), "mean_F1": _mean(f1), "images": len(labels)}
    remark = ""
    if len(labels) and len(np.unique(guesses)) == 1 and len(np.unique(labels)) > 1:
        remark = f"every image is taken for {classes.names[guesses[0]]}"
    return ClassificationScores(classes, confusion, figures, precision, recall, f1, None, confusion.sum(axis=1), remark)


def _of_many(scores: np.ndarray, target: np.ndarray, classes: ClassList) -> ClassificationScores:
    found = scores >= PRESENT_FROM
    right = (found & target).sum(axis=0)
    precision, recall, f1 = _rates(right, found.sum(axis=0), target.sum(axis=0))
    by_class = np.array([average_precision(scores[:, label], target[:, label]) for label in range(len(classes))])
    figures: dict[str, float | int] = {"mAP": _mean(by_class), "mean_F1": _mean(f1), "images": len(target)}
    remark = "" if found.any() or not len(found) else f"no score reaches {PRESENT_FROM:g}"
    return ClassificationScores(classes, None, figures, precision, recall, f1, by_class, target.sum(axis=0), remark)


def _rates(right: np.ndarray, guessed: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 by class, nan where there is nothing to divide by."""
    with np.errstate(invalid="ignore"):
        return right / guessed, right / true, 2 * right / (guessed + true)


def _mean(values: np.ndarray) -> float:
    """The mean of those that are defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
