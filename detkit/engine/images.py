"""Images for a run's folder: the first training batch, and predictions on validation images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.data.loader import Key, collate
from detkit.engine.run_folder import RunFolder
from detkit.errors import DataError
from detkit.inference.windows import predict
from detkit.model import Model, load_model
from detkit.structures import ClassList, Sample, Target
from detkit.tasks.base import Task, task_of
from detkit.tasks.drawing import grid, write_image

MIN_LABELLED_SIDE = 320


def write_training_batch(reader: Any, task: Task[Any], path: Path, classes: ClassList, count: int = 12) -> None:
    """Write the first training images after augmentation, with their ground truth.

    Raises:
        DataError: one of the images cannot be read.
    """
    images = []
    for index in range(min(count, len(reader.dataset))):
        fitted = reader[Key(0, index)]
        if isinstance(fitted, DataError):
            raise fitted
        pixels = (fitted.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        factor = _enlargement(pixels)
        target = _enlarge_target(fitted.target, factor)
        images.append(task.draw_target(_enlarge(pixels, factor), target, classes.names))
    write_image(path, grid(images, columns=4))


def write_predictions(folder: RunFolder, dataset: Dataset, count: int = 8) -> None:
    """Write validation images, spread over the set, with ground truth beside the best checkpoint's predictions."""
    model = load_model(folder.best)
    task = task_of(model.head)
    names = dataset.classes.names
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        sample = dataset[index]
        factor = _enlargement(sample.image)
        found = task.enlarged(task.shown(predict_sample(model, task, sample)), factor)
        target = _enlarge_target(sample.target, factor)
        image = task.compare(_enlarge(sample.image, factor), found, target, names)
        write_image(folder.images / f"val_{index:05d}.jpg", image)


@torch.inference_mode()
def predict_sample(model: Model, task: Task[Any], sample: Sample) -> Any:
    """Predict one sample, in source pixels."""
    batch = collate([model.fit(sample)], model.fit)
    return task.undo(predict(model, batch)[0], batch.metas[0], model.classes.names)


def _enlargement(image: np.ndarray) -> int:
    """Return the factor that makes labels on a very small image readable; 1 for other images."""
    return -(-MIN_LABELLED_SIDE // max(image.shape[:2])) if max(image.shape[:2]) < MIN_LABELLED_SIDE else 1


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _enlarge_target(target: Target, factor: int) -> Target:
    """Scale a target like `_enlarge` scales its image."""

    def repeated(pixels: torch.Tensor | None) -> torch.Tensor | None:
        if pixels is None:
            return None
        return pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)

    return replace(
        target,
        boxes=target.boxes * factor,
        points=None if target.points is None else target.points * factor,
        masks=repeated(target.masks),
        semantic=repeated(target.semantic),
    )
