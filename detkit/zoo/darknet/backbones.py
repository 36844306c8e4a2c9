"""Redmon's networks: Darknet-19 (YOLOv2), Darknet-53 (YOLOv3), and the small trunk of yolov2-tiny and yolov3-tiny.

Images are RGB in 0..1 with no mean taken off. `weights` takes files that Darknet wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.errors import CheckpointError, ConfigError
from detkit.registry import backbones
from detkit.zoo.darknet.weight_file import DarknetConvolution, convolutions, count_floats, read_floats, take_tensors

LEVELS = range(1, 6)
IMAGENET_CLASSES = 1000


class _Darknet(Backbone):
    """Six blocks, each but the first at half the size of the one before; level i is the output of block i.

    Args:
        name: for messages.
        blocks: all six.
        widths: channels that each gives.
        levels: the maps by stride, ascending: level i has stride 2**i. Blocks behind the last are not kept.
        weights: a file of Darknet's; None for random ones.

    Raises:
        ConfigError: there is no such level.
        CheckpointError: the file cannot be read, or is of another network.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __init__(
        self,
        name: str,
        blocks: list[nn.Sequential],
        widths: Sequence[int],
        levels: tuple[int, ...],
        weights: str | None,
    ) -> None:
        super().__init__()
        check_levels(levels, LEVELS, name)
        if min(widths) < 1:
            raise ConfigError(f"The backbone '{name}' needs positive 'widths', but has {list(widths)}.")
        self.blocks = nn.ModuleList(blocks)
        self.levels = levels
        self.channels = tuple(widths[level] for level in levels)
        self.strides = tuple(2**level for level in levels)
        if weights is not None:
            self._load(weights, name, widths[-1])
        self.blocks = self.blocks[: levels[-1] + 1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps [(B, channels[i], ~H / strides[i], ~W / strides[i])].

        Args:
            images: (B, 3, H, W) RGB in 0..1.
        """
        maps = []
        for level, block in enumerate(self.blocks):
            images = block(images)
            if level in self.levels:
                maps.append(images)
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(self.blocks)

    def _load(self, weights: str, name: str, last_width: int) -> None:
        """From a file of the trunk alone (darknet53.conv.74) or with its ImageNet classifier (darknet53.weights)."""
        floats = read_floats(weights)
        units = convolutions(self.blocks, "blocks")
        trunk = count_floats(units)
        classifier = (last_width + 1) * IMAGENET_CLASSES
        if len(floats) not in (trunk, trunk + classifier):
            raise CheckpointError(
                f"The file of weights '{weights}' holds {len(floats)} floats, but the backbone '{name}' has {trunk}, "
                f"or {trunk + classifier} with its classifier of {IMAGENET_CLASSES} classes. Is it of another network? "
                f"Weights of a whole detector go to --weights."
            )
        self.load_state_dict(take_tensors(units, floats, weights))


@backbones.register("darknet19")
class Darknet19(_Darknet):
    """The trunk of YOLOv2 (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2016, table 6).

    Args:
        levels: the maps by stride, ascending, some of 1..5: level i has stride 2**i and 2**(5 + i) channels.
        weights: a file of Darknet's, darknet19_448.conv.23 or darknet19.weights; null for random ones.

    Raises:
        ConfigError: there is no such level.
        CheckpointError: the file cannot be read, or is of another network.
    """

    def __init__(self, levels: tuple[int, ...] = (4, 5), weights: str | None = None) -> None:
        widths = (32, 64, 128, 256, 512, 1024)
        depths = (1, 1, 3, 3, 5, 5)
        blocks = [
            nn.Sequential(*([nn.MaxPool2d(2)] if level else []), *_alternating(before, width, depth))
            for level, ((before, width), depth) in enumerate(zip(pairwise((3, *widths)), depths))
        ]
        super().__init__("darknet19", blocks, widths, levels, weights)


@backbones.register("darknet53")
class Darknet53(_Darknet):
    """The trunk of YOLOv3 (Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, table 1).

    Args:
        levels: the maps by stride, ascending, some of 1..5: level i has stride 2**i and 2**(5 + i) channels.
        weights: a file of Darknet's, darknet53.conv.74 or darknet53.weights; null for random ones.

    Raises:
        ConfigError: there is no such level.
        CheckpointError: the file cannot be read, or is of another network.
    """

    def __init__(self, levels: tuple[int, ...] = (3, 4, 5), weights: str | None = None) -> None:
        widths = (32, 64, 128, 256, 512, 1024)
        repeats = (1, 2, 8, 8, 4)
        blocks = [nn.Sequential(DarknetConvolution(3, widths[0], 3))]
        for (before, width), count in zip(pairwise(widths), repeats):
            residuals = [_Residual(width) for _ in range(count)]
            blocks.append(nn.Sequential(DarknetConvolution(before, width, 3, stride=2), *residuals))
        super().__init__("darknet53", blocks, widths, levels, weights)


@backbones.register("darknet_tiny")
class DarknetTiny(_Darknet):
    """The trunk of yolov2-tiny and yolov3-tiny: seven 3x3 convolutions with max pools between.

    Args:
        levels: the maps by stride, ascending, some of 1..5: level i has stride 2**i.
        widths: channels of the convolutions; block 5 has the last two of them.
        weights: a file of Darknet's with this trunk alone; null for random ones.

    Raises:
        ConfigError: there is no such level, or `widths` are not seven positive numbers.
        CheckpointError: the file cannot be read, or is of another network.
    """

    WIDTHS: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256, 512, 1024)

    def __init__(
        self, levels: tuple[int, ...] = (4, 5), widths: tuple[int, ...] = WIDTHS, weights: str | None = None
    ) -> None:
        if len(widths) != len(self.WIDTHS) or min(widths) < 1:
            raise ConfigError(f"The backbone 'darknet_tiny' needs seven positive 'widths', but has {list(widths)}.")
        pairs = list(pairwise((3, *widths)))
        blocks = [
            nn.Sequential(*([nn.MaxPool2d(2)] if level else []), DarknetConvolution(*pair, 3))
            for level, pair in enumerate(pairs[:-1])
        ]
        blocks[-1].extend((_SamePool(), DarknetConvolution(*pairs[-1], 3)))
        super().__init__("darknet_tiny", blocks, (*widths[:-2], widths[-1]), levels, weights)


class _Residual(nn.Module):
    """1x1 convolution to half the channels, 3x3 back, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(DarknetConvolution(width, width // 2, 1), DarknetConvolution(width // 2, width, 3))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class _SamePool(nn.Module):
    """2x2 max pool of stride 1 that keeps the size: at the right and bottom edge of fewer places."""

    def forward(self, features: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(features, (0, 1, 0, 1), value=float("-inf")), 2, stride=1)


def _alternating(channels_in: int, width: int, depth: int) -> list[nn.Module]:
    """3x3 convolutions to `width` channels with 1x1 ones to half of that between."""
    layers: list[nn.Module] = []
    for index in range(depth):
        narrow = index % 2 == 1
        channels_out = width // 2 if narrow else width
        layers.append(DarknetConvolution(channels_in, channels_out, 1 if narrow else 3))
        channels_in = channels_out
    return layers
