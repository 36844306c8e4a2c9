"""Semantic segmentation: mean IoU, coloured maps over images, palette PNGs as Pascal VOC has them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.data.dataset import Dataset
from detkit.errors import DataError
from detkit.heads.base import Head
from detkit.registry import tasks
from detkit.structures import IGNORED_PIXEL, ClassList, Meta, SemanticMap, Target
from detkit.tasks.base import Task
from detkit.tasks.drawing import side_by_side
from detkit.tasks.options import PredictOptions
from detkit.tasks.segmentation.drawing import draw_semantic, write_palette_png
from detkit.tasks.segmentation.metrics import SegmentationEvaluator, semantic_results

MOST_DESCRIBED = 6


@tasks.register("segment")
class Segment(Task[SemanticMap]):
    """The class of every pixel."""

    noun: ClassVar[str] = "masks of classes"

    def figures(self, head: Head) -> tuple[str, ...]:
        return "mIoU", "pixel_accuracy", "mean_accuracy"

    def evaluator(self, classes: ClassList, head: Head) -> SegmentationEvaluator:
        return SegmentationEvaluator(classes)

    def undo(self, prediction: SemanticMap, meta: Meta, class_names: tuple[str, ...]) -> SemanticMap:
        """Where the network saw the image at another size, its logits are brought to the image's, not its labels.

        Raises:
            ValueError: the image went through an augmentation that has no inverse.
        """
        if meta.matrix is None:
            raise ValueError(f"{meta.source} was augmented at random; its map cannot be taken back")
        labels = prediction.labels
        if tuple(labels.shape) != meta.size:
            if prediction.logits is None:
                raise ValueError(
                    f"a map of {tuple(labels.shape)} pixels for {meta.source} of {meta.size} has no logits"
                )
            labels = enlarged_labels(prediction.logits, meta.size)
        return SemanticMap(labels, class_names=class_names)

    def describe(self, prediction: SemanticMap) -> str:
        counts = torch.bincount(prediction.labels.flatten().long())
        order = counts.argsort(descending=True, stable=True)[: int(counts.count_nonzero())].tolist()
        names = [
            f"{prediction.class_names[label] if prediction.class_names else label} "
            f"{100 * int(counts[label]) / prediction.labels.numel():.1f} %"
            for label in order
        ]
        more = f" and {len(names) - MOST_DESCRIBED} more" if len(names) > MOST_DESCRIBED else ""
        return ", ".join(names[:MOST_DESCRIBED]) + more

    def records(self, prediction: SemanticMap, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        return semantic_results(prediction, meta, classes)

    def draw(self, image: np.ndarray, prediction: SemanticMap) -> np.ndarray:
        return draw_semantic(image, prediction.labels.cpu().numpy(), prediction.class_names)

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        assert target.semantic is not None
        return draw_semantic(image, target.semantic.cpu().numpy(), class_names)

    def compare(
        self, image: np.ndarray, prediction: SemanticMap, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        # What is found stands in the legends.
        ground_truth, found = self.draw_target(image, target, class_names), self.draw(image, prediction)
        return side_by_side(ground_truth, found, "target", "predicted")

    def enlarged(self, prediction: SemanticMap, factor: int) -> SemanticMap:
        labels = prediction.labels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
        return replace(prediction, labels=labels)

    def write(
        self,
        output: Path,
        name: str,
        image: np.ndarray,
        prediction: SemanticMap,
        meta: Meta,
        options: PredictOptions,
    ) -> None:
        """labels/NAME.png, whose pixels are the labels."""
        write_palette_png(output / "labels" / f"{name}.png", prediction.labels.cpu().numpy())

    def check_data(self, dataset: Dataset, split: str) -> None:
        found: set[int] = set()
        for index in range(len(dataset)):
            semantic = dataset.target(index).semantic
            assert semantic is not None, "open_split checks that the data has what the head needs"
            found |= set(semantic.unique().tolist()) - {IGNORED_PIXEL}
            if len(found) > 1 or len(found) == len(dataset.classes):
                return
        names = " and ".join(f"'{dataset.classes.names[label]}'" for label in found) or "none"
        raise DataError(
            f"In all images of the split '{split}' the pixels that count are of {names}, so there is nothing to "
            f"learn or to score. {IGNORED_PIXEL} in a mask stands for what does not count: masks of 0 and "
            f"{IGNORED_PIXEL} must become such of 0 and 1. Check the masks, data.class_names, and what the data call "
            f"this split."
        )


def enlarged_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) uint8: the class of the largest logit (C, h, w) at each pixel of (height, width) `size`, bilinearly.

    Class by class, since all logits at the size of a large image would not fit into memory.
    """
    best = labels = None
    for label, scores in enumerate(logits):
        enlarged = F.interpolate(scores[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        if best is None or labels is None:
            best, labels = enlarged, torch.zeros(size, dtype=torch.uint8, device=logits.device)
            continue
        larger = enlarged > best
        labels[larger] = label
        best = torch.where(larger, enlarged, best)
    assert labels is not None
    return labels
