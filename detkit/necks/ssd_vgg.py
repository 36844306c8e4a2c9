"""The layers of SSD300 and SSD512 after VGG-16 (Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Neck
from detkit.errors import CheckpointError, ConfigError
from detkit.registry import necks

# (middle channels, output channels, kernel, stride, padding) of the paper's conv8, conv9 ...
_EXTRA = [(256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0)]
_EXTRA_512 = [*_EXTRA[:2], (128, 256, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 4, 1, 1)]

# Index in VGG-16 of the max pool before block 5. torchvision's SSD starts `extra.0` with it: layers 0..6 are block 5,
# layer 7 contains fc6 and fc7.
_POOL4 = 23


@necks.register("ssd_vgg")
class SSDVGG(Neck):
    """SSD's layers after `{name: vgg16, levels: [4, 5], ceil_mode: true}`.

    The map of block 4, whose values are far larger than those of deeper maps, is L2-normalised over channels and
    multiplied by a learned scale per channel. The map of block 5 passes through a 3x3 max pool of stride 1 and VGG's
    fully connected layers as convolutions, with dilation in fc6; then follow the extra maps. For 300 pixels the layers
    are those of torchvision's SSDFeatureExtractorVGG, for 512 those of the paper.

    The strides hold for the nominal image size: SSD300's maps are 38, 19, 10, 5, 3 and 1 wide, SSD512's 64, 32, 16, 8,
    4, 2 and 1.

    Args:
        channels: (512, 512).
        strides: (8, 16).
        size: 300 for six maps, 512 for seven; images are at least this many pixels wide and high.

    Raises:
        ConfigError: the input maps are not those of VGG-16's blocks 4 and 5.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], size: Literal[300, 512] = 300) -> None:
        super().__init__()
        if tuple(channels) != (512, 512) or tuple(strides) != (8, 16):
            raise ConfigError(
                f"The neck 'ssd_vgg' needs the backbone {{name: vgg16, levels: [4, 5], ceil_mode: true}}, whose maps "
                f"have 512 and 512 channels and strides 8 and 16, but gets {list(channels)} and {list(strides)}."
            )
        self.scale = nn.Parameter(torch.full((512,), 20.0))
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        layers = _EXTRA if size == 300 else _EXTRA_512
        widths = [1024, *(layer[1] for layer in layers)]
        self.extra = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, between, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(between, after, kernel, stride, padding),
                nn.ReLU(inplace=True),
            )
            for before, (between, after, kernel, stride, padding) in zip(widths, layers, strict=False)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.channels = (512, *widths)
        self.strides = (8, 16, 32, 64, 100, 300) if size == 300 else (8, 16, 32, 64, 128, 256, 512)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Six or seven maps [(B, channels[i], h_i, w_i)].

        Args:
            features: outputs of VGG-16's blocks 4 and 5, (B, 512, h, w) and (B, 512, ~h / 2, ~w / 2).
        """
        conv4, conv5 = features
        maps = [self.scale.view(1, -1, 1, 1) * F.normalize(conv4)]
        fc6 = F.relu(self.fc6(F.max_pool2d(conv5, kernel_size=3, stride=1, padding=1)))
        maps.append(F.relu(self.fc7(fc6)))
        for level in self.extra:
            maps.append(level(maps[-1]))
        return maps


def from_torchvision(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Convert the backbone of torchvision's `ssd300_vgg16` to detkit's names.

    Args:
        state: torchvision's state dict; names that start with `head.` are ignored.

    Returns:
        The states of the backbone `vgg16` (levels 4 and 5, ceil_mode) and of the neck `ssd_vgg`.

    Raises:
        CheckpointError: a name is not one of torchvision's.
    """
    backbone: dict[str, Tensor] = {}
    neck: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        if name == "backbone.scale_weight":
            neck["scale"] = tensor
        elif found := re.fullmatch(r"backbone\.features\.((?:1?\d|2[0-2])\.(?:weight|bias))", name):
            backbone[f"features.{found[1]}"] = tensor
        elif found := re.fullmatch(r"backbone\.extra\.0\.([0-6])\.(weight|bias)", name):
            backbone[f"features.{_POOL4 + int(found[1])}.{found[2]}"] = tensor
        elif found := re.fullmatch(r"backbone\.extra\.0\.7\.([13])\.(weight|bias)", name):
            neck[f"fc{6 if found[1] == '1' else 7}.{found[2]}"] = tensor
        elif found := re.fullmatch(r"backbone\.extra\.([1-5])\.([02]\.(?:weight|bias))", name):
            neck[f"extra.{int(found[1]) - 1}.{found[2]}"] = tensor
        else:
            raise CheckpointError(f"'{name}' is not a tensor of torchvision's ssd300_vgg16.")
    return backbone, neck
