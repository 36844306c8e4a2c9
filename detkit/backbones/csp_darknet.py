"""The backbone of YOLOX, a Darknet with cross-stage partial blocks, and the blocks that its neck and head share.

Ge, Liu, Wang, Li and Sun, "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430; cross-stage partial blocks: Wang et
al., "CSPNet", 2020. Layer names are those of the published weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.errors import check_range
from detkit.registry import backbones


@backbones.register("csp_darknet")
class CSPDarknet(Backbone):
    """The CSPDarknet backbone with maps of strides 8, 16 and 32; by default that of YOLOX-S.

    The published sizes, as (depth, width): nano (0.33, 0.25, depthwise), tiny (0.33, 0.375), s (0.33, 0.5),
    m (0.67, 0.75), l (1, 1) and x (1.33, 1.25).

    Args:
        depth: blocks of each stage, as a multiple of 3, 9, 9 and 3; at least one.
        width: channels, as a multiple of 64 after the stem and 1024 at the end.
        depthwise: replace 3x3 convolutions by a depthwise and a pointwise one.
        mean: subtracted from RGB in 0..1; the default is that of the published weights.
        std: divides RGB in 0..1; the default keeps pixels in 0..255.

    Raises:
        ConfigError: depth or width is out of range.
    """

    def __init__(
        self,
        depth: float = 0.33,
        width: float = 0.5,
        depthwise: bool = False,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1 / 255, 1 / 255, 1 / 255),
    ) -> None:
        super().__init__()
        check_range("backbone", 0, 8, depth=depth)
        check_range("backbone", 1 / 32, 8, width=width)
        blocks, stem = block_count(depth), int(width * 64)
        self.stem = Focus(3, stem)
        self.dark2 = _stage(stem, stem * 2, blocks, depthwise)
        self.dark3 = _stage(stem * 2, stem * 4, 3 * blocks, depthwise)
        self.dark4 = _stage(stem * 4, stem * 8, 3 * blocks, depthwise)
        self.dark5 = _stage(stem * 8, stem * 16, blocks, depthwise, last=True)
        self.channels = (stem * 4, stem * 8, stem * 16)
        self.strides = (8, 16, 32)
        self._override_normalisation(mean, std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32, [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded up."""
        fine = self.dark3(self.dark2(self.stem(images)))
        middle = self.dark4(fine)
        return [fine, middle, self.dark5(middle)]

    def stages(self) -> Sequence[nn.Module]:
        """The stem, then the stages of strides 4, 8, 16 and 32."""
        return [self.stem, self.dark2, self.dark3, self.dark4, self.dark5]


class Convolution(nn.Module):
    """A same-padded convolution (stride 2 halves the size, rounding up), batch norm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels_in, h, w) to (B, channels_out, h / stride, w / stride)."""
        activated: Tensor = self.act(self.bn(self.conv(features)))
        return activated


class SeparableConvolution(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = Convolution(channels_in, channels_in, kernel, stride, groups=channels_in)
        self.pconv = Convolution(channels_in, channels_out, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels_in, h, w) to (B, channels_out, h / stride, w / stride)."""
        mixed: Tensor = self.pconv(self.dconv(features))
        return mixed


def convolution(
    channels_in: int, channels_out: int, stride: int = 1, depthwise: bool = False
) -> Convolution | SeparableConvolution:
    """Create a 3x3 convolution, separable if `depthwise`."""
    kind = SeparableConvolution if depthwise else Convolution
    return kind(channels_in, channels_out, 3, stride)


class CrossStage(nn.Module):
    """A cross-stage partial block: half of the channels pass through `blocks` bottlenecks, half bypass them.

    Args:
        shortcut: each bottleneck adds its input to its output.
    """

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, shortcut: bool = True, depthwise: bool = False
    ) -> None:
        super().__init__()
        hidden = channels_out // 2
        self.conv1 = Convolution(channels_in, hidden, 1)
        self.conv2 = Convolution(channels_in, hidden, 1)
        self.conv3 = Convolution(2 * hidden, channels_out, 1)
        self.m = nn.Sequential(*(_Bottleneck(hidden, shortcut, depthwise) for _ in range(blocks)))

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels_in, h, w) to (B, channels_out, h, w)."""
        joined: Tensor = self.conv3(torch.cat((self.m(self.conv1(features)), self.conv2(features)), dim=1))
        return joined


class Focus(nn.Module):
    """Space-to-depth of 2x2 pixels into four times the channels, then a 3x3 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = Convolution(4 * channels_in, channels_out, 3)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H / 2, W / 2); odd sides are padded by zeros."""
        height, width = images.shape[2:]
        if height % 2 or width % 2:
            images = F.pad(images, (0, width % 2, 0, height % 2))
        corners = [images[..., top::2, left::2] for left in (0, 1) for top in (0, 1)]
        focused: Tensor = self.conv(torch.cat(corners, dim=1))
        return focused


def block_count(depth: float) -> int:
    """Return the number of bottlenecks of the shortest stage."""
    return max(round(depth * 3), 1)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, channels, 1)
        self.conv2 = convolution(channels, channels, depthwise=depthwise)
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.conv2(self.conv1(features))
        return features + changed if self.shortcut else changed


class _PyramidPooling(nn.Module):
    """The map concatenated with its max pools over 5x5, 9x9 and 13x13 (He et al. 2014, as in YOLOv3-SPP)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, channels // 2, 1)
        self.conv2 = Convolution(channels // 2 * 4, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        maps = [self.conv1(features)]
        for _ in range(3):
            # Two 5x5 max pools equal one of 9x9.
            maps.append(F.max_pool2d(maps[-1], 5, stride=1, padding=2))
        pooled: Tensor = self.conv2(torch.cat(maps, dim=1))
        return pooled


def _stage(channels_in: int, channels_out: int, blocks: int, depthwise: bool, last: bool = False) -> nn.Sequential:
    """Create a stage of half the size; the last one has pyramid pooling and no shortcuts."""
    layers: list[nn.Module] = [convolution(channels_in, channels_out, 2, depthwise)]
    if last:
        layers.append(_PyramidPooling(channels_out))
    return nn.Sequential(*layers, CrossStage(channels_out, channels_out, blocks, not last, depthwise))
