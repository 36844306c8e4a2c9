"""Network in network (Lin, Chen and Yan, ICLR 2014), in the authors' published ImageNet version."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.registry import backbones

CHANNELS = (96, 256, 384, 1024)


@backbones.register("nin")
class NiN(Backbone):
    """Four blocks, each a spatial convolution and two 1x1 convolutions, with max pooling before all but the first.

    The last 1x1 convolution of the fourth block, the classifier, is part of the head: {name: classify, dropout: 0.5}
    averages before it, the paper after it, which is equivalent for a linear layer.

    Args:
        levels: blocks, out of 1..4, whose maps to return, ascending; their strides are about 4, 8, 16 and 32.

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
        """Return the blocks."""
        return list(self.blocks)


def _block(convolution: nn.Conv2d, one_by_one: int) -> nn.Sequential:
    """Create a convolution and `one_by_one` 1x1 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = [convolution, nn.ReLU(inplace=True)]
    channels = convolution.out_channels
    for _ in range(one_by_one):
        layers += [nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
