"""Redmon's backbones: Darknet-19 (YOLOv2), Darknet-53 (YOLOv3), and the small one of yolov2-tiny and yolov3-tiny.

Images are RGB in 0..1 without mean subtraction. `weights` takes files in Darknet's format.
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
    """Six blocks, each but the first at half the resolution of the previous one; level i is the output of block i.

    Args:
        name: the name of the backbone, for messages.
        blocks: all six blocks.
        widths: output channels of each block.
        levels: maps to return, ascending: level i has stride 2**i. Blocks after the last one are dropped.
        weights: a Darknet weight file; None for random initialization.

    Raises:
        ConfigError: a level does not exist.
        CheckpointError: the file cannot be read, or belongs to another network.
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
        """Return the blocks in order."""
        return list(self.blocks)

    def _load(self, weights: str, name: str, last_width: int) -> None:
        """Load a file of the backbone alone (darknet53.conv.74) or with its ImageNet classifier (darknet53.weights)."""
        floats = read_floats(weights)
        units = convolutions(self.blocks, "blocks")
        trunk = count_floats(units)
        classifier = (last_width + 1) * IMAGENET_CLASSES
        if len(floats) not in (trunk, trunk + classifier):
            raise CheckpointError(
                f"The weight file '{weights}' holds {len(floats)} floats, but the backbone '{name}' has {trunk}, or "
                f"{trunk + classifier} with its classifier of {IMAGENET_CLASSES} classes. Does it belong to another "
                f"network? For the weights of a complete detector use --weights."
            )
        self.load_state_dict(take_tensors(units, floats, weights))


@backbones.register("darknet19")
class Darknet19(_Darknet):
    """The backbone of YOLOv2 (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2016, table 6).

    Args:
        levels: the maps by stride, ascending, some of 1..5: level i has stride 2**i and 2**(5 + i) channels.
        weights: a Darknet file, darknet19_448.conv.23 or darknet19.weights; null for random initialization.

    Raises:
        ConfigError: a level does not exist.
        CheckpointError: the file cannot be read, or belongs to another network.
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
    """The backbone of YOLOv3 (Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, table 1).

    Args:
        levels: the maps by stride, ascending, some of 1..5: level i has stride 2**i and 2**(5 + i) channels.
        weights: a Darknet file, darknet53.conv.74 or darknet53.weights; null for random initialization.

    Raises:
        ConfigError: a level does not exist.
        CheckpointError: the file cannot be read, or belongs to another network.
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
    """The backbone of yolov2-tiny and yolov3-tiny: seven 3x3 convolutions with max pooling between them.

    Args:
        levels: maps to return, ascending, out of 1..5: level i has stride 2**i.
        widths: channels of the convolutions; block 5 has the last two of them.
        weights: a Darknet file with this backbone alone; null for random initialization.

    Raises:
        ConfigError: a level does not exist, or `widths` are not seven positive numbers.
        CheckpointError: the file cannot be read, or belongs to another network.
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
    """A residual block: a 1x1 convolution to half the channels and a 3x3 convolution back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(DarknetConvolution(width, width // 2, 1), DarknetConvolution(width // 2, width, 3))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class _SamePool(nn.Module):
    """2x2 max pooling with stride 1 that preserves the size; windows at the right and bottom edges are smaller."""

    def forward(self, features: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(features, (0, 1, 0, 1), value=float("-inf")), 2, stride=1)


def _alternating(channels_in: int, width: int, depth: int) -> list[nn.Module]:
    """Create 3x3 convolutions to `width` channels, alternating with 1x1 convolutions to half of that."""
    layers: list[nn.Module] = []
    for index in range(depth):
        narrow = index % 2 == 1
        channels_out = width // 2 if narrow else width
        layers.append(DarknetConvolution(channels_in, channels_out, 1 if narrow else 3))
        channels_in = channels_out
    return layers
