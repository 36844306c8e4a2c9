"""The feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Neck
from detkit.errors import ConfigError
from detkit.registry import necks


@necks.register("fpn")
class FeaturePyramid(Neck):
    """The feature pyramid network, which adds semantics of coarse maps to fine ones; all maps get the same width.

    Each map passes through a 1x1 convolution; top-down, the coarser map is upsampled (nearest neighbour) and added; a
    3x3 convolution gives the output. Layers are named as in torchvision's FeaturePyramidNetwork
    (`inner_blocks.0.0.weight`), except `extra_blocks.0`, its `extra_blocks.p6`.

    Args:
        channels: channels of the input maps.
        strides: strides of the input maps, ascending.
        width: channels of the output maps.
        extra_levels: number of coarser maps computed from the last output, each half the previous size.
        extra: how they are computed: "conv" by 3x3 convolutions of stride 2 with ReLU between (RetinaNet's P6, P7);
            "conv_input" likewise, but the first from the last input map (as in the RetinaNet paper); "pool" by taking
            every second value (Faster R-CNN).
        norm: batch norm after each convolution, useful for a pyramid trained from scratch.

    Raises:
        ConfigError: the strides are not ascending (a map pooled from the whole image is not allowed), or `width` or
            `extra_levels` is out of range.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        width: int = 256,
        extra_levels: int = 0,
        extra: Literal["conv", "conv_input", "pool"] = "conv",
        norm: bool = False,
    ) -> None:
        super().__init__()
        if not strides or strides[0] < 1 or list(strides) != sorted(set(strides)):
            raise ConfigError(
                f"The neck 'fpn' needs maps of ascending strides, but the backbone gives {list(strides)}. "
                f"Choose others by the backbone's 'levels'."
            )
        if width < 1 or extra_levels < 0:
            raise ConfigError(
                f"The neck 'fpn' needs a positive 'width' and no negative 'extra_levels', but they are {width} "
                f"and {extra_levels}."
            )
        self.inner_blocks = nn.ModuleList(_convolution(count, width, 1, norm) for count in channels)
        self.layer_blocks = nn.ModuleList(_convolution(width, width, 3, norm) for _ in channels)
        convolutions = 0 if extra == "pool" else extra_levels
        self._extra_from_input = extra == "conv_input"
        widths = [channels[-1] if self._extra_from_input else width, *[width] * extra_levels]
        self.extra_blocks = nn.ModuleList(
            _convolution(before, width, 3, norm, stride=2) for before in widths[:convolutions]
        )
        self._pools = extra_levels - convolutions
        self.channels = (width,) * (len(channels) + extra_levels)
        self.strides = (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(extra_levels)))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps [(B, width, h_i, w_i)] of the input sizes, then the extra ones, each half the previous size (rounded
        up).

        Args:
            features: [(B, channels[i], h_i, w_i)], from fine to coarse; sizes need not be multiples of each other.
        """
        inner = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        for i in range(len(inner) - 2, -1, -1):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
        maps = [block(feature) for block, feature in zip(self.layer_blocks, inner, strict=True)]
        for i, block in enumerate(self.extra_blocks):
            first = features[-1] if self._extra_from_input else maps[-1]
            maps.append(block(F.relu(maps[-1]) if i else first))
        for _ in range(self._pools):
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps


def _convolution(channels_in: int, channels_out: int, kernel: int, norm: bool, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=not norm)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out)) if norm else nn.Sequential(convolution)
