"""DenseNet (Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.weights import load_weights
from detkit.published.classifiers import with_current_names
from detkit.registry import backbones

CHANNELS = {2: 256, 3: 512, 4: 1024, 5: 1024}


@backbones.register("densenet121")
class DenseNet121(Backbone):
    """DenseNet-121 without pooling and classifier; maps are the outputs of dense blocks, the last one after its norm.

    Tensors have torchvision's names (`features.denseblock1...`). Layers after the last level are not built.

    Args:
        levels: dense blocks whose maps to return: 2 to 5, ascending; level i has stride 2**i.
        weights: None for random (He), "imagenet" for torchvision's IMAGENET1K_V1 (downloads), or the path
            of a .pth or .safetensors file with torchvision's names, with or without classifier.
        mean: overrides the mean for normalization, for weights trained with another one.
        std: likewise, the standard deviation.

    Raises:
        ConfigError: `levels` are not ascending or not in 2..5.
        CheckpointError: the weights are not available, or do not fit.
    """

    def __init__(
        self,
        levels: tuple[int, ...] = (2, 3, 4, 5),
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        check_levels(levels, CHANNELS, "densenet121")
        from torchvision import models

        full = models.densenet121(weights=None)
        layers = list(full.features.named_children())
        last = "norm5" if levels[-1] == 5 else f"denseblock{levels[-1] - 1}"
        end = [name for name, _ in layers].index(last) + 1
        self.features = nn.Sequential()
        for name, layer in layers[:end]:
            self.features.add_module(name, layer)
        self._levels = levels
        self.channels = tuple(CHANNELS[level] for level in levels)
        self.strides = tuple(2**level for level in levels)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            "densenet121",
            full_names=full.state_dict().keys(),
            download=lambda: with_current_names(
                models.DenseNet121_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
            ),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps [(B, channels[i], H / strides[i], W / strides[i])], sizes rounded down.

        Args:
            images: (B, 3, H, W) normalized RGB.
        """
        maps, features = [], images
        for level, stage in enumerate(self.stages(), start=1):
            features = stage(features)
            if level == 5:
                features = F.relu(features)
            if level in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """Return the stem, then each dense block with the transition before it, the last one including its norm."""
        stages: list[list[nn.Module]] = [[]]
        for name, layer in self.features.named_children():
            if name == "denseblock1" or name.startswith("transition"):
                stages.append([])
            stages[-1].append(layer)
        return [nn.Sequential(*stage) for stage in stages]
