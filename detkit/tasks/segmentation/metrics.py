"""How good semantic maps are: intersection over union, and accuracy, from one confusion matrix of all pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detkit.data.masks import encode
from detkit.structures import IGNORED_PIXEL, ClassList, Meta, SemanticMap, Target

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """The figures of a whole data set, each in 0..1; of pixels with a ground truth only.

    A class that neither ground truth nor predictions have has no IoU (nan), and one that no ground truth has no
    accuracy; neither takes part in a mean. A class that was predicted but does not occur has an IoU of 0, which counts.

    Args:
        class_names: C names by label.
        confusion: (C, C) int64, pixels by true class (rows) and predicted class (columns).
        images: how many images were scored.
    """

    class_names: tuple[str, ...]
    confusion: Tensor
    images: int

    @property
    def iou(self) -> Tensor:
        """(C,) float64: pixels of the class in ground truth and prediction, of those in either."""
        right = self.confusion.diag()
        return right.double() / (self.confusion.sum(0) + self.confusion.sum(1) - right)

    @property
    def accuracy(self) -> Tensor:
        """(C,) float64: the part of the true pixels of each class that was found, its recall."""
        return self.confusion.diag().double() / self.confusion.sum(1)

    @property
    def remark(self) -> str:
        """That all pixels were given one class, where they were; else empty."""
        predicted = self.confusion.sum(0).nonzero().flatten().tolist()
        if len(predicted) == 1 and self.confusion.sum(1).count_nonzero() > 1:
            return f"every pixel was taken for {self.class_names[predicted[0]]}"
        return ""

    def as_dict(self) -> dict[str, float | int]:
        """mIoU, pixel_accuracy, mean_accuracy, images, pixels, and "IoU/cat", "accuracy/cat", "pixels/cat" ..."""
        pixels = int(self.confusion.sum())
        figures: dict[str, float | int] = {
            "mIoU": self.iou.nanmean().item(),
            "pixel_accuracy": float(self.confusion.diag().sum()) / pixels if pixels else float("nan"),
            "mean_accuracy": self.accuracy.nanmean().item(),
            "images": self.images,
            "pixels": pixels,
        }
        rows = zip(self.class_names, self.iou.tolist(), self.accuracy.tolist(), self.confusion.sum(1).tolist())
        for name, iou, accuracy, count in rows:
            figures |= {f"IoU/{name}": iou, f"accuracy/{name}": accuracy, f"pixels/{name}": count}
        return figures

    def table(self) -> Table:
        """For the terminal: one row for each class, and the means."""
        from rich.markup import escape
        from rich.table import Table

        figures = self.as_dict()
        counts = self.confusion.sum(1)
        share = counts / counts.sum().clamp(min=1)
        caption = f"{self.images} images. Pixel accuracy {_percent(float(figures['pixel_accuracy']))} %. Figures in %."
        if self.remark:
            caption += f"\nOf note: {self.remark}."
        table = Table(caption=caption, caption_justify="left")
        table.add_column("class")
        for header in ("IoU", "accuracy", "share of pixels"):
            table.add_column(header, justify="right")
        for name, *row in zip(self.class_names, self.iou.tolist(), self.accuracy.tolist(), share.tolist()):
            table.add_row(escape(name), *map(_percent, row))
        table.add_section()
        means = float(figures["mIoU"]), float(figures["mean_accuracy"])
        table.add_row("mean over classes", *map(_percent, means), "")
        return table


class SegmentationEvaluator:
    """Counts the pixels of images one by one; its memory does not grow with their number, but for `results`.

    Args:
        classes: of ground truths and predictions.
    """

    def __init__(self, classes: ClassList) -> None:
        self._classes = classes
        self._confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        self._images = 0
        self._results: list[dict[str, Any]] = []

    def update(self, predictions: Sequence[SemanticMap], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add images, predictions and ground truths in the same pixels.

        Raises:
            ValueError: a ground truth has no semantic map, or the sizes differ.
        """
        for prediction, target, meta in zip(predictions, targets, metas, strict=True):
            if target.semantic is None or target.semantic.shape != prediction.labels.shape:
                ground_truth = None if target.semantic is None else tuple(target.semantic.shape)
                raise ValueError(
                    f"{meta.source}: the target is {ground_truth}, the prediction {tuple(prediction.labels.shape)}"
                )
            self._confusion += confusion_matrix(target.semantic, prediction.labels, len(self._classes))
            self._images += 1
            self._results += semantic_results(prediction, meta, self._classes)

    def compute(self) -> SegmentationScores:
        """Score all that was added."""
        return SegmentationScores(self._classes.names, self._confusion.clone(), self._images)

    def results(self) -> list[dict[str, Any]]:
        """The predictions of all images; see `semantic_results`."""
        return self._results


def confusion_matrix(target: Tensor, predicted: Tensor, count: int) -> Tensor:
    """(count, count) int64: pixels by true class (rows) and predicted class (columns), IGNORED_PIXEL left out.

    Args:
        ground truth, predicted: of one shape, uint8.

    Raises:
        ValueError: a class is not below `count`.
    """
    counted = target != IGNORED_PIXEL
    rows, columns = target[counted].long(), predicted[counted].long()
    if len(rows) and max(int(rows.max()), int(columns.max())) >= count:
        raise ValueError(f"there are {count} classes, but a pixel is {max(int(rows.max()), int(columns.max()))}")
    return torch.bincount(rows * count + columns, minlength=count * count).view(count, count).cpu()


def semantic_results(prediction: SemanticMap, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
    """One record for each class in the map, as COCO-Stuff has them: image_id, category_id (raw), segmentation (RLE),
    and `fraction`, the part of the image's pixels."""
    labels = prediction.labels.cpu().numpy()
    return [
        {
            "image_id": meta.image_id,
            "category_id": classes.raw_ids[label],
            "segmentation": encode(labels == label),
            "fraction": round(float((labels == label).mean()), 6),
        }
        for label in np.unique(labels).tolist()
    ]


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"
