"""Weight files of Darknet, Redmon's framework: a header, then the floats of all convolutions in order.

The header is three little-endian int32 (major, minor, revision) and the number of images seen in training: 64 bit
since version 0.2, 32 bit before. There are no names and no shapes; only the order and the number of floats identify the
tensors. A convolution with batch norm has biases, scales, means and variances of the norm, then weights (out, in,
height, width); one without has biases and weights.
"""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from detkit.errors import CheckpointError
from detkit.io.tensor_files import FORMATS, check_values, file_format

LEAKY_SLOPE = 0.1
Unit = tuple[str, nn.Module]
"""A named convolution of the network: a DarknetConvolution or an nn.Conv2d."""


class DarknetConvolution(nn.Sequential):
    """Convolution without bias, batch norm, leaky ReLU of slope 0.1: (B, C, H, W) to (B, C', ~H / stride, ~W / stride).

    Like PyTorch, Darknet's GPU code, which trained the published weights, adds 1e-5 to the variance.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        )


def convolutions(module: nn.Module, prefix: str) -> list[Unit]:
    """Return all convolutions in `module` with their full names, in construction order."""
    found: list[Unit] = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}"
        if isinstance(child, (DarknetConvolution, nn.Conv2d)):
            found.append((path, child))
        else:
            found += convolutions(child, path)
    return found


def count_floats(units: Iterable[Unit]) -> int:
    """Return the number of floats that a file has for these convolutions."""
    return sum(tensor.numel() for name, module in units for _, tensor in _layout(name, module))


def take_tensors(units: Sequence[Unit], floats: Tensor, path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of these convolutions by name from the start of a file's floats.

    Args:
        units: convolutions in file order; only their shapes are used.
        floats: (N,) float32, at least `count_floats(units)`.
        path: the file, for messages.

    Raises:
        CheckpointError: a value is NaN or infinite, or a variance negative.
    """
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, module in units:
        for full_name, like in _layout(name, module):
            tensors[full_name] = floats[start : start + like.numel()].reshape(like.shape).clone()
            check_values(full_name, tensors[full_name], f"The weight file '{path}'")
            start += like.numel()
        if isinstance(module, DarknetConvolution):
            tensors[f"{name}.1.num_batches_tracked"] = torch.tensor(0)
    return tensors


def read_floats(path: str | Path) -> Tensor:
    """Memory-map the floats (N,) float32 after the header.

    Raises:
        CheckpointError: the file does not exist, is truncated, or does not have a Darknet header.
    """
    kind = file_format(path)
    if kind != "darknet":
        raise CheckpointError(
            f"'{path}' is not a Darknet weight file, which starts with Darknet's version, a small number: it is "
            f"{FORMATS.get(kind, kind)}."
        )
    file = Path(path).expanduser()
    with file.open("rb") as stream:
        major, minor, _ = struct.unpack("<3i", stream.read(12))
    header = 12 + (8 if major * 10 + minor >= 2 else 4)
    size = file.stat().st_size - header
    if size <= 0 or size % 4:
        raise CheckpointError(
            f"'{path}' is truncated: its header of {header} bytes is followed by {size} bytes, not a whole number of "
            f"floats. Get a complete copy of the file."
        )
    return torch.from_numpy(np.memmap(file, dtype="<f4", mode="c", offset=header))


def _layout(name: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the names and shapes of a convolution's tensors in file order."""
    if isinstance(module, DarknetConvolution):
        norm = ("bias", "weight", "running_mean", "running_var")
        return [(f"{name}.1.{part}", getattr(module[1], part)) for part in norm] + [
            (f"{name}.0.weight", _weight(module[0]))
        ]
    return [(f"{name}.bias", module.get_parameter("bias")), (f"{name}.weight", _weight(module))]


def _weight(convolution: nn.Module) -> Tensor:
    return convolution.get_parameter("weight")
