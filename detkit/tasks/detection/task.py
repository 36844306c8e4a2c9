"""Object detection and instance segmentation: COCO's and VOC's figures, images with boxes, YOLO text, crops."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from detkit.boxes.convert import xyxy_to_cxcywh
from detkit.data.dataset import Dataset
from detkit.data.transforms import undo
from detkit.errors import ConfigError, DataError, nearest
from detkit.heads.base import Head
from detkit.inference.options import check_options
from detkit.io.files import safe_name, write_text
from detkit.registry import tasks
from detkit.structures import ClassList, Detections, Meta, Target
from detkit.tasks.base import Scores, Task
from detkit.tasks.detection.metrics import DetectionEvaluator, DetectionScores, coco_results
from detkit.tasks.drawing import compare, draw_detections, draw_targets, write_image

SHOWN_SCORE = 0.4
UNLIMITED = 1_000_000


@tasks.register("detect")
class Detect(Task[Detections]):
    """Boxes with classes, and masks where the head finds them."""

    noun: ClassVar[str] = "detections"
    options: ClassVar[Mapping[str, Any]] = {
        "conf": 0.25,
        "iou": None,
        "max_det": None,
        "classes": None,
        "save_txt": False,
        "save_conf": False,
        "save_crop": False,
    }

    def figures(self, head: Head) -> tuple[str, ...]:
        boxes = ("mAP", "mAP50", "mAP75")
        return (*boxes, "mask_mAP", "mask_mAP50") if "masks" in head.needs else boxes

    def score(self, scores: Scores, head: Head) -> float:
        assert isinstance(scores, DetectionScores)
        return scores.decisive["mAP"]

    def evaluator(self, classes: ClassList, head: Head) -> DetectionEvaluator:
        return DetectionEvaluator(classes, max_kept=head.postprocess.max_detections)

    @contextmanager
    def scoring(self, classes: ClassList, head: Head, max_dets: int | None) -> Iterator[DetectionEvaluator]:
        if max_dets is None:
            yield self.evaluator(classes, head)
            return
        default = head.postprocess
        kept = max(default.max_detections, max_dets)
        head.postprocess = replace(default, max_candidates=max(default.max_candidates, max_dets), max_detections=kept)
        try:
            yield DetectionEvaluator(classes, max_detections=max_dets, max_kept=kept)
        finally:
            head.postprocess = default

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

    @contextmanager
    def limited(
        self, head: Head, class_names: tuple[str, ...], options: Mapping[str, Any]
    ) -> Iterator[Callable[[Detections], Detections]]:
        check_options(options)
        conf, iou, max_det = options["conf"], options["iou"], options["max_det"]
        wanted = None if options["classes"] is None else _labels(options["classes"], class_names)
        default = head.postprocess
        kept = default.max_detections if max_det is None else max_det
        head.postprocess = replace(
            default,
            score_threshold=conf,
            iou_threshold=default.iou_threshold if iou is None else iou,
            max_candidates=max(default.max_candidates, kept),
            # Where classes are chosen afterwards, those left out must not use up the places.
            max_detections=kept if wanted is None else UNLIMITED,
        )
        try:
            yield lambda found: found if wanted is None else found[torch.isin(found.labels, wanted)].best(kept)
        finally:
            head.postprocess = default

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
        self, output: Path, name: str, image: np.ndarray, prediction: Detections, meta: Meta, options: Mapping[str, Any]
    ) -> None:
        if options["save_txt"]:
            _write_text(output / "labels" / f"{name}.txt", prediction, meta.size, options["save_conf"])
        if options["save_crop"]:
            _write_crops(output / "crops", name, image, prediction)

    def check_data(self, dataset: Dataset, split: str) -> None:
        if not any((~dataset.target(index).ignored).any() for index in range(len(dataset))):
            raise DataError(
                f"No image of the split '{split}' has an object that counts, so there is nothing to learn or to "
                f"score. Check what the data call this split, and its annotations.{dataset.problems.reasons()}"
            )


def _labels(classes: Sequence[str | int], class_names: tuple[str, ...]) -> torch.Tensor:
    """The labels of classes, given by their names or labels."""
    labels = []
    for given in classes:
        if given in class_names:
            labels.append(class_names.index(str(given)))
        elif str(given).isdigit() and int(given) < len(class_names):
            labels.append(int(given))
        else:
            raise ConfigError(f"'{given}' is no class of this model. {nearest(str(given), class_names)}")
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
