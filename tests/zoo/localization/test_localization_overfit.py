"""Localisation and sliding windows learn eight photographs by heart, with Darknet's tiny network."""

from typing import Any

import pytest
import torch
from overfitting import Chosen, learnable, overfit, shared

from detkit.boxes import pairwise_iou
from detkit.data.formats.coco import Coco
from detkit.model import build_model
from detkit.structures import Target

pytest.importorskip("detkit.zoo.darknet")


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
