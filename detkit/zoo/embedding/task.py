"""The embedding task: pair metrics, drawing of vectors, and recognition with a gallery."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.errors import DataError
from detkit.heads.base import Head
from detkit.inference.predictor import Predictor
from detkit.registry import tasks
from detkit.structures import ClassList, Meta, Target
from detkit.tasks.base import Scores, Task
from detkit.tasks.classification.drawing import draw_classes
from detkit.tasks.options import PredictOptions
from detkit.zoo.embedding.drawing import caption, draw_embedding
from detkit.zoo.embedding.gallery import Gallery
from detkit.zoo.embedding.metrics import EmbeddingEvaluator, EmbeddingScores, record
from detkit.zoo.embedding.structures import Embedding


@tasks.register("embed")
class Embed(Task[Embedding]):
    """Embeddings of images, compared by distance."""

    noun: ClassVar[str] = "embeddings"
    options: ClassVar[frozenset[str]] = frozenset({"gallery", "threshold"})

    def figures(self, head: Head) -> tuple[str, ...]:
        return ("auc", "accuracy", "threshold", "recall_at_1")

    def evaluator(self, classes: ClassList, head: Head) -> EmbeddingEvaluator:
        return EmbeddingEvaluator()

    def keep(self, head: Head, scores: Scores) -> None:
        assert isinstance(scores, EmbeddingScores)
        if isinstance(threshold := getattr(head, "threshold", None), torch.Tensor):
            threshold.fill_(scores.threshold)

    def prepared(self, predictor: Predictor, options: PredictOptions, batch: int) -> PredictOptions:
        if options.gallery is None or isinstance(options.gallery, Gallery):
            return options
        return replace(options, gallery=Gallery.read(predictor, options.gallery, options.threshold, batch))

    def select(
        self, prediction: Embedding, head: Head, options: PredictOptions, class_names: tuple[str, ...]
    ) -> Embedding:
        return prediction if options.gallery is None else options.gallery.recognise(prediction)

    def undo(self, prediction: Embedding, meta: Meta, class_names: tuple[str, ...]) -> Embedding:
        return prediction

    def describe(self, prediction: Embedding) -> str:
        return caption(prediction) or f"a vector of {len(prediction.vector)} numbers"

    def records(self, prediction: Embedding, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        return [record(prediction, meta)]

    def draw(self, image: np.ndarray, prediction: Embedding) -> np.ndarray:
        return draw_embedding(image, prediction)

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        labels = [] if target.image_labels is None else target.image_labels.tolist()
        return draw_classes(image, [class_names[label] for label in labels])

    def compare(
        self, image: np.ndarray, prediction: Embedding, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        labels = [] if target.image_labels is None else target.image_labels.tolist()
        return draw_embedding(image, prediction, ", ".join(class_names[label] for label in labels) or "no class")

    def check_data(self, dataset: Dataset, split: str) -> None:
        """Refuse data with images of several classes, and those without two images of one class and one of another:
        there every distance would be as good as any."""
        counts: dict[int, int] = {}
        for index in range(len(dataset)):
            target = dataset.target(index)
            labels = [] if target.image_labels is None else target.image_labels.tolist()
            if len(labels) > 1:
                raise DataError(
                    f"The image {dataset.image_id(index)!r} of the split '{split}' has several classes, but an "
                    "embedding compares images of one each. Use data of format folder, or crops of the objects."
                )
            for label in labels:
                counts[label] = counts.get(label, 0) + 1
        if len(counts) < 2 or max(counts.values()) < 2:
            raise DataError(
                f"The split '{split}' has images of {len(counts)} classes, at most {max(counts.values(), default=0)} "
                "of one. To learn or to score distances it takes two classes, and two images of one of "
                f"them.{dataset.problems.reasons()}"
            )
