"""Checkpoints and configs of the style head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detkit.config import experiment_from_dict, experiment_to_dict, load_experiment
from detkit.errors import CheckpointError
from detkit.model import build_model, load_model
from detkit.structures import ClassList

STYLE = {"backbone": {"name": "pixels"}, "head": {"name": "style", "width": 4, "blocks": 1}}


def experiment(**parts: Any) -> Any:
    return experiment_from_dict({"data": {"name": "coco"}, "input": {"size": [64, 64]}, **parts})


def test_a_style_checkpoint_loads_without_its_default_weights(no_network: list[str], tmp_path: Path) -> None:
    """The head's loss network is VGG-19 with its ImageNet weights, unless a config names another."""
    with pytest.raises(CheckpointError, match=r"ImageNet weights of 'vgg19' could not be downloaded"):
        build_model(experiment(**STYLE), ClassList((), ()))
    assert no_network
    no_network.clear()
    model = build_model(experiment(**STYLE), ClassList((), ()), load_weights=False)
    nn.init.normal_(model.head.network.features[0].weight)  # type: ignore[union-attr,index,arg-type]
    model.save(tmp_path / "style.safetensors")
    loaded = load_model(tmp_path / "style.safetensors")
    assert torch.equal(
        loaded.head.network.features[0].weight,
        model.head.network.features[0].weight,  # type: ignore[union-attr,index]
    )
    assert loaded.experiment == model.experiment
    assert not no_network


def test_names_of_the_first_version_keep_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "style.yaml"
    config.write_text(
        "data: {name: pictures, root: photos}\nbackbone: {name: pixels}\n"
        "head: {name: style, picture: paint.png, picture_size: 64}\n"
    )
    experiment = load_experiment([str(config)])
    assert experiment.data["name"] == "images"
    assert experiment.head == {"name": "style", "style_image": str(tmp_path / "paint.png"), "style_size": 64}
    assert "'head.picture' is called 'head.style_image' now" in caplog.text
    caplog.clear()
    values = experiment_to_dict(experiment)
    values["head"]["picture"] = values["head"].pop("style_image")
    assert experiment_from_dict(values) == experiment  # as the metadata of an old checkpoint
    assert not caplog.text
    overrides = ["--head.picture", str(tmp_path / "c.png")]
    assert load_experiment([str(config)], overrides).head["style_image"] == str(tmp_path / "c.png")
