"""Layers between the features of a region and its predictions: from (R, *shape) to one vector (R, width) a region."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.weights import load_weights
from detkit.errors import ConfigError, check_range
from detkit.registry import Registry

region_trunks = Registry("trunk of regions", "detkit.heads.parts")


class RegionTrunk(nn.Module):
    """Takes `shape` of the features of one region; `width` is that of the vector that comes out."""

    width: int


@region_trunks.register("mlp")
class TwoLayers(RegionTrunk):
    """Two fully connected layers with ReLU (Fast R-CNN's fc6 and fc7; 1024 wide in FPN).

    Args:
        width: of both.
        dropout: part of the values that training sets to 0 behind each.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 1024, dropout: float = 0.0) -> None:
        super().__init__()
        check_range("head.regions.trunk", 1, width=width)
        check_range("head.regions.trunk", 0, 1, dropout=dropout)
        self.fc6 = nn.Linear(math.prod(shape), width)
        self.fc7 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        features = self.dropout(F.relu(self.fc6(features.flatten(1))))
        return self.dropout(F.relu(self.fc7(features)))


@region_trunks.register("conv_fc")
class Convolutions(RegionTrunk):
    """3x3 convolutions with batch norm, then one fully connected layer (Li et al. 2021; torchvision's v2).

    Args:
        depth: convolutions.
        channels: of these.
        width: of the fully connected layer.
    """

    def __init__(self, shape: tuple[int, ...], depth: int = 4, channels: int = 256, width: int = 1024) -> None:
        super().__init__()
        check_range("head.regions.trunk", 1, channels=channels, width=width)
        check_range("head.regions.trunk", 0, depth=depth)
        incoming, rows, columns = _as_map(shape, "conv_fc")
        self.convolutions = convolutions(incoming, channels, depth, norm=True)
        self.fc = nn.Linear((channels if depth else incoming) * rows * columns, width)
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.fc(self.convolutions(features).flatten(1)))


@region_trunks.register("resnet_layer4")
class ResNetLayer4(RegionTrunk):
    """The last stage of a ResNet, then the mean over places: the "C4" form of Faster R-CNN (He et al. 2016, appendix).

    It goes with a backbone of the same network that ends at `levels: [4]`, and with 14 x 14 features.

    Args:
        network: resnet18, resnet34, resnet50 or resnet101.
        weights: as the backbone's.
    """

    def __init__(self, shape: tuple[int, ...], network: str = "resnet50", weights: str | None = None) -> None:
        super().__init__()
        if network not in ("resnet18", "resnet34", "resnet50", "resnet101"):
            raise ConfigError(
                f"'head.regions.trunk.network' must be resnet18, resnet34, resnet50 or resnet101, not '{network}'."
            )
        from torchvision import models

        full = models.get_model(network, weights=None)
        incoming = full.fc.in_features // 2
        if _as_map(shape, "resnet_layer4")[0] != incoming:
            raise ConfigError(
                f"The last stage of {network} takes {incoming} channels, but the features of a region have {shape[0]}. "
                f"Use backbone: {{name: {network}, levels: [4]}} without a neck."
            )
        self.layer4 = full.layer4
        self.width = full.fc.in_features
        load_weights(
            self,
            weights,
            network,
            full_names=full.state_dict().keys(),
            download=lambda: models.get_model_weights(network).IMAGENET1K_V1.get_state_dict(
                check_hash=True, weights_only=True
            ),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layer4(features).mean(dim=(2, 3))


@region_trunks.register("mean")
class Mean(RegionTrunk):
    """The mean over all places, nothing learned (R-CNN: the region's own network has seen it already)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.width = shape[0]

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=tuple(range(2, features.ndim))) if features.ndim > 2 else features


def convolutions(incoming: int, channels: int, depth: int, norm: bool) -> nn.Sequential:
    """`depth` times a 3x3 convolution, batch norm where asked for, and ReLU, from `incoming` channels."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        convolution = nn.Conv2d(incoming, channels, 3, padding=1, bias=not norm)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        blocks.append(nn.Sequential(convolution, *([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU(inplace=True)))
        incoming = channels
    return nn.Sequential(*blocks)


def _as_map(shape: Sequence[int], trunk: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ConfigError(
            f"The trunk '{trunk}' needs features with rows and columns, but those of a region are one vector. Use "
            f"the trunk 'mlp', or features roi_align or roi_pool."
        )
    return shape[0], shape[1], shape[2]
