"""Each one-stage head learns eight photographs by heart: loss, decoding and scores agree about real data."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from detkit.boxes import pairwise_iou, xyxy_to_cxcywh
from detkit.data.dataset import Dataset
from detkit.data.formats.coco import Coco
from detkit.data.formats.voc import Voc
from detkit.engine.evaluate import evaluate
from detkit.model import build_model
from detkit.structures import Sample, Target

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GRID = 7  # YOLOv1's own

CELLS = "{name: darknet_tiny, levels: [3, 4], widths: [12, 24, 48, 64, 96, 96, 96]}"
DETECTORS = {
    "yolov1": (
        "{name: darknet_tiny, levels: [4], widths: [12, 24, 48, 64, 96, 8, 8]}",
        "null",
        f"{{name: yolov1, grid: {GRID}, hidden: 512, dropout: 0.0}}",
    ),
    "yolov2": (CELLS, "null", "{name: yolov2, width: 96, passthrough: 16, anchors: [[20, 20], [50, 50], [80, 80]]}"),
    "yolov3": (
        CELLS,
        "{name: yolov3_neck, widths: [48, 64], depths: [1]}",
        "{name: yolov3, anchors: [[15, 15], [25, 25], [40, 40], [50, 50], [65, 65], [90, 90]]}",
    ),
    "retinanet": (
        CELLS,
        "{name: fpn, width: 64, norm: true}",
        "{name: retinanet, depth: 1, norm: true, anchors: {name: pyramid, sizes: [[16, 24, 36], [48, 64, 90]]}}",
    ),
    "yolox": (
        "{name: csp_darknet, depth: 0.1, width: 0.25}",
        "{name: pafpn, depth: 0.1}",
        "{name: yolox, l1_weight: 1.0}",
    ),
}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_learns_eight_images_of_blood_cells(tiny: Any, name: str) -> None:
    data = Chosen(Voc(shared("bccd"), "train", broken="repair"), learnable)
    backbone, neck, head = DETECTORS[name]
    experiment = tiny("--backbone", backbone, "--neck", neck, "--head", head, "--input.size", "[224, 288]")
    assert sum(len(data.target(index)) for index in range(8)) > 80
    assert overfit(experiment, data, steps=300 if name == "yolox" else 200, lr=3e-3) > 0.95


@pytest.mark.slow
def test_localisation_learns_eight_images_of_one_pedestrian_each(tiny: Any) -> None:
    """Its answer to more than one object in an image is one, so that they could not be found."""
    pedestrians = Coco(shared("pennfudan"), "train", images="images/{split}")
    data = Chosen(pedestrians, lambda target, size: len(target) == 1)
    backbone = "{name: darknet_tiny, levels: [4], widths: [12, 24, 48, 64, 96, 8, 8]}"
    experiment = tiny("--backbone", backbone, "--head", "{name: localize}", "--input.size", "[160, 160]")
    assert overfit(experiment, data, steps=200, lr=3e-3) > 0.95


@pytest.mark.slow
def test_sliding_windows_learn_eight_images_of_pedestrians_that_fill_one(tiny: Any) -> None:
    """Its boxes are the windows themselves: an object that overlaps none by much more than half could not be found."""
    pedestrians = Coco(shared("pennfudan"), "train", images="images/{split}")
    options = "windows: [[8, 4], [10, 4], [6, 3]], width: 64, foreground_from: 0.6, background_below: 0.5"
    experiment = tiny(
        *("--backbone", "{name: darknet_tiny, levels: [4], widths: [12, 24, 48, 64, 96, 8, 8]}"),
        *("--head", f"{{name: sliding_window, {options}}}"),
        *("--input.size", "[224, 224]"),
    )
    model = build_model(experiment, pedestrians.classes)
    windows = model.eval()(torch.zeros(1, 3, 224, 224), ((224, 224),)).windows

    def fills_windows(target: Target, size: tuple[int, int]) -> bool:
        inside = target.boxes * 224 / torch.tensor([size[1], size[0]] * 2)
        return bool((pairwise_iou(inside, windows).amax(1) > 0.6).all()) and learnable(target, size)

    data = Chosen(pedestrians, fills_windows)
    assert sum(len(data.target(index)) for index in range(8)) > 8
    assert overfit(experiment, data, steps=200, lr=3e-3) > 0.95
