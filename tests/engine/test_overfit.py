"""Each one-stage head learns eight photographs by heart: loss, decoding and scores agree about real data."""

from typing import Any

import pytest
from overfitting import Chosen, learnable, overfit, shared
from zoo_cases import zoo_cases

from detkit.data.formats.voc import Voc

DETECTORS = {
    "yolox": (
        "{name: csp_darknet, depth: 0.1, width: 0.25}",
        "{name: pafpn, depth: 0.1}",
        "{name: yolox, l1_weight: 1.0}",
    ),
    **zoo_cases("LEARNING"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_learns_eight_images_of_blood_cells(tiny: Any, name: str) -> None:
    data = Chosen(Voc(shared("bccd"), "train", broken="repair"), learnable)
    backbone, neck, head = DETECTORS[name]
    experiment = tiny("--backbone", backbone, "--neck", neck, "--head", head, "--input.size", "[224, 288]")
    assert sum(len(data.target(index)) for index in range(8)) > 80
    assert overfit(experiment, data, steps=300 if name == "yolox" else 200, lr=3e-3) > 0.95
