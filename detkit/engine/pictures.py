"""Pictures that show a person what a run learns from and what it has learned."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.data.loader import Key, collate
from detkit.data.transforms import undo
from detkit.draw import compare, draw_targets, grid, write_image
from detkit.engine.run_folder import RunFolder
from detkit.model import Model, load_model
from detkit.types import ClassList, Detections, Sample, Target

Objects = TypeVar("Objects", Detections, Target)

SHOWN_SCORE = 0.4
SMALLEST_SIDE = 320


def write_training_batch(reader: Any, path: Path, classes: ClassList, count: int = 12) -> None:
    """The first training pictures as the network gets them, augmented, with their boxes and masks."""
    pictures = []
    for index in range(min(count, len(reader.dataset))):
        fitted = reader[Key(0, index)]
        pixels = (fitted.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        factor = _enlargement(pixels)
        target = _enlarge_objects(fitted.target, factor)
        pictures.append(draw_targets(_enlarge(pixels, factor), target, classes.names))
    write_image(path, grid(pictures, columns=4))


def write_predictions(folder: RunFolder, dataset: Dataset, count: int = 8) -> None:
    """Validation pictures, truth beside what the best checkpoint finds, spread over the set."""
    model = load_model(folder.best)
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        sample = dataset[index]
        found = predict_sample(model, sample)
        found = found[found.scores > SHOWN_SCORE]
        factor = _enlargement(sample.image)
        found, truth = _enlarge_objects(found, factor), _enlarge_objects(sample.target, factor)
        picture = compare(_enlarge(sample.image, factor), found, truth, dataset.classes.names)
        write_image(folder.pictures / f"val_{index:05d}.jpg", picture)


@torch.inference_mode()
def predict_sample(model: Model, sample: Sample) -> Detections:
    """Detections of one sample in its own pixels."""
    batch = collate([model.fit(sample)], model.fit)
    return undo(model.head.decode(model(batch.images, batch.sizes, batch.proposals))[0], batch.metas[0])


def _enlargement(image: np.ndarray) -> int:
    """By how much a picture must grow for its labels to be read; 1 for all but very small ones."""
    return -(-SMALLEST_SIDE // max(image.shape[:2])) if max(image.shape[:2]) < SMALLEST_SIDE else 1


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _enlarge_objects(objects: Objects, factor: int) -> Objects:
    """Boxes and masks for the picture that `_enlarge` makes."""
    masks = objects.masks
    if masks is not None:
        masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return replace(objects, boxes=objects.boxes * factor, masks=masks)
