"""The feed-forward network that gives an image a style in one pass.

Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", and its supplement, with
instance norm (Ulyanov et al. 2016) and, in place of transposed convolutions, whose squares show, nearest neighbours and
a convolution (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts").
"""

import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SIDE = 8
"""In pixels: of a smaller image the innermost map would have one pixel, which has no variance."""


class StyleNetwork(nn.Module):
    """A convolution, two of stride 2, residual blocks, two enlargements, a convolution; image in, image out.

    What it paints is added to the image, and is nothing at first, so that a short training keeps the content, which
    Johnson's network has to learn, too. The image as it is added has lost its brightness and contrast, as have the
    features by their norms, and has learned ones: the network could not tell how far its own are from the style's.

    Args:
        width: channels at the full size; two and four times as many at a half and a quarter of it.
        blocks: residual blocks at a quarter of the size.
    """

    def __init__(self, width: int = 32, blocks: int = 5) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_block(3, width, 9), _block(width, 2 * width, 3, stride=2), _block(2 * width, 4 * width, 3, stride=2)]
        )
        self.residual = nn.ModuleList(
            nn.Sequential(_block(4 * width, 4 * width, 3), *_block(4 * width, 4 * width, 3)[:2]) for _ in range(blocks)
        )
        self.up = nn.ModuleList([_block(4 * width, 2 * width, 3), _block(2 * width, width, 3)])
        self.image = nn.InstanceNorm2d(3, affine=True)
        self.last = nn.Conv2d(width, 3, 9, padding=4, padding_mode="reflect")
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 for as many `images` in 0..1, whose sides are at least SMALLEST_SIDE."""
        features, sizes = images - 0.5, []
        for layer in self.down:
            features = layer(features)
            sizes.append(features.shape[2:])
        for layer in self.residual:
            features = features + layer(features)
        for layer, size in zip(self.up, sizes[-2::-1]):
            features = layer(F.interpolate(features, size, mode="nearest"))
        return (self.last(features) + self.image(images)).sigmoid()


def _block(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        # No bias: the instance norm behind would subtract it again.
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, padding_mode="reflect", bias=False),
        nn.InstanceNorm2d(channels_out, affine=True),
        nn.ReLU(inplace=True),
    )
