"""How good detections are: the twelve COCO figures of boxes and of masks, the same per class, and VOC's precision.

The COCO arithmetic is faster-coco-eval's, equal to pycocotools in all twelve figures; VOC's is voc_metrics.py's.
What no ground truth supports is nan, never 0 and never COCO's -1, and takes no part in any mean.

Three kinds of ground truth do not count as objects to find:

    crowd       COCO's iscrowd: any number of detections inside the region are neither right nor wrong.
    difficult   VOC's flag. In the VOC figures as in VOC's kit. In the COCO figures as COCO treats an object outside
                the range of areas being measured: one detection may match it, by ordinary IoU, and is neither right
                nor wrong. (COCO's own `ignore` field can't say so: its code overwrites the field from iscrowd, and
                iscrowd would forgive every small box inside the object.)
    crowd, VOC  VOC has no crowds, so in the VOC figures a crowd region is one difficult object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detkit.data import masks as mask_coding
from detkit.errors import DataError, counted
from detkit.structures import ClassList, Detections, Meta, Target
from detkit.tasks.detection.voc_metrics import voc_average_precisions

if TYPE_CHECKING:
    from rich.table import Table

# Beyond 1e5 ** 2, the upper end of COCO's widest range of areas, so that COCO ignores the object in every range.
AREA_BEYOND_ALL_RANGES = 1e11


@dataclass(frozen=True)
class ClassScores:
    """The figures of one class; each in 0..1, nan where the data has no ground truth of the class.

    Args:
        name: the class.
        targets: objects to find; crowd and difficult ones are not counted.
        detections: how many detections carry the class.
        AP: mean over IoU 0.50, 0.55 ... 0.95 of COCO's 101-point average precision.
        AP50: the same at IoU 0.50 only.
        voc07: VOC's 11-point average precision at IoU 0.5.
        voc12: VOC's area under the precision-recall curve at IoU 0.5.
        mask_AP: AP by the IoU of masks; None where masks were not scored.
        mask_AP50: AP50 by the IoU of masks; None where masks were not scored.
    """

    name: str
    targets: int
    detections: int
    AP: float
    AP50: float
    voc07: float
    voc12: float
    mask_AP: float | None = None
    mask_AP50: float | None = None


@dataclass(frozen=True)
class DetectionScores:
    """The figures of a whole data set, each in 0..1, nan where no ground truth supports it.

    Args:
        coco: the twelve COCO figures: mAP, mAP50, mAP75, mAP_small, mAP_medium, mAP_large, AR_1, AR_10, AR_100,
            AR_small, AR_medium, AR_large. Small is below 32 x 32 pixels of object area, large above 96 x 96.
        voc07: mean over classes of VOC's 11-point average precision at IoU 0.5.
        voc12: the same of the area form.
        per_class: one row for each class, in the order of the labels.
        images: how many images were scored.
        targets: objects to find in them.
        ignored: crowd regions and difficult objects, which are not counted in `ground truths`.
        detections: how many detections were scored.
        masks: the twelve COCO figures by the IoU and area of masks, under the names of `coco`; None where ground truths
            or detections have no masks.
        limits: a sentence for the report where the limits on detections keep the figures low; else empty.
    """

    coco: dict[str, float]
    voc07: float
    voc12: float
    per_class: tuple[ClassScores, ...]
    images: int
    targets: int
    ignored: int
    detections: int
    masks: dict[str, float] | None = None
    limits: str = ""

    @property
    def decisive(self) -> dict[str, float]:
        """The COCO figures by which a detector is judged: those of its masks where it has some, else of its boxes."""
        return self.coco if self.masks is None else self.masks

    @property
    def summary(self) -> str:
        """Describe in one line the data that were scored, and why figures are missing."""
        counts = f"{self.images} images, {self.targets} objects to find, {self.detections} detections"
        if self.ignored:
            counts += f", {self.ignored} crowd or difficult objects not counted"
        if not self.targets:
            return f"{counts}. Nothing can be scored: the annotations hold no object to find."
        if not self.detections:
            return f"{counts}. Every figure is 0: nothing was detected; is the score threshold too high?"
        return f"{counts}. {self.limits}".rstrip()

    @property
    def remark(self) -> str:
        """The summary where nothing was detected; else empty."""
        return "" if self.detections else self.summary

    def as_dict(self) -> dict[str, float | int]:
        """Every figure under one flat name, for CSV or JSON: "mAP50", "voc12", "images", "AP/cat", "AP50/cat" ...

        Those of masks, where they were scored, are "mask_mAP50", "mask_AP/cat" ...
        """
        figures: dict[str, float | int] = {**self.coco, "voc07": self.voc07, "voc12": self.voc12}
        figures |= {f"mask_{name}": value for name, value in (self.masks or {}).items()}
        for name in ("images", "targets", "ignored", "detections"):
            figures[name] = getattr(self, name)
        for row in self.per_class:
            names = ["AP", "AP50", "voc07", "voc12", "targets", "detections"]
            if self.masks is not None:
                names += ["mask_AP", "mask_AP50"]
            for name in names:
                figures[f"{name}/{row.name}"] = getattr(row, name)
        return figures

    def table(self) -> Table:
        """For the terminal: one row for each class, the mean over classes, and the other COCO figures below it."""
        from rich.markup import escape
        from rich.table import Table

        caption = f"{self.summary} Figures in %.\n{_all_but_the_first_two(self.coco)}"
        columns = {"AP": self.coco["mAP"], "AP50": self.coco["mAP50"], "VOC07": self.voc07, "VOC12": self.voc12}
        if self.masks is not None:
            caption += f"\nmasks: {_all_but_the_first_two(self.masks)}"
            columns |= {"mask\nAP": self.masks["mAP"], "mask\nAP50": self.masks["mAP50"]}
        table = Table(caption=caption, show_footer=True, caption_justify="left")
        table.add_column("class", "mean, or all")
        table.add_column("objects", str(self.targets), justify="right")
        table.add_column("found", str(self.detections), justify="right")
        for header, mean in columns.items():
            table.add_column(header, _percent(mean), justify="right")
        for row in self.per_class:
            figures = [row.AP, row.AP50, row.voc07, row.voc12]
            if row.mask_AP is not None and row.mask_AP50 is not None:
                figures += [row.mask_AP, row.mask_AP50]
            table.add_row(escape(row.name), str(row.targets), str(row.detections), *map(_percent, figures))
        return table


@dataclass(frozen=True)
class _Image:
    """One image's detections and ground truths without their masks, which stand beside as run lengths."""

    found: Detections
    target: Target
    found_masks: list[mask_coding.Rle] | None
    target_masks: list[mask_coding.Rle] | None


class DetectionEvaluator:
    """Collects the detections and ground truths of a data set, batch by batch, and scores them.

    The scores do not depend on the order in which the images come. Masks are scored too where ground truths and
    detections have them; they are kept as run lengths, since those of a whole data set would fill the memory.

    Args:
        classes: the classes of the data set; labels index it.
        max_detections: COCO counts only so many of the best-scored detections of each class in each image, 100 in
            the literature. The VOC figures count all.
        max_kept: the most detections of an image that the head gives, of all classes; for the report alone.

    Raises:
        ValueError: `max_detections` is not above 10, which COCO's AR_10 needs.
    """

    def __init__(self, classes: ClassList, *, max_detections: int = 100, max_kept: int | None = None) -> None:
        if max_detections <= 10:
            raise ValueError(f"max_detections must be above 10, which COCO's AR_10 needs, but is {max_detections}")
        self.classes = classes
        self.max_kept = max_kept
        self.max_detections = max_detections
        self._images: dict[int | str, _Image] = {}
        self._metas: list[Meta] = []

    def update(self, detections: Sequence[Detections], targets: Sequence[Target], metas: Sequence[Meta]) -> None:
        """Add one batch.

        Args:
            detections: one for each image, boxes in pixels of the source.
            targets: one for each image, in the same pixels; crowd and difficult regions have masks as well as others.
            metas: one for each image; their image ids must differ over the whole data set.

        Raises:
            ValueError: the three differ in length, or a detection has a label out of range, a box or score that is
                not finite, or a mask of another size than the ground truth's.
            DataError: an image came twice, or a ground truth has a label out of range.
        """
        if not len(detections) == len(targets) == len(metas):
            raise ValueError(
                f"a batch needs equally many of each, but has {len(detections)} detections, {len(targets)} targets "
                f"and {len(metas)} metas"
            )
        for found, target, meta in zip(detections, targets, metas):
            found, target = found.to("cpu"), target.to("cpu")
            self._check(found, target, meta)
            found_masks, target_masks = _run_lengths(found), _run_lengths(target)
            found = replace(found, masks=None, mask_patches=None)
            self._images[meta.image_id] = _Image(found, replace(target, masks=None), found_masks, target_masks)
            self._metas.append(meta)

    def results(self) -> list[dict[str, Any]]:
        """All detections as COCO's result records, image after image as they came; see `coco_results`."""
        images = (self._images[meta.image_id] for meta in self._metas)
        return [
            record
            for meta, image in zip(self._metas, images)
            for record in _result_records(image.found, image.found_masks, meta, self.classes)
        ]

    def compute(self) -> DetectionScores:
        """Score all that was added.

        Raises:
            DataError: no image was added.
            ValueError: detections have masks in some images, but not in others, or ground truths have.
        """
        if not self._images:
            raise DataError("There is nothing to score: not one image was evaluated. Does the data set hold any?")
        # The order breaks ties between scores. Sorted ids are pycocotools' order, and no loader's accident.
        ids = sorted(self._images, key=lambda image_id: (isinstance(image_id, str), image_id))
        images = [self._images[image_id] for image_id in ids]
        detections, targets = [image.found for image in images], [image.target for image in images]
        precision, recall = _coco_precision_and_recall(images, len(self.classes), self.max_detections)
        eleven, area = voc_average_precisions(detections, targets, len(self.classes))
        rows = self._per_class(detections, targets, precision, eleven, area)
        masks = None
        if _masks_everywhere(images):
            mask_precision, mask_recall = _coco_precision_and_recall(
                images, len(self.classes), self.max_detections, masks=True
            )
            masks = _twelve_figures(mask_precision, mask_recall, self.max_detections)
            rows = tuple(
                replace(row, mask_AP=_class_ap(mask_precision, label), mask_AP50=_class_ap(mask_precision[:1], label))
                for label, row in enumerate(rows)
            )
        return DetectionScores(
            coco=_twelve_figures(precision, recall, self.max_detections),
            voc07=_mean_of(eleven),
            voc12=_mean_of(area),
            per_class=rows,
            images=len(ids),
            targets=sum(row.targets for row in rows),
            ignored=sum(int(target.ignored.sum()) for target in targets),
            detections=sum(row.detections for row in rows),
            masks=masks,
            limits=self._limits(images),
        )

    def _limits(self, images: list[_Image]) -> str:
        """A sentence that says how many objects and detections the limits keep from counting; empty for none."""
        count, limit, kept = len(self.classes), self.max_detections, self.max_kept
        crowded = cut = 0
        for image in images:
            objects = torch.bincount(image.target.labels[~image.target.ignored], minlength=count)
            found = torch.bincount(image.found.labels, minlength=count)
            crowded += int(objects.max()) > limit or (kept is not None and int(objects.sum()) > kept)
            cut += int((found - limit).clamp(min=0).sum())
        if not crowded and not cut:
            return ""
        of_head = "" if kept is None else f", of {kept} that the head gives for an image"
        return (
            f"{counted(crowded, 'image')} with more objects than can be found, and {counted(cut, 'detection')} not "
            f"counted: COCO's figures count the best {limit} of each class in an image{of_head}. train.max_dets raises "
            f"both limits."
        )

    def _check(self, found: Detections, target: Target, meta: Meta) -> None:
        """Refuse what would score wrongly without a sign of it."""
        if meta.image_id in self._images:
            raise DataError(
                f"The image id {meta.image_id!r} was evaluated twice, the second time from {meta.source}. Ids must be "
                f"unique over the data set, and each image evaluated once."
            )
        count = len(self.classes)
        for what, labels, error in (("detection", found.labels, ValueError), ("target", target.labels, DataError)):
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
        if found.masks is not None and target.masks is not None and found.masks.shape[1:] != target.masks.shape[1:]:
            raise ValueError(
                f"The detections of image {meta.image_id!r} ({meta.source}) have masks of "
                f"{tuple(found.masks.shape[1:])}, the targets of {tuple(target.masks.shape[1:])}: both must have the "
                f"size of the source."
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
        ground_truths = torch.bincount(
            torch.cat([target.labels[~target.ignored] for target in targets]), minlength=count
        )
        found = torch.bincount(torch.cat([found.labels for found in detections]), minlength=count)
        return tuple(
            ClassScores(
                name=name,
                targets=int(ground_truths[label]),
                detections=int(found[label]),
                AP=_class_ap(precision, label),
                AP50=_class_ap(precision[:1], label),
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
        N records in the same order: image_id, category_id (the raw id), bbox [x, y, width, height] in pixels, score,
        of detections with masks segmentation, compressed run lengths, and of those with points keypoints, [x, y, 2] of
        each. The floats are not rounded, so that scoring
        the file gives the scores of `DetectionEvaluator`. (Before pycocotools scores segmentations, take the boxes out
        of the records: it takes an object's area from a box that is there.)

    Raises:
        ValueError: a label is out of range.
    """
    records = _result_records(detections, _run_lengths(detections), meta, classes)
    if detections.points is not None:
        for record, points in zip(records, detections.points.tolist()):
            record["keypoints"] = [value for x, y in points for value in (x, y, 2)]
    return records


def _result_records(
    detections: Detections, masks: list[mask_coding.Rle] | None, meta: Meta, classes: ClassList
) -> list[dict[str, Any]]:
    labels = detections.labels.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(
            f"The detections of {meta.source} have labels {min(labels)} to {max(labels)}, but there are "
            f"{len(classes)} classes: {classes}."
        )
    records: list[dict[str, Any]] = [
        {
            "image_id": meta.image_id,
            "category_id": classes.raw_ids[label],
            "bbox": bbox,
            "score": score,
        }
        for label, bbox, score in zip(labels, _xywh(detections.boxes), detections.scores.tolist())
    ]
    for record, mask in zip(records, masks or []):
        record["segmentation"] = mask
    return records


def _run_lengths(objects: Detections | Target) -> list[mask_coding.Rle] | None:
    return None if objects.masks is None else [mask_coding.encode(mask) for mask in objects.masks.cpu().numpy()]


def _masks_everywhere(images: list[_Image]) -> bool:
    """Whether ground truths and detections have masks; images without any object tell nothing.

    Raises:
        ValueError: some have, and others have not.
    """
    targets = {image.target_masks is not None for image in images if len(image.target)}
    found = {image.found_masks is not None for image in images if len(image.found)}
    for what, have in (("targets", targets), ("detections", found)):
        if len(have) > 1:
            raise ValueError(f"the {what} of some images have masks, those of others do not; nothing can be scored")
    # Where nothing was detected at all, or there is no object to find, the other side decides.
    return targets | found == {True}


def _coco_precision_and_recall(
    images: list[_Image], num_classes: int, max_detections: int, masks: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision (10 IoUs, 101 recalls, C, 4 areas, 3 counts) and recall (10, C, 4, 3); -1 is undefined."""
    from faster_coco_eval import COCO, COCOeval_faster

    targets = [record for number, image in enumerate(images, 1) for record in _target_records(image, number, masks)]
    found = [record for number, image in enumerate(images, 1) for record in _found_records(image, number, masks)]
    # COCO reads id 0 as "not matched", so annotations count from 1.
    for records in (targets, found):
        for number, record in enumerate(records, 1):
            record["id"] = number
    sizes = [_size(image) if masks else {} for image in images]
    entries = [{"id": number, **size} for number, size in enumerate(sizes, 1)]
    categories = [{"id": label} for label in range(num_classes)]
    evaluation = COCOeval_faster(
        COCO({"images": entries, "categories": categories, "annotations": targets}),
        COCO({"images": entries, "categories": categories, "annotations": found}),
        iouType="segm" if masks else "bbox",
    )
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _size(image: _Image) -> dict[str, int]:
    """Height and width by COCO's names, of an image that holds masks."""
    masks = image.target_masks or image.found_masks
    return {"height": masks[0]["size"][0], "width": masks[0]["size"][1]} if masks else {}


def _target_records(image: _Image, number: int, masks: bool) -> list[dict[str, Any]]:
    """The ground truths of one image; by a mask instead of a box for scoring masks."""
    target = image.target
    difficult = target.difficult & ~target.crowd
    area = torch.where(difficult, AREA_BEYOND_ALL_RANGES, target.area.double())
    shapes = [{"segmentation": mask} for mask in image.target_masks or []] if masks else _boxes_of(target)
    fields = (target.labels.tolist(), area.tolist(), target.crowd.int().tolist(), shapes)
    return [
        {"image_id": number, "category_id": label, "area": size, "iscrowd": crowd, **shape}
        for label, size, crowd, shape in zip(*fields, strict=True)
    ]


def _found_records(image: _Image, number: int, masks: bool) -> list[dict[str, Any]]:
    """The detections of one image; by a mask and its area instead of a box and its area for scoring masks."""
    shapes = _boxes_of(image.found)
    areas = [shape["bbox"][2] * shape["bbox"][3] for shape in shapes]
    if masks:
        shapes = [{"segmentation": mask} for mask in image.found_masks or []]
        areas = [mask_coding.area(mask) for mask in image.found_masks or []]
    fields = (image.found.labels.tolist(), image.found.scores.tolist(), areas, shapes)
    return [
        {"image_id": number, "category_id": label, "area": size, "iscrowd": 0, "score": score, **shape}
        for label, score, size, shape in zip(*fields, strict=True)
    ]


def _boxes_of(objects: Detections | Target) -> list[dict[str, Any]]:
    return [{"bbox": bbox} for bbox in _xywh(objects.boxes)]


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


def _class_ap(precision: np.ndarray, label: int) -> float:
    """Average precision of one class over the IoUs of `precision`."""
    return _mean_of(precision[:, :, label, 0, -1])


def _mean_of(values: np.ndarray) -> float:
    """The mean without the undefined, which are -1 in COCO's arrays and nan in ours; nan where nothing is left."""
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def _xywh(boxes: torch.Tensor) -> list[list[float]]:
    """(N, 4) xyxy as [x, y, width, height]; subtracted in float64, so that nothing is rounded off."""
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()


def _all_but_the_first_two(figures: dict[str, float]) -> str:
    """COCO's figures in one line, without mAP and mAP50, which stand in the table."""
    return "  ".join(f"{name} {_percent(value)}" for name, value in list(figures.items())[2:])


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
