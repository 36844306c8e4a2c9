"""Pictures that show a person what a run learns from and what it has learned."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.data.transforms import undo
from detkit.draw import compare, draw_targets, grid, write_image
from detkit.engine.run_folder import RunFolder
from detkit.model import Model, load_model
from detkit.types import ClassList, Detections

SHOWN_SCORE = 0.4


def write_training_batch(reader: Any, path: Path, classes: ClassList, count: int = 12) -> None:
    """The first training pictures as the network gets them, augmented, with their boxes."""
    pictures = []
    for index in range(min(count, len(reader.dataset))):
        image, _, target, _ = reader[0, index]
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        pictures.append(draw_targets(pixels, target, classes.names))
    write_image(path, grid(pictures, columns=4))


def write_predictions(folder: RunFolder, dataset: Dataset, count: int = 8) -> None:
    """Validation pictures, truth beside what the best checkpoint finds, spread over the set."""
    model = load_model(folder.best)
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        sample = dataset[index]
        found = predict_one(model, sample)
        name = Path(sample.meta.source).stem.replace(":", "_").replace("/", "_")
        picture = compare(sample.image, found[found.scores > SHOWN_SCORE], sample.target, dataset.classes.names)
        write_image(folder.pictures / f"val_{name}.jpg", picture)


@torch.inference_mode()
def predict_one(model: Model, sample: Any) -> Detections:
    """Detections of one sample in its own pixels."""
    image, inner, _, meta = model.fit(sample)
    outputs = model(image[None], (inner,))
    return undo(model.head.decode(outputs)[0], meta)
