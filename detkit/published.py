"""Weights that torchvision publishes, under detkit's names, with the experiment and classes they belong to."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.backbones.ssd_vgg import from_torchvision as trunk_from_torchvision
from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError, nearest
from detkit.heads.ssd import from_torchvision as head_from_torchvision
from detkit.types import ClassList

PREFIX = "torchvision:"

# Torchvision's ssd300_vgg16; configs/ssd300_vgg16.yaml trains the same model.
SSD300_BACKBONE = {
    "name": "vgg16", "levels": [4, 5], "ceil_mode": True,
    "mean": [0.48235, 0.45882, 0.40784], "std": [1 / 255, 1 / 255, 1 / 255],
}  # fmt: skip
SSD300_HEAD = {
    "name": "ssd",
    "anchors": {
        "name": "default_boxes",
        "ratios": [[2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0], [2.0]],
        "scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        "steps": [8, 16, 32, 64, 100, 300],
    },
}


def is_published(source: str) -> bool:
    """Whether `source` names torchvision's weights, "torchvision:ssd300_vgg16" or a .pth file."""
    return source.startswith(PREFIX) or source.endswith(".pth")


def read_published(source: str) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of torchvision's `ssd300_vgg16`.

    Args:
        source: "torchvision:ssd300_vgg16" downloads the weights trained on COCO (or takes them from torch's
            cache); a path ending in .pth is a state dict of the same model.

    Raises:
        CheckpointError: the weights cannot be had, or are not of this model.
    """
    state = _download(source) if source.startswith(PREFIX) else _read(Path(source))
    return convert_ssd300_vgg16(state, source)


def convert_ssd300_vgg16(
    state: Mapping[str, Tensor], source: str = "the state dict"
) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """The same from a state dict in memory. With 90 classes they are COCO's; otherwise they are numbered."""
    backbone, neck = trunk_from_torchvision(state)
    head, num_classes = head_from_torchvision(state)
    tensors = {
        **{f"backbone.{name}": tensor for name, tensor in backbone.items()},
        **{f"neck.{name}": tensor for name, tensor in neck.items()},
        **{f"head.{name}": tensor for name, tensor in head.items()},
    }
    experiment = Experiment(
        data={"name": "coco"},
        backbone=dict(SSD300_BACKBONE),
        neck={"name": "ssd_vgg"},
        head=dict(SSD300_HEAD),
        input=InputOptions((300, 300)),
        name="ssd300_vgg16",
    )
    return tensors, experiment, _classes(num_classes)


def _classes(count: int) -> ClassList:
    from torchvision.models.detection import SSD300_VGG16_Weights

    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"][1:]
    if len(names) != count:
        return ClassList.from_names([f"class {label}" for label in range(count)], first_raw_id=1)
    # COCO's ids have gaps, for which torchvision's head has outputs all the same.
    unique = [f"unused {raw_id}" if name == "N/A" else name for raw_id, name in enumerate(names, start=1)]
    return ClassList.from_names(unique, first_raw_id=1)


def _download(source: str) -> dict[str, Tensor]:
    from torchvision.models.detection import SSD300_VGG16_Weights

    name = source.removeprefix(PREFIX)
    if name != "ssd300_vgg16":
        raise CheckpointError(f"detkit cannot run torchvision's '{name}'. {nearest(name, ['ssd300_vgg16'])}")
    weights = SSD300_VGG16_Weights.COCO_V1
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True)
    except OSError as error:
        raise CheckpointError(
            f"The weights {weights.url} cannot be downloaded ({error}). Fetch that file on a machine with a network "
            "and give its path, ending in .pth, instead."
        ) from None
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There is no file of weights '{path}'.")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"'{path}' is no file of weights: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or "backbone.scale_weight" not in state:
        raise CheckpointError(
            f"'{path}' is not torchvision's ssd300_vgg16, the only foreign model that detkit runs: it has no tensor "
            "'backbone.scale_weight'. Weights of a backbone alone go to --backbone.weights."
        )
    return state
