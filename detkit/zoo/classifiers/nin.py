"""Network in network (Lin, Chen and Yan, ICLR 2014), in the form for ImageNet that the authors published."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.registry import backbones

CHANNELS = (96, 256, 384, 1024)


@backbones.register("nin")
class NiN(Backbone):
    """Four blocks, each a convolution that looks around and two of 1x1, with a max pool before all but the first.

    The last 1x1 convolution of the fourth block, which gives the classes, is the head's: {name: classify, dropout: 0.5}
    takes the mean before it where the paper takes it behind, which for a linear layer is the same.

    Args:
        levels: which of the blocks 1..4 give a map, ascending; their strides are about 4, 8, 16 and 32.

    Raises:
        ConfigError: `levels` are not ascending or not in 1..4.
    """

    def __init__(self, levels: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        check_levels(levels, range(1, 5), "nin")
        blocks = [
            _block(nn.Conv2d(3, 96, 11, stride=4), 2),
            nn.Sequential(nn.MaxPool2d(3, 2), *_block(nn.Conv2d(96, 256, 5, padding=2), 2)),
            nn.Sequential(nn.MaxPool2d(3, 2), *_block(nn.Conv2d(256, 384, 3, padding=1), 2)),
            nn.Sequential(nn.MaxPool2d(3, 2), *_block(nn.Conv2d(384, 1024, 3, padding=1), 1)),
        ]
        self.blocks = nn.ModuleList(blocks[: levels[-1]])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._levels = levels
        self.channels = tuple(CHANNELS[level - 1] for level in levels)
        self.strides = tuple(2 ** (level + 1) for level in levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps [(B, channels[i], ~H / strides[i], ~W / strides[i])].

        Args:
            images: (B, 3, H, W) normalized RGB, H and W at least 67 for the fourth block.
        """
        maps, features = [], images
        for number, block in enumerate(self.blocks, start=1):
            features = block(features)
            if number in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.blocks)


def _block(convolution: nn.Conv2d, one_by_one: int) -> nn.Sequential:
    """A convolution, then `one_by_one` of 1x1, each with a ReLU."""
    layers: list[nn.Module] = [convolution, nn.ReLU(inplace=True)]
    channels = convolution.out_channels
    for _ in range(one_by_one):
        layers += [nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
