"""Verification and retrieval metrics of embeddings over all pairs of a data set, computed in blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from detkit.structures import Meta, Target
from detkit.zoo.embedding.structures import Embedding

BLOCK = 1 << 24
"""Pairs that are looked at together."""
BINS = 1 << 22
"""Of cosines in -1..1: a bin is 5e-7 wide, about what float32 resolves; only pairs that close count as ties."""


@dataclass(frozen=True)
class EmbeddingScores:
    """Metrics of a data set; nan if there are no pairs to compute them.

    Args:
        auc: area under the ROC curve over all pairs: the probability that a pair of the same class is closer than a
            pair of different classes; 0.5 for random embeddings.
        accuracy: balanced accuracy at the best threshold: the mean of the fractions of same-class and different-class
            pairs classified correctly, as for data with equally many of both (LFW).
        threshold: the distance, 0..2, of that threshold; smaller distances mean the same class.
        recall_at_1: fraction of images whose nearest other image is of their class, among those whose class has
            another image.
        images: number of scored images.
        classes: number of their classes.
    """

    auc: float
    accuracy: float
    threshold: float
    recall_at_1: float
    images: int
    classes: int

    @property
    def remark(self) -> str:
        """No remark."""
        return ""

    def as_dict(self) -> dict[str, float | int]:
        """Return all metrics by name."""
        return dict(self.__dict__)

    def table(self) -> Table:
        """Return a table for the terminal."""
        table = Table(title=f"{self.images} images of {self.classes} classes, all pairs")
        for title in ("AUC", "accuracy", "at threshold", "recall@1"):
            table.add_column(title, justify="right")
        table.add_row(*(f"{value:.3f}" for value in (self.auc, self.accuracy, self.threshold, self.recall_at_1)))
        return table


class EmbeddingEvaluator:
    """Collects vectors and classes. Memory grows with the number of images, not with that of pairs."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._labels: list[int] = []
        self._all: list[tuple[Embedding, Meta]] = []

    def update(self, predictions: Sequence[Embedding], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images; those without a class are not scored."""
        for prediction, target, meta in zip(predictions, targets, metas):
            self._all.append((prediction, meta))
            if target.image_labels is not None and len(target.image_labels) == 1:
                self._vectors.append(prediction.vector)
                self._labels.append(int(target.image_labels))

    def compute(self) -> EmbeddingScores:
        """Score all pairs of images that were added."""
        if not self._vectors:
            return EmbeddingScores(math.nan, math.nan, math.nan, math.nan, 0, 0)
        vectors, labels = torch.stack(self._vectors), torch.tensor(self._labels)
        same, other = pair_histograms(vectors, labels)
        accuracy, threshold = best_accuracy(same, other)
        found = recall_at_1(vectors, labels)
        return EmbeddingScores(
            area_under_roc(same, other), accuracy, threshold, found, len(labels), len(labels.unique())
        )

    def results(self) -> list[dict[str, Any]]:
        """All vectors as `record` writes them."""
        return [record(prediction, meta) for prediction, meta in self._all]


def record(prediction: Embedding, meta: Meta) -> dict[str, Any]:
    """Return the entry of one image in predictions.json."""
    entry: dict[str, Any] = {"image_id": meta.image_id, "vector": [round(x, 6) for x in prediction.vector.tolist()]}
    if prediction.distance is not None:
        entry |= {"identity": prediction.identity, "distance": round(prediction.distance, 6)}
    return entry


def pair_histograms(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(BINS,) int64 numbers of pairs of one class, and of two classes, by the cosine of their vectors.

    Args:
        vectors: (N, D) of length 1.
        labels: (N,) int64.
    """
    same, other = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
    for start, cosines in _blocks(vectors):
        rows = torch.arange(start, start + len(cosines))
        later = rows[:, None] < torch.arange(len(vectors))
        equal = labels[rows][:, None] == labels
        bins = ((cosines + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        same += torch.bincount(bins[later & equal], minlength=BINS)
        other += torch.bincount(bins[later & ~equal], minlength=BINS)
    return same, other


def area_under_roc(same: Tensor, other: Tensor) -> float:
    """The chance that a pair of one class has a larger cosine than one of two classes; ties count half."""
    pairs = int(same.sum()) * int(other.sum())
    if not pairs:
        return math.nan
    below = other.cumsum(0) - other
    return float((same.double() * (below.double() + other.double() / 2)).sum() / pairs)


def best_accuracy(same: Tensor, other: Tensor) -> tuple[float, float]:
    """The best mean of both rates over all thresholds, and the distance where it is reached."""
    if not int(same.sum()) or not int(other.sum()):
        return math.nan, math.nan
    # Entry b: pairs in the bins from b on are taken for the same.
    recognised = same.flip(0).cumsum(0).flip(0).double() / same.sum()
    kept_apart = (other.cumsum(0) - other).double() / other.sum()
    accuracies = (recognised + kept_apart) / 2
    best = accuracies.max()
    # In the middle of the gap between the last of one kind and the first of the other.
    places = torch.nonzero(accuracies == best).flatten()
    run = places[: int((places.diff() != 1).nonzero()[0]) + 1] if (places.diff() != 1).any() else places
    cosine = float(run[0] + run[-1]) / BINS - 1
    return float(best), math.sqrt(max(0.0, 2 - 2 * cosine))


def recall_at_1(vectors: Tensor, labels: Tensor) -> float:
    """Part of the images whose nearest other one is of their class, of those whose class has another image."""
    counts = labels.unique(return_inverse=True, return_counts=True)
    has_other = counts[2][counts[1]] > 1
    right = torch.zeros(len(labels), dtype=torch.bool)
    for start, cosines in _blocks(vectors):
        rows = torch.arange(len(cosines))
        cosines[rows, rows + start] = -math.inf
        right[start : start + len(cosines)] = labels[cosines.argmax(1)] == labels[start : start + len(cosines)]
    return float(right[has_other].double().mean()) if has_other.any() else math.nan


def _blocks(vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block of rows of the (N, N) matrix of cosines, and the block."""
    rows = max(1, BLOCK // len(vectors))
    for start in range(0, len(vectors), rows):
        yield start, vectors[start : start + rows] @ vectors.T
