"""YOLOv3's neck: coarse maps upsampled and concatenated to finer ones (Redmon and Farhadi 2018, section 2.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Neck
from detkit.errors import ConfigError
from detkit.registry import necks
from detkit.zoo.darknet.weight_file import DarknetConvolution


@necks.register("yolov3_neck")
class YOLOv3Neck(Neck):
    """A top-down pathway: convolutions on each map, whose output is upsampled and concatenated to the next finer map.

    Each level has `depth` convolutions, alternately 1x1 to the level's width and 3x3 to twice the width. Their output
    passes through a 1x1 convolution to the width of the next finer level and is upsampled (nearest neighbour).

    Args:
        channels: channels of the input maps.
        strides: strides of the input maps, ascending.
        widths: width of each level, finest first; null for half of `channels`. yolov3-tiny has [128, 256].
        depths: number of convolutions per level, finest first, odd or 0; a single number applies to all levels.
            yolov3-tiny has [0, 1].

    Raises:
        ConfigError: the strides are not ascending, or `widths` or `depths` do not fit the maps.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        widths: tuple[int, ...] | None = None,
        depths: tuple[int, ...] = (5,),
    ) -> None:
        super().__init__()
        if not strides or strides[0] < 1 or list(strides) != sorted(set(strides)):
            raise ConfigError(
                f"The neck 'yolov3_neck' needs maps of ascending strides, but the backbone gives {list(strides)}. "
                f"Select other maps with the backbone's 'levels'."
            )
        levels = len(channels)
        widths = tuple(count // 2 for count in channels) if widths is None else widths
        depths = depths * levels if len(depths) == 1 else depths
        if len(widths) != levels or min(widths) < 1:
            raise ConfigError(f"'neck.widths' must be {levels} positive numbers, one for each map, not {list(widths)}.")
        if len(depths) != levels or any(depth != 0 and (depth < 0 or depth % 2 == 0) for depth in depths):
            raise ConfigError(
                f"'neck.depths' must be one number, or {levels}, one for each map, each odd or 0, but they are "
                f"{list(depths)}."
            )
        self.laterals = nn.ModuleList(
            DarknetConvolution(coarser, width, 1)
            for coarser, width in zip(_outputs(channels, widths, depths)[1:], widths)
        )
        self.blocks = nn.ModuleList(
            _block(count, width, depth) for count, width, depth in zip(_inputs(channels, widths), widths, depths)
        )
        self.channels = _outputs(channels, widths, depths)
        self.strides = tuple(strides)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps [(B, channels[i], h_i, w_i)] of the sizes that came in.

        Args:
            features: finest first; sizes need not be multiples of each other.
        """
        maps = [self.blocks[-1](features[-1])]
        for level in range(len(features) - 2, -1, -1):
            coarse = F.interpolate(self.laterals[level](maps[0]), size=features[level].shape[-2:], mode="nearest")
            maps.insert(0, self.blocks[level](torch.cat((coarse, features[level]), dim=1)))
        return maps


def _inputs(channels: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels that enter each level's block: the map's own and, but for the coarsest, those from the coarser level."""
    return (*(count + width for count, width in zip(channels[:-1], widths)), channels[-1])


def _outputs(channels: tuple[int, ...], widths: tuple[int, ...], depths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels that leave each level's block."""
    inputs = _inputs(channels, widths)
    return tuple(width if depth else count for count, width, depth in zip(inputs, widths, depths))


def _block(channels_in: int, width: int, depth: int) -> nn.Sequential:
    layers = []
    for index in range(depth):
        narrow = index % 2 == 0
        channels_out = width if narrow else 2 * width
        layers.append(DarknetConvolution(channels_in, channels_out, 1 if narrow else 3))
        channels_in = channels_out
    return nn.Sequential(*layers)
