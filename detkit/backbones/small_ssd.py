"""A small backbone for teaching."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.errors import ConfigError
from detkit.registry import backbones


@backbones.register("small_ssd")
class SmallSSD(Backbone):
    """The small SSD of "Dive into Deep Learning" (Zhang et al., section "Single Shot Multibox Detection").

    Blocks of two 3x3 convolutions with batch norm and ReLU and a 2x2 max pool: one for each of `widths`, whose last
    output is the first map, then three more, each giving a map, then a global max pool, which gives a 1x1 map. With the
    defaults and 256x256 images the five maps are 32, 16, 8, 4 and 1 wide; images must have at least 64x64 pixels.

    Args:
        widths: channels of the blocks up to the first map.
        level_channels: channels of the three blocks after it.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), level_channels: int = 128) -> None:
        super().__init__()
        if not widths or min(*widths, level_channels) < 1:
            raise ConfigError(
                f"The backbone 'small_ssd' needs at least one of 'widths' and only positive numbers of channels, "
                f"but has widths {list(widths)} and level_channels {level_channels}."
            )
        self.base = nn.Sequential(*(_down_sampling_block(*pair) for pair in pairwise((3, *widths))))
        level_widths = (widths[-1], *[level_channels] * 3)
        self.levels = nn.ModuleList(_down_sampling_block(*pair) for pair in pairwise(level_widths))
        self.channels = (*level_widths, level_channels)
        self.strides = (*(2 ** (len(widths) + i) for i in range(4)), 0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Five maps [(B, channels[i], H / strides[i], W / strides[i])], the last one (B, C, 1, 1).

        Args:
            images: (B, 3, H, W) normalised RGB, H and W at least 64 with the default widths.
        """
        maps = [self.base(images)]
        for level in self.levels:
            maps.append(level(maps[-1]))
        maps.append(F.adaptive_max_pool2d(maps[-1], 1))
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """The blocks in forward order."""
        return [*self.base, *self.levels]


def _down_sampling_block(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        # No bias, which the following batch norm would cancel.
        layers += [
            nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
