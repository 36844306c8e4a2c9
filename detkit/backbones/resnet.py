"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), from torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.weights import load_weights
from detkit.errors import ConfigError
from detkit.registry import backbones


class ResNet(Backbone):
    """A residual network without pooling and classifier; C2..C5 are the outputs of its four layers.

    Tensors have torchvision's names (`layer1.0.conv1.weight`). Layers after the last level are not built.

    Args:
        levels: the maps to return, of C2..C5, ascending; Ci has stride 2**i: 4, 8, 16 and 32.
        weights: None for random weights (He), "imagenet" for torchvision's IMAGENET1K_V1 (downloads), or the path
            of a .pth or .safetensors file with torchvision's names, with or without classifier.
        mean: override of the normalisation, for weights trained with another.
        std: as `mean`.
        norm_epsilon: epsilon of the batch norms.
        output_stride: the largest stride, 8, 16 or 32. C4 and C5 keep this stride by dilated convolutions
            (torchvision's `replace_stride_with_dilation`) with the same weights. For ResNet-50 and larger.

    Raises:
        ConfigError: `levels` are not ascending or not in 2..5, or the network does not support that `output_stride`.
        CheckpointError: the weights are not available or do not fit.
    """

    network: ClassVar[str]

    def __init__(
        self,
        levels: tuple[int, ...] = (2, 3, 4, 5),
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        norm_epsilon: float = 1e-5,
        output_stride: Literal[8, 16, 32] = 32,
    ) -> None:
        super().__init__()
        check_levels(levels, range(2, 6), self.network)
        dilated = [stride > output_stride for stride in (8, 16, 32)]
        if any(dilated) and self.network in ("resnet18", "resnet34"):
            raise ConfigError(
                f"'backbone.output_stride' is {output_stride}, but {self.network} does not support dilation. Use "
                f"resnet50 or resnet101, or 32."
            )
        from torchvision import models

        full = models.get_model(
            self.network,
            weights=None,
            norm_layer=partial(nn.BatchNorm2d, eps=norm_epsilon),
            replace_stride_with_dilation=dilated,
        )
        self.conv1, self.bn1, self.relu, self.maxpool = full.conv1, full.bn1, full.relu, full.maxpool
        self._layer_names = [f"layer{level - 1}" for level in range(2, levels[-1] + 1)]
        for name in self._layer_names:
            setattr(self, name, getattr(full, name))
        self._levels = levels
        self.channels = tuple(full.fc.in_features // 2 ** (5 - level) for level in levels)
        self.strides = tuple(min(2**level, output_stride) for level in levels)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            self.network,
            full_names=full.state_dict().keys(),
            download=lambda: models.get_model_weights(self.network).IMAGENET1K_V1.get_state_dict(
                check_hash=True, weights_only=True
            ),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded up.

        Args:
            images: (B, 3, H, W) normalised RGB.
        """
        stem, *layers = self.stages()
        maps, features = [], stem(images)
        for level, layer in enumerate(layers, start=2):
            features = layer(features)
            if level in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """The stem (convolution, batch norm, ReLU, max pool), then the layers."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, *(getattr(self, name) for name in self._layer_names)]


@backbones.register("resnet18")
class ResNet18(ResNet):
    """ResNet-18, with the options of `ResNet`."""

    network = "resnet18"


@backbones.register("resnet34")
class ResNet34(ResNet):
    """ResNet-34, with the options of `ResNet`."""

    network = "resnet34"


@backbones.register("resnet50")
class ResNet50(ResNet):
    """ResNet-50, with the options of `ResNet`."""

    network = "resnet50"


@backbones.register("resnet101")
class ResNet101(ResNet):
    """ResNet-101, with the options of `ResNet`."""

    network = "resnet101"
