"""No network: the image is its own feature map, for heads that bring a network of their own."""

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.registry import backbones


@backbones.register("pixels")
class Pixels(Backbone):
    """The image as the one feature map, of 3 channels and stride 1 (R-CNN's head cuts regions out of it).

    It is not normalised: that is left to the network that will see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides = (3,), (1,)
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The image itself, (B, 3, H, W) RGB in 0..1."""
        return [images]

    def stages(self) -> Sequence[nn.Module]:
        """None."""
        return []
