"""Additional coarser maps after any backbone, as in SSD (Liu et al., "SSD", ECCV 2016)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from detkit.backbones.base import Neck
from detkit.errors import ConfigError
from detkit.registry import necks


@necks.register("ssd_extras")
class SSDExtras(Neck):
    """Passes the maps through and adds `count` maps, each half the size of the previous one.

    Each is computed by a 1x1 convolution to width / 2 channels and a 3x3 one of stride 2 to width, both with batch norm
    and ReLU.

    Args:
        channels: channels of the input maps.
        strides: strides of the input maps.
        count: number of added maps.
        width: channels of the added maps.

    Raises:
        ConfigError: `count` or `width` is out of range, or the last input map is pooled from the whole image.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], count: int = 3, width: int = 256) -> None:
        super().__init__()
        if count < 1 or width < 2:
            raise ConfigError(
                f"The neck 'ssd_extras' needs 'count' of at least 1 and 'width' of at least 2, but they are {count} "
                f"and {width}."
            )
        if strides[-1] < 1:
            raise ConfigError("The neck 'ssd_extras' cannot follow a map that is pooled from the whole image.")
        self.levels = nn.ModuleList(
            nn.Sequential(*_convolution(before, width // 2, 1, 1), *_convolution(width // 2, width, 3, 2))
            for before in (channels[-1], *[width] * (count - 1))
        )
        self.channels = (*channels, *[width] * count)
        self.strides = (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(count)))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The input maps, then [(B, width, h_i, w_i)], each half the previous size (rounded up).

        Args:
            features: [(B, channels[i], h_i, w_i)], from fine to coarse.
        """
        maps = list(features)
        for level in self.levels:
            maps.append(level(maps[-1]))
        return maps


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int) -> Iterator[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    yield from (convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))
