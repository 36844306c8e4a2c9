"""What torchvision's detectors on a ResNet with a feature pyramid have in common: names, and frozen batch norms."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.errors import CheckpointError

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


def add_counters(tensors: dict[str, Tensor]) -> bool:
    """Add the counters that frozen batch norms lack; whether they were missing.

    The first versions' batch norms were frozen, and were published with an epsilon of 0.
    """
    if "backbone.bn1.num_batches_tracked" in tensors:
        return False
    means = [name for name in tensors if name.endswith("running_mean")]
    tensors |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    return True
