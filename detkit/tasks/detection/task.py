"""Object detection and instance segmentation: COCO's and VOC's figures, images with boxes, YOLO text, crops."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from detkit.boxes.convert import xyxy_to_cxcywh
from detkit.data.dataset import Dataset
from detkit.data.transforms import undo
from detkit.errors import ConfigError, DataError, nearest
from detkit.heads.base import Head, Postprocess
from detkit.io.files import safe_name, write_text
from detkit.registry import tasks
from detkit.structures import ClassList, Detections, Meta, Target
from detkit.tasks.base import Scores, Task
from detkit.tasks.detection.metrics import DetectionEvaluator, DetectionScores, coco_results
from detkit.tasks.drawing import compare, draw_detections, draw_targets, write_image
from detkit.tasks.options import DEFAULT_CONF, PredictOptions

SHOWN_SCORE = 0.4
UNLIMITED = 1_000_000


@tasks.register("detect")
class Detect(Task[Detections]):
    """Boxes with classes, and masks where the head finds them."""

    noun: ClassVar[str] = "detections"
    options: ClassVar[frozenset[str]] = frozenset(
        {"conf", "iou", "max_det", "classes", "save_txt", "save_conf", "save_crop"}
    )

    def figures(self, head: Head) -> tuple[str, ...]:
        boxes = ("mAP", "mAP50", "mAP75")
        return (*boxes, "mask_mAP", "mask_mAP50") if "masks" in head.needs else boxes

    def score(self, scores: Scores, head: Head) -> float:
        assert isinstance(scores, DetectionScores)
        return scores.decisive["mAP"]

    def evaluator(self, classes: ClassList, head: Head) -> DetectionEvaluator:
        return DetectionEvaluator(classes, max_kept=head.postprocess.max_detections)

    def scoring(
        self, classes: ClassList, head: Head, max_dets: int | None
    ) -> tuple[DetectionEvaluator, Postprocess | None]:
        if max_dets is None:
            return self.evaluator(classes, head), None
        default = head.postprocess
        kept = max(default.max_detections, max_dets)
        decoding = replace(default, max_candidates=max(default.max_candidates, max_dets), max_detections=kept)
        return DetectionEvaluator(classes, max_detections=max_dets, max_kept=kept), decoding

    def check_max_dets(self, max_dets: int | None) -> None:
        pass

    def undo(self, prediction: Detections, meta: Meta, class_names: tuple[str, ...]) -> Detections:
        return replace(undo(prediction, meta), class_names=class_names)

    def describe(self, prediction: Detections) -> str:
        counts = Counter(str(name) for _, _, name in prediction)
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing found"

    def records(self, prediction: Detections, meta: Meta, classes: ClassList) -> list[dict[str, Any]]:
        return coco_results(prediction, meta, classes)

    def draw(self, image: np.ndarray, prediction: Detections) -> np.ndarray:
        return draw_detections(image, prediction)

    def draw_target(self, image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
        return draw_targets(image, target, class_names)

    def decoding(self, head: Head, options: PredictOptions, class_names: tuple[str, ...]) -> Postprocess:
        default, wanted = head.postprocess, _labels(options.classes, class_names)
        kept = default.max_detections if options.max_det is None else options.max_det
        return replace(
            default,
            score_threshold=DEFAULT_CONF if options.conf is None else options.conf,
            iou_threshold=default.iou_threshold if options.iou is None else options.iou,
            max_candidates=max(default.max_candidates, kept),
            # Classes are selected afterwards: those left out must not use up the places.
            max_detections=kept if wanted is None else UNLIMITED,
        )

    def select(
        self, prediction: Detections, head: Head, options: PredictOptions, class_names: tuple[str, ...]
    ) -> Detections:
        wanted = _labels(options.classes, class_names)
        if wanted is None:
            return prediction
        kept = head.postprocess.max_detections if options.max_det is None else options.max_det
        return prediction[torch.isin(prediction.labels, wanted)].best(kept)

    def shown(self, prediction: Detections) -> Detections:
        return prediction[prediction.scores > SHOWN_SCORE]

    def compare(
        self, image: np.ndarray, prediction: Detections, target: Target, class_names: Sequence[str]
    ) -> np.ndarray:
        return compare(image, prediction, target, class_names)

    def enlarged(self, prediction: Detections, factor: int) -> Detections:
        masks = prediction.masks
        if masks is not None:
            masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        points = None if prediction.points is None else prediction.points * factor
        return replace(prediction, boxes=prediction.boxes * factor, masks=masks, points=points)

    def write(
        self, output: Path, name: str, image: np.ndarray, prediction: Detections, meta: Meta, options: PredictOptions
    ) -> None:
        if options.save_txt:
            _write_text(output / "labels" / f"{name}.txt", prediction, meta.size, options.save_conf)
        if options.save_crop:
            _write_crops(output / "crops", name, image, prediction)

    def check_data(self, dataset: Dataset, split: str) -> None:
        if not any((~dataset.target(index).ignored).any() for index in range(len(dataset))):
            raise DataError(
                f"No image of the split '{split}' has an object that counts, so there is nothing to learn or to "
                f"score. Check what the data call this split, and its annotations.{dataset.problems.reasons()}"
            )


def _labels(classes: Any, class_names: tuple[str, ...]) -> torch.Tensor | None:
    """The labels of PredictOptions.classes; None for all.

    Raises:
        ConfigError: the model has no such class.
    """
    if classes is None:
        return None
    labels = []
    for given in classes:
        if given in class_names:
            labels.append(class_names.index(given))
        elif str(given).isdecimal() and int(given) < len(class_names):
            labels.append(int(given))
        else:
            raise ConfigError(f"'{given}' is not a class of this model. {nearest(str(given), class_names)}")
    return torch.tensor(labels)


def _write_text(path: Path, found: Detections, size: tuple[int, int], with_score: bool) -> None:
    """YOLO's text: `class cx cy w h [score]`, normalised to 0..1; an empty file for no detections."""
    height, width = size
    lines = []
    centres = xyxy_to_cxcywh(found.boxes).tolist()
    for (x, y, w, h), score, label in zip(centres, found.scores.tolist(), found.labels.tolist()):
        line = f"{label} {x / width:.6f} {y / height:.6f} {w / width:.6f} {h / height:.6f}"
        lines.append(f"{line} {score:.6f}" if with_score else line)
    write_text(path, "".join(f"{line}\n" for line in lines), durable=False)


def _write_crops(folder: Path, name: str, image: np.ndarray, found: Detections) -> None:
    """One file for each detection, in a folder for each class."""
    height, width = image.shape[:2]
    for number, (box, _, class_name) in enumerate(found, start=1):
        left, top = int(box[0]), int(box[1])
        right, bottom = min(width, max(left + 1, round(box[2]))), min(height, max(top + 1, round(box[3])))
        crop = image[min(top, height - 1) : bottom, min(left, width - 1) : right]
        write_image(folder / safe_name(str(class_name)) / f"{name}_{number}.jpg", crop)
