"""Region trunks: layers between region features (R, *shape) and the predictors, giving one vector (R, width) each."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.weights import load_weights
from detkit.errors import ConfigError, check_range
from detkit.registry import Registry

region_trunks = Registry("trunk of regions", "detkit.heads.parts")


class RegionTrunk(nn.Module):
    """Base class; the constructor takes the `shape` of the features of one region, and `width` is the output width."""

    width: int


@region_trunks.register("mlp")
class TwoLayers(RegionTrunk):
    """Two fully connected layers with ReLU (Fast R-CNN's fc6 and fc7; 1024 wide in FPN).

    Args:
        width: width of both layers.
        dropout: dropout probability after each layer.
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
        depth: number of convolutions.
        channels: channels of the convolutions.
        width: width of the fully connected layer.
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
    """The last stage of a ResNet, then global average pooling: Faster R-CNN's "C4" variant (He et al. 2016, appendix).

    It requires a backbone of the same network with `levels: [4]`, and 14 x 14 features.

    Args:
        network: resnet18, resnet34, resnet50 or resnet101.
        weights: same as for the backbone.
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
                f"The last stage of {network} takes {incoming} channels, but the region features have {shape[0]}. "
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
    """Global average pooling without parameters (for R-CNN, whose regions already passed through a network)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.width = shape[0]

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=tuple(range(2, features.ndim))) if features.ndim > 2 else features


def convolutions(incoming: int, channels: int, depth: int, norm: bool) -> nn.Sequential:
    """Create `depth` blocks of 3x3 convolution, batch norm (with `norm`) and ReLU, for `incoming` input channels."""
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
            f"The trunk '{trunk}' needs region features with spatial dimensions, but they are vectors. Use the trunk "
            f"'mlp', or the features roi_align or roi_pool."
        )
    return shape[0], shape[1], shape[2]
