"""Trainings on eight photographs until a model knows them by heart."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from detkit.boxes import pairwise_iou, xyxy_to_cxcywh
from detkit.data.dataset import Dataset
from detkit.engine.evaluate import evaluate
from detkit.model import build_model
from detkit.structures import Sample, Target

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GRID = 7  # YOLOv1's own


class Chosen(Dataset):
    """The first eight images of a data set whose ground truth `suits`, given with the (height, width) of its image."""

    def __init__(self, data: Dataset, suits: Callable[[Target, tuple[int, int]], bool]) -> None:
        self.data, self.classes, self.fields = data, data.classes, data.fields
        suiting = (index for index in range(len(data)) if suits(data.target(index), data.size(index)))
        self.indices = list(islice(suiting, 8))
        assert len(self) == 8

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.data[self.indices[index]]

    def target(self, index: int) -> Target:
        return self.data.target(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.data.size(self.indices[index])


def learnable(target: Target, size: tuple[int, int]) -> bool:
    """Whether all heads can find all objects: no two centres in one cell of YOLOv1's grid, of which it would learn one
    alone, and no two objects of a class so near that suppression would take one of them."""
    cells = (xyxy_to_cxcywh(target.boxes)[:, :2] * GRID / torch.tensor([size[1], size[0]])).long()
    overlaps = pairwise_iou(target.boxes, target.boxes).fill_diagonal_(0) * (target.labels[:, None] == target.labels)
    return len(cells.unique(dim=0)) == len(target) and float(overlaps.max()) < 0.3


def shared(folder: str) -> str:
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the shared data {DATA / folder}")
    return str(DATA / folder)


def overfit(experiment: Any, data: Dataset, steps: int, lr: float) -> float:
    """mAP50 on the eight images after `steps` on all of them at once, the learning rate falling to 0 at last."""
    torch.manual_seed(0)
    model = build_model(experiment, data.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    fitted = [model.fit(data[index]) for index in range(8)]
    images = torch.stack([image.image for image in fitted])
    sizes, targets = tuple(image.size for image in fitted), tuple(image.target for image in fitted)
    for _ in range(steps):
        losses = model.train().head.loss(model(images, sizes), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    return float(evaluate(model, data, batch_size=8, workers=0).scores.coco["mAP50"])
