"""What torchvision's detectors on a ResNet with a feature pyramid have in common: names, and frozen batch norms."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detkit.errors import CheckpointError

COCO_OUTPUTS = 91
"""Of torchvision's detectors for COCO: its ids up to 90, with gaps, and background."""
# Published files of the first versions have older names than torchvision's code; both are here.
TRUNK = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(\d\..+)", r"neck.\1_blocks.\2.\3"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)", r"neck.\1_blocks.\2.0.\3"),
)


def renamed(name: str, patterns: Sequence[tuple[str, str]], model: str) -> str:
    """detkit's name of a tensor, by the first of (pattern, replacement) that fits the whole name.

    Raises:
        CheckpointError: none fits; `model` says of what the state dict was to be.
    """
    for pattern, replacement in patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise CheckpointError(f"'{name}' is no tensor of torchvision's {model}.")


def epsilon_option(tensors: dict[str, Tensor], coco: bool) -> dict[str, float]:
    """The backbone's option for the epsilon of frozen batch norms, whose counters are added; {} for other norms.

    Torchvision takes 0 for the files with frozen norms that it published, and 1e-5 for a model that a user trains.
    """
    if "backbone.bn1.num_batches_tracked" in tensors:
        return {}
    means = [name for name in tensors if name.endswith("running_mean")]
    tensors |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    return {"norm_epsilon": 0.0 if coco else 1e-5}


def is_coco(outputs: int, coco: bool | None) -> bool:
    """Whether a model with so many outputs, background included, is one of torchvision's COCO files.

    Args:
        coco: what the user says; None for not known.

    Raises:
        CheckpointError: the user says so, but they cannot be.
    """
    if coco and outputs != COCO_OUTPUTS:
        raise CheckpointError(
            f"The model has {outputs} outputs, background included, but torchvision's COCO files have {COCO_OUTPUTS}."
        )
    return outputs == COCO_OUTPUTS if coco is None else coco


def count_rows(state: Mapping[str, Tensor], layer: str, model: str) -> int:
    """The outputs of a layer.

    Raises:
        CheckpointError: its weight or bias is missing, or they differ in that.
    """
    for kind in ("weight", "bias"):
        if f"{layer}.{kind}" not in state:
            raise CheckpointError(f"The state dict is not {model}: it lacks {layer}.{kind}.")
    weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
    if bias.ndim != 1 or weight.ndim < 2 or len(weight) != len(bias) or not len(bias):
        raise CheckpointError(
            f"'{layer}' has a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, which do "
            f"not belong together."
        )
    return len(bias)


def check_anchors(count: int, default: int, key: str, options: Sequence[str]) -> None:
    """Refuse a model with other anchors than torchvision's defaults, unless the user gives them.

    Args:
        count: anchors that the model has at each location.
        default: those of torchvision's default.
        key: the option with the anchors: "head.anchors".
        options: the options that the user gives.

    Raises:
        CheckpointError: naming the option.
    """
    if count != default and not any(option.startswith(f"{key}.") for option in options):
        raise CheckpointError(
            f"The model has {count} anchors at each location, and torchvision's default {default}. Its file does not "
            f"store them; give those of the training behind its path, an inner list for each level, such as "
            f"'FILE.pth?{key}.sizes=[[32], [64], [128], [256], [512]]&{key}.ratios=[0.5, 1, 2]'."
        )
