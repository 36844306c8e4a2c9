"""Weights that torchvision publishes, under detkit's names, with the experiment and classes they belong to."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.config import Experiment
from detkit.errors import CheckpointError, nearest
from detkit.published.rcnn import convert_rcnn
from detkit.published.ssd import convert_ssd300_vgg16
from detkit.types import ClassList

PREFIX = "torchvision:"
PUBLISHED = (
    "ssd300_vgg16",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
)
Converter = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], Experiment, ClassList]]
CONVERTERS: dict[str, Converter] = {
    # by a tensor that only this family has
    "backbone.scale_weight": convert_ssd300_vgg16,
    "rpn.head.cls_logits.weight": convert_rcnn,
}


def is_published(source: str) -> bool:
    """Whether `source` names torchvision's weights, "torchvision:ssd300_vgg16" or a .pth file."""
    return source.startswith(PREFIX) or source.endswith(".pth")


def read_published(source: str) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of a model of torchvision, one of PUBLISHED.

    Args:
        source: "torchvision:ssd300_vgg16" downloads the weights trained on COCO (or takes them from torch's
            cache); a path ending in .pth is a state dict of one of the models.

    Raises:
        CheckpointError: the weights cannot be had, or are of another model.
    """
    state = _download(source) if source.startswith(PREFIX) else _read(Path(source))
    for name, convert in CONVERTERS.items():
        if name in state:
            return convert(state)
    raise CheckpointError(
        f"'{source}' is none of torchvision's models that detkit runs ({', '.join(PUBLISHED)}): it has none of the "
        f"tensors {', '.join(CONVERTERS)}. Weights of a backbone alone go to --backbone.weights."
    )


def _download(source: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    name = source.removeprefix(PREFIX)
    if name not in PUBLISHED:
        raise CheckpointError(f"detkit cannot run torchvision's '{name}'. {nearest(name, PUBLISHED)}")
    weights = get_model_weights(name).COCO_V1
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
    if not isinstance(state, dict):
        raise CheckpointError(f"'{path}' holds no dict of tensors by name. Save a model's state_dict().")
    return state
