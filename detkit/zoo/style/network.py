"""The feed-forward network that renders an image in a style in one pass.

Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", and its supplement, with
instance norm (Ulyanov et al. 2016) and with nearest-neighbour upsampling and a convolution instead of transposed
convolutions, which cause checkerboard artifacts (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts").
"""

import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SIDE = 8
"""Minimum side in pixels; in a smaller image the innermost map would have one pixel, which has no variance."""


class StyleNetwork(nn.Module):
    """An image-to-image network: a convolution, two of stride 2, residual blocks, two upsamplings, a convolution.

    Its output is added to the image and is initialized to zero, so that even a short training preserves the content,
    which Johnson's network has to learn. The image is added with its brightness and contrast replaced by learned ones,
    since the features have lost theirs in the norms and could not compensate for the difference from the style.

    Args:
        width: channels at full resolution; two and four times as many at a half and a quarter of it.
        blocks: number of residual blocks at a quarter of the resolution.
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
        """Render `images` (B, 3, H, W) in 0..1, with sides of at least SMALLEST_SIDE; same shape and range."""
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
        # No bias, since the instance norm that follows would cancel it.
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, padding_mode="reflect", bias=False),
        nn.InstanceNorm2d(channels_out, affine=True),
        nn.ReLU(inplace=True),
    )
