"""GoogLeNet (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015), torchvision's version with batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.backbones.weights import load_weights
from detkit.errors import ConfigError
from detkit.registry import backbones

# Torchvision's modules in order; those that can be returned as maps with (channels, stride).
MODULES = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)
MAPS = {
    "conv3": (192, 4),
    "inception3b": (480, 8),
    "inception4a": (512, 16),
    "inception4d": (528, 16),
    "inception4e": (832, 16),
    "inception5b": (1024, 32),
}


@backbones.register("googlenet")
class GoogLeNet(Backbone):
    """GoogLeNet without its classifiers. Tensors have torchvision's names (`inception3a.branch1.conv.weight`).

    The paper's network with its two auxiliary classifiers has levels [inception4a, inception4d, inception5b] and the
    head {name: classify, dropout: 0.2, auxiliary: [0, 1]}.

    Args:
        levels: modules whose outputs to return, in order: conv3 (stride 4), inception3b (8), inception4a, inception4d,
            inception4e (16), inception5b (32).
        weights: None for random, "imagenet" for torchvision's IMAGENET1K_V1 (downloads), or the path of a .pth or
            .safetensors file with torchvision's names, with or without classifiers.
        mean: overrides the mean for normalization, for weights trained with another one. Torchvision's
            IMAGENET1K_V1, converted from TensorFlow, expect (0.5, 0.5, 0.5), which "imagenet" sets.
        std: likewise, the standard deviation.

    Raises:
        ConfigError: `levels` contains other names or is in another order.
        CheckpointError: the weights are not available, or do not fit.
    """

    weights_set_mean: ClassVar[bool] = True  # so that it gets the name of the weights even if they are not loaded

    def __init__(
        self,
        levels: tuple[str, ...] = ("inception3b", "inception4e", "inception5b"),
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        if not levels or [name for name in MAPS if name in levels] != list(levels):
            raise ConfigError(
                f"'levels' of the backbone 'googlenet' must be some of {', '.join(MAPS)}, each once and in this order, "
                f"but they are {list(levels)}."
            )
        from torchvision import models

        full = models.googlenet(weights=None, aux_logits=True, init_weights=False)
        self._names = MODULES[: MODULES.index(levels[-1]) + 1]
        for name in self._names:
            setattr(self, name, getattr(full, name))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self._levels = levels
        self.channels = tuple(MAPS[level][0] for level in levels)
        self.strides = tuple(MAPS[level][1] for level in levels)
        if weights == "imagenet":
            self.mean = self.std = (0.5, 0.5, 0.5)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            "googlenet",
            full_names=full.state_dict().keys(),
            download=lambda: models.GoogLeNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded up.

        Args:
            images: (B, 3, H, W) normalized RGB.
        """
        maps, features = [], images
        for name in self._names:
            features = getattr(self, name)(features)
            if name in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """Return the stem up to its second pool, then the inception modules, each with the pool before it."""
        stages: list[nn.Module] = []
        current: list[nn.Module] = []
        for name in self._names:
            current.append(getattr(self, name))
            if name == "conv3" or name.startswith("inception"):
                stages.append(nn.Sequential(*current))
                current = []
        return stages
