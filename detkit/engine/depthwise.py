"""Depthwise convolutions in float32 while the rest of a network trains in bf16 on a CPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def depthwise_in_float32(model: nn.Module) -> int:
    """Exclude the depthwise convolutions of a model from autocast permanently, and return their number.

    They have no long dot products that bf16 instructions could accelerate, and oneDNN's backward pass of strided ones
    takes nine times as long in bf16 (96 channels of 64 x 64, Zen 4: 15 ms against 1.7 ms). A training step of three
    detectors on EfficientNet-Lite0 took 1.1 to 1.3 times as long in bf16 as in float32, and 0.70 to 0.77 times with
    this.

    Modules and weights are kept; only the class of the convolutions is replaced.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.__class__ = _in_float32(type(module))  # type: ignore[arg-type]
            count += 1
    return count


@cache
def _in_float32(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Derive a convolution class that always computes in float32, also from timm's with TensorFlow padding."""

    def forward(self: Any, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            result: Tensor = kind.forward(self, images.float())
            return result

    return type(f"{kind.__name__}InFloat32", (kind,), {"forward": forward})
