"""How good detections are: the twelve COCO figures, the same per class, and VOC average precision.

The COCO arithmetic is faster-coco-eval's, equal to pycocotools in all twelve figures; VOC's is `detkit.metrics.voc`.
What no truth supports is nan, never 0 and never COCO's -1, and takes no part in any mean.

Three kinds of truth do not count as objects to find:

    crowd       COCO's iscrowd: any number of detections inside the region are neither right nor wrong.
    difficult   VOC's flag. In the VOC figures as in VOC's kit. In the COCO figures as COCO treats an object outside
                the range of areas being measured: one detection may match it, by ordinary IoU, and is neither right
                nor wrong. (COCO's own `ignore` field can't say so: its code overwrites the field from iscrowd, and
                iscrowd would forgive every small box inside the object.)
    crowd, VOC  VOC has no crowds, so in the VOC figures a crowd region is one difficult object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detkit.errors import DataError, DetkitError
from detkit.metrics.voc import voc_average_precisions
from detkit.types import ClassList, Detections, Meta, Target

if TYPE_CHECKING:
    from rich.table import Table

# Beyond 1e5 ** 2, the upper end of COCO's widest range of areas, so that COCO ignores the object in every range.
AREA_BEYOND_ALL_RANGES = 1e11


@dataclass(frozen=True)
class ClassScores:
    """The figures of one class; each in 0..1, nan where the data has no truth of the class.

    Args:
        name: the class.
        truths: objects to find; crowd and difficult ones are not counted.
        detections: how many detections carry the class.
        AP: mean over IoU 0.50, 0.55 ... 0.95 of COCO's 101-point average precision.
        AP50: the same at IoU 0.50 only.
        voc07: VOC's 11-point average precision at IoU 0.5.
        voc12: VOC's area under the precision-recall curve at IoU 0.5.
    """

    name: str
    truths: int
    detections: int
    AP: float
    AP50: float
    voc07: float
    voc12: float


@dataclass(frozen=True)
class DetectionScores:
    """The figures of a whole data set, each in 0..1, nan where no truth supports it.

    Args:
        coco: the twelve COCO figures: mAP, mAP50, mAP75, mAP_small, mAP_medium, mAP_large, AR_1, AR_10, AR_100,
            AR_small, AR_medium, AR_large. Small is below 32 x 32 pixels of object area, large above 96 x 96.
        voc07: mean over classes of VOC's 11-point average precision at IoU 0.5.
        voc12: the same of the area form.
        per_class: one row for each class, in the order of the labels.
        images: how many images were scored.
        truths: objects to find in them.
        ignored: crowd regions and difficult objects, which are not counted in `truths`.
        detections: how many detections were scored.
    """

    coco: dict[str, float]
    voc07: float
    voc12: float
    per_class: tuple[ClassScores, ...]
    images: int
    truths: int
    ignored: int
    detections: int

    @property
    def summary(self) -> str:
        """What was scored, in one line; says why where there are no figures."""
        counts = f"{self.images} images, {self.truths} objects to find, {self.detections} detections"
        if self.ignored:
            counts += f", {self.ignored} crowd or difficult objects not counted"
        if not self.truths:
            return f"{counts}. Nothing can be scored: the annotations hold no object to find."
        if not self.detections:
            return f"{counts}. Every figure is 0: nothing was detected; is the score threshold too high?"
        return counts + "."

    def as_dict(self) -> dict[str, float | int]:
        """Every figure under one flat name, for CSV or JSON: "mAP50", "voc12", "images", "AP/cat", "AP50/cat" ..."""
        figures: dict[str, float | int] = {**self.coco, "voc07": self.voc07, "voc12": self.voc12}
        for name in ("images", "truths", "ignored", "detections"):
            figures[name] = getattr(self, name)
        for row in self.per_class:
            for name in ("AP", "AP50", "voc07", "voc12", "truths", "detections"):
                figures[f"{name}/{row.name}"] = getattr(row, name)
        return figures

    def table(self) -> Table:
        """For the terminal: one row for each class, the mean over classes, and the other COCO figures below it."""
        from rich.markup import escape
        from rich.table import Table

        others = {name: value for name, value in self.coco.items() if name not in ("mAP", "mAP50")}
        caption = "  ".join(f"{name} {_percent(value)}" for name, value in others.items())
        table = Table(caption=f"{self.summary} Figures in %.\n{caption}", show_footer=True, caption_justify="left")
        table.add_column("class", "mean, or all")
        for header, footer in {
            "objects": str(self.truths),
            "detections": str(self.detections),
            "AP": _percent(self.coco["mAP"]),
            "AP50": _percent(self.coco["mAP50"]),
            "VOC07": _percent(self.voc07),
            "VOC12": _percent(self.voc12),
        }.items():
            table.add_column(header, footer, justify="right")
        for row in self.per_class:
            figures = (_percent(value) for value in (row.AP, row.AP50, row.voc07, row.voc12))
            table.add_row(escape(row.name), str(row.truths), str(row.detections), *figures)
        return table


class DetectionEvaluator:
    """Collects the detections and truths of a data set, batch by batch, and scores them.

    The scores do not depend on the order in which the images come.

    Args:
        classes: the classes of the data set; labels index it.
        max_detections: COCO counts only so many of the best-scored detections of each class in each image, 100 in
            the literature. The VOC figures count all.

    Raises:
        ValueError: `max_detections` is not above 10, which COCO's AR_10 needs.
    """

    def __init__(self, classes: ClassList, *, max_detections: int = 100) -> None:
        if max_detections <= 10:
            raise ValueError(f"max_detections must be above 10, which COCO's AR_10 needs, but is {max_detections}")
        self.classes = classes
        self.max_detections = max_detections
        self._images: dict[int | str, tuple[Detections, Target]] = {}

    def update(self, detections: Sequence[Detections], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add one batch.

        Args:
            detections: one for each image, boxes in pixels of the source.
            targets: one for each image, in the same pixels.
            metas: one for each image; their image ids must differ over the whole data set.

        Raises:
            ValueError: the three differ in length, or a detection has a label out of range or a box or score that is
                not finite.
            DataError: an image came twice, or a truth has a label out of range.
        """
        if not len(detections) == len(targets) == len(metas):
            raise ValueError(
                f"a batch needs equally many of each, but has {len(detections)} detections, {len(targets)} targets "
                f"and {len(metas)} metas"
            )
        for found, truth, meta in zip(detections, targets, metas):
            found, truth = found.to("cpu"), truth.to("cpu")
            self._check(found, truth, meta)
            # Masks of a whole data set would fill the memory, and boxes are all that is scored.
            found = Detections(found.boxes, found.scores, found.labels)
            truth = Target(truth.boxes, truth.labels, truth.crowd, truth.difficult, truth.area)
            self._images[meta.image_id] = (found, truth)

    def compute(self) -> DetectionScores:
        """Score all that was added.

        Raises:
            DataError: no image was added.
        """
        if not self._images:
            raise DataError("There is nothing to score: not one image was evaluated. Does the data set hold any?")
        # The order breaks ties between scores. Sorted ids are pycocotools' order, and no loader's accident.
        ids = sorted(self._images, key=lambda image_id: (isinstance(image_id, str), image_id))
        detections, targets = (list(values) for values in zip(*(self._images[image_id] for image_id in ids)))
        precision, recall = _coco_precision_and_recall(detections, targets, len(self.classes), self.max_detections)
        coco = _twelve_figures(precision, recall, self.max_detections)
        eleven, area = voc_average_precisions(detections, targets, len(self.classes))
        rows = self._per_class(detections, targets, precision, eleven, area)
        return DetectionScores(
            coco=coco,
            voc07=_mean_of(eleven),
            voc12=_mean_of(area),
            per_class=rows,
            images=len(ids),
            truths=sum(row.truths for row in rows),
            ignored=sum(int(truth.ignored.sum()) for truth in targets),
            detections=sum(row.detections for row in rows),
        )

    def _check(self, found: Detections, truth: Target, meta: Meta) -> None:
        """Refuse what would score wrongly without a sign of it."""
        if meta.image_id in self._images:
            raise DataError(
                f"The image id {meta.image_id!r} was evaluated twice, the second time from {meta.source}. Ids must be "
                f"unique over the data set, and each image evaluated once."
            )
        count = len(self.classes)
        for what, labels, error in (("detection", found.labels, ValueError), ("truth", truth.labels, DataError)):
            wrong = labels[(labels < 0) | (labels >= count)]
            if len(wrong):
                raise error(
                    f"A {what} of image {meta.image_id!r} ({meta.source}) has the label {int(wrong[0])}, but the "
                    f"{count} classes have labels 0 to {count - 1}: {self.classes}."
                )
        if not (torch.isfinite(found.boxes).all() and torch.isfinite(found.scores).all()):
            raise ValueError(
                f"A detection of image {meta.image_id!r} ({meta.source}) has a box or score that is not finite: the "
                f"network's outputs are broken, as after a diverged training or an overflow in half precision."
            )

    def _per_class(
        self,
        detections: list[Detections],
        targets: list[Target],
        precision: np.ndarray,
        eleven: np.ndarray,
        area: np.ndarray,
    ) -> tuple[ClassScores, ...]:
        count = len(self.classes)
        truths = torch.bincount(torch.cat([truth.labels[~truth.ignored] for truth in targets]), minlength=count)
        found = torch.bincount(torch.cat([found.labels for found in detections]), minlength=count)
        return tuple(
            ClassScores(
                name=name,
                truths=int(truths[label]),
                detections=int(found[label]),
                AP=_mean_of(precision[:, :, label, 0, -1]),
                AP50=_mean_of(precision[0, :, label, 0, -1]),
                voc07=float(eleven[label]),
                voc12=float(area[label]),
            )
            for label, name in enumerate(self.classes.names)
        )


def coco_results(detections: Detections, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
    """The detections of one image as COCO's result records.

    Args:
        detections: N detections in pixels of the source.
        meta: names the image.
        classes: gives the raw ids.

    Returns:
        N records in the same order: image_id, category_id (the raw id), bbox [x, y, width, height] in pixels, score.
        The floats are not rounded, so that scoring the file gives the scores of `DetectionEvaluator`.

    Raises:
        ValueError: a label is out of range.
    """
    labels = detections.labels.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(
            f"The detections of {meta.source} have labels {min(labels)} to {max(labels)}, but there are "
            f"{len(classes)} classes: {classes}."
        )
    return [
        {
            "image_id": meta.image_id,
            "category_id": classes.raw_ids[label],
            "bbox": bbox,
            "score": score,
        }
        for label, bbox, score in zip(labels, _xywh(detections.boxes), detections.scores.tolist())
    ]


def write_coco_results(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the records of many images as one COCO result file, which pycocotools' loadRes reads.

    Args:
        path: a JSON file; its folder is made, and a file that is there is replaced.
        records: of `coco_results`, image after image.

    Raises:
        DetkitError: the file can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(records)), encoding="utf-8")
    except OSError as error:
        raise DetkitError(f"The COCO results can't be written to {path}: {error.strerror}.") from error


def _coco_precision_and_recall(
    detections: list[Detections], targets: list[Target], num_classes: int, max_detections: int
) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision (10 IoUs, 101 recalls, C, 4 areas, 3 counts) and recall (10, C, 4, 3); -1 is undefined."""
    from faster_coco_eval import COCO, COCOeval_faster

    truths = [record for image, target in enumerate(targets, 1) for record in _truth_records(target, image)]
    found = [record for image, detection in enumerate(detections, 1) for record in _found_records(detection, image)]
    # COCO reads id 0 as "not matched", so annotations count from 1.
    for records in (truths, found):
        for number, record in enumerate(records, 1):
            record["id"] = number
    images = [{"id": image} for image in range(1, len(targets) + 1)]
    categories = [{"id": label} for label in range(num_classes)]
    evaluation = COCOeval_faster(
        COCO({"images": images, "categories": categories, "annotations": truths}),
        COCO({"images": images, "categories": categories, "annotations": found}),
        iouType="bbox",
    )
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _truth_records(target: Target, image: int) -> list[dict[str, Any]]:
    difficult = target.difficult & ~target.crowd
    area = torch.where(difficult, AREA_BEYOND_ALL_RANGES, target.area.double())
    fields = (target.labels.tolist(), _xywh(target.boxes), area.tolist(), target.crowd.int().tolist())
    return [
        {"image_id": image, "category_id": label, "bbox": bbox, "area": size, "iscrowd": crowd}
        for label, bbox, size, crowd in zip(*fields)
    ]


def _found_records(detections: Detections, image: int) -> list[dict[str, Any]]:
    fields = (detections.labels.tolist(), _xywh(detections.boxes), detections.scores.tolist())
    return [
        {"image_id": image, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0, "score": score}
        for label, bbox, score in zip(*fields)
    ]


def _twelve_figures(precision: np.ndarray, recall: np.ndarray, max_detections: int) -> dict[str, float]:
    """COCO's twelve figures, from the arrays of `_coco_precision_and_recall`."""
    figures = {
        "mAP": _mean_of(precision[:, :, :, 0, -1]),
        "mAP50": _mean_of(precision[0, :, :, 0, -1]),
        "mAP75": _mean_of(precision[5, :, :, 0, -1]),
    }
    sizes = {"small": 1, "medium": 2, "large": 3}
    figures |= {f"mAP_{size}": _mean_of(precision[:, :, :, index, -1]) for size, index in sizes.items()}
    counts = (1, 10, max_detections)
    figures |= {f"AR_{count}": _mean_of(recall[:, :, 0, index]) for index, count in enumerate(counts)}
    figures |= {f"AR_{size}": _mean_of(recall[:, :, index, -1]) for size, index in sizes.items()}
    return figures


def _mean_of(values: np.ndarray) -> float:
    """The mean without the undefined, which are -1 in COCO's arrays and nan in ours; nan where nothing is left."""
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def _xywh(boxes: torch.Tensor) -> list[list[float]]:
    """(N, 4) xyxy as [x, y, width, height]; subtracted in float64, so that nothing is rounded off."""
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
