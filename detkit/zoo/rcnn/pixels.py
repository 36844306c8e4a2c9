"""The identity backbone: the image is its own feature map, for heads with their own network."""

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.registry import backbones


@backbones.register("pixels")
class Pixels(Backbone):
    """The image as the only feature map, with 3 channels and stride 1 (for example R-CNN's head crops regions from it).

    It is not normalized; that is left to the head's network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides = (3,), (1,)
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the image itself, (B, 3, H, W) RGB in 0..1."""
        return [images]

    def stages(self) -> Sequence[nn.Module]:
        """None."""
        return []
