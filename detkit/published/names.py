"""Conversion shared by torchvision's detectors with ResNet and FPN: names, frozen batch norms, counts and anchors."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detkit.errors import CheckpointError

COCO_OUTPUTS = 91
"""Outputs of torchvision's COCO detectors: ids up to 90, including unused ones, and background."""
# Published files of the first versions have older names than torchvision's current code; both are listed.
TRUNK = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(\d\..+)", r"neck.\1_blocks.\2.\3"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)", r"neck.\1_blocks.\2.0.\3"),
)


def renamed(name: str, patterns: Sequence[tuple[str, str]], model: str) -> str:
    """Convert the name of a tensor by the first of (pattern, replacement) that matches the whole name.

    Raises:
        CheckpointError: none matches; `model` is the expected model, for the message.
    """
    for pattern, replacement in patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise CheckpointError(f"'{name}' is not a tensor of torchvision's {model}.")


def epsilon_option(tensors: dict[str, Tensor], coco: bool) -> dict[str, float]:
    """Return the backbone's option for the epsilon of frozen batch norms, adding their counters; {} for other norms.

    Torchvision uses 0 for its published files with frozen norms, and 1e-5 for models that users train.
    """
    if "backbone.bn1.num_batches_tracked" in tensors:
        return {}
    means = [name for name in tensors if name.endswith("running_mean")]
    tensors |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    return {"norm_epsilon": 0.0 if coco else 1e-5}


def is_coco(outputs: int, coco: bool | None) -> bool:
    """Return whether a model with `outputs` outputs, including background, is one of torchvision's COCO files.

    Args:
        outputs: number of outputs.
        coco: the user's option; None if not given.

    Raises:
        CheckpointError: the user's option is true, but the number of outputs differs.
    """
    if coco and outputs != COCO_OUTPUTS:
        raise CheckpointError(
            f"The model has {outputs} outputs, including background, but torchvision's COCO files have {COCO_OUTPUTS}."
        )
    return outputs == COCO_OUTPUTS if coco is None else coco


def count_rows(state: Mapping[str, Tensor], layer: str, model: str) -> int:
    """Return the number of outputs of a layer.

    Raises:
        CheckpointError: its weight or bias is missing, or their sizes disagree.
    """
    for kind in ("weight", "bias"):
        if f"{layer}.{kind}" not in state:
            raise CheckpointError(f"The state dict is not {model}: it lacks {layer}.{kind}.")
    weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
    if bias.ndim != 1 or weight.ndim < 2 or len(weight) != len(bias) or not len(bias):
        raise CheckpointError(
            f"'{layer}' has a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, which do "
            f"not match."
        )
    return len(bias)


def check_anchors(count: int, default: int, key: str, options: Sequence[str]) -> None:
    """Check that a model has torchvision's default anchors, unless the user gives others.

    Args:
        count: anchors per location of the model.
        default: anchors per location of torchvision's default.
        key: the option of the anchors: "head.anchors".
        options: the user's options.

    Raises:
        CheckpointError: naming the option.
    """
    if count != default and not any(option.startswith(f"{key}.") for option in options):
        raise CheckpointError(
            f"The model has {count} anchors per location, but torchvision's default has {default}. The file does not "
            f"store them; append those of the training to its path, with an inner list for each level, such as "
            f"'FILE.pth?{key}.sizes=[[32], [64], [128], [256], [512]]&{key}.ratios=[0.5, 1, 2]'."
        )
