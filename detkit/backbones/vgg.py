"""VGG networks (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), built from torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision import models

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.weights import load_weights
from detkit.registry import backbones


class VGG(Backbone):
    """The convolutional blocks of a VGG network; a map is what a block gives before it is max pooled.

    Tensors have torchvision's names (`features.N.weight`). Blocks behind the last level are not built.

    Args:
        levels: which of the blocks 1..5 give a map, ascending; their strides are 1, 2, 4, 8 and 16.
        batch_norm: a batch norm behind each convolution (torchvision's `vgg16_bn`).
        ceil_mode: the third pool rounds sizes up, as SSD300 does to get 38x38 from 300x300 pixels.
        weights: None for random ones (He), "imagenet" for torchvision's IMAGENET1K_V1 (downloads), or the path
            of a .pth or .safetensors file with torchvision's names, classifier or not.
        mean: overrides the normalisation, for weights trained with another; SSD's own VGG-16 takes
            (0.48235, 0.45882, 0.40784).
        std: as `mean`; SSD's own VGG-16 takes 1/255 three times.

    Raises:
        ConfigError: `levels` are not ascending or not in 1..5.
        CheckpointError: the weights cannot be had, or do not fit.
    """

    network: ClassVar[str]

    def __init__(
        self,
        levels: tuple[int, ...] = (3, 4, 5),
        batch_norm: bool = False,
        ceil_mode: bool = False,
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        check_levels(levels, range(1, 6), self.network)
        name = f"{self.network}_bn" if batch_norm else self.network
        # Without memory: the classifier, dropped here, is nine tenths of the network.
        with torch.device("meta"):
            full = models.get_model(name, weights=None)
        pools = [i for i, layer in enumerate(full.features) if isinstance(layer, nn.MaxPool2d)]
        full.features[pools[2]].ceil_mode = ceil_mode
        # A block starts with the pool of the one before, so that it can be left out together with it.
        self._bounds = list(pairwise([0, *pools]))[: levels[-1]]
        self.features = full.features[: self._bounds[-1][1]].to_empty(device="cpu")
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        self._levels = levels
        self.channels = tuple((64, 128, 256, 512, 512)[level - 1] for level in levels)
        self.strides = tuple(2 ** (level - 1) for level in levels)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            name,
            full_names=full.state_dict().keys(),
            download=lambda: models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(check_hash=True),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded down (the third pool: `ceil_mode`).

        Args:
            images: (B, 3, H, W) normalised RGB.
        """
        maps, features = [], images
        for number, block in enumerate(self.stages(), start=1):
            features = block(features)
            if number in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Sequential]:
        """The blocks; each but the first starts with the max pool of the block before."""
        return [self.features[start:stop] for start, stop in self._bounds]


@backbones.register("vgg11")
class VGG11(VGG):
    """VGG-11, with the options of `VGG`."""

    network = "vgg11"


@backbones.register("vgg16")
class VGG16(VGG):
    """VGG-16, with the options of `VGG`."""

    network = "vgg16"


@backbones.register("vgg19")
class VGG19(VGG):
    """VGG-19, with the options of `VGG`."""

    network = "vgg19"
