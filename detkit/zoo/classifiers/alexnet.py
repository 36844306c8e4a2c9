"""AlexNet (Krizhevsky, Sutskever and Hinton 2012), in torchvision's version, which follows the smaller network of
Krizhevsky's "One weird trick for parallelizing convolutional neural networks", 2014."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.weights import load_weights
from detkit.registry import backbones

# The layer of torchvision's `features` that ends each level.
ENDS = {2: 2, 3: 5, 4: 12, 5: 13}
CHANNELS = {2: 64, 3: 192, 4: 256, 5: 256}


@backbones.register("alexnet")
class AlexNet(Backbone):
    """The convolutions of AlexNet.

    Tensors have torchvision's names (`features.N.weight`). Its fully connected layers are the head's:
    {name: classify, pool: 6, widths: [4096, 4096], dropout: 0.5}.

    Args:
        levels: maps to return, ascending: 2 after the first convolution, 3 after the second, 4 after the fifth, and 5
            after the last max pool; level i has a stride of about 2**i.
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
        levels: tuple[int, ...] = (5,),
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        check_levels(levels, ENDS, "alexnet")
        from torchvision import models

        full = models.alexnet(weights=None)
        self.features = full.features[: ENDS[levels[-1]]]
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._levels = levels
        self.channels = tuple(CHANNELS[level] for level in levels)
        self.strides = tuple(2**level for level in levels)
        self._override_normalisation(mean, std)
        load_weights(
            self,
            weights,
            "alexnet",
            full_names=full.state_dict().keys(),
            download=lambda: models.AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps [(B, channels[i], ~H / strides[i], ~W / strides[i])].

        Args:
            images: (B, 3, H, W) normalized RGB, H and W at least 63.
        """
        maps, features = [], images
        for level, stage in zip(ENDS, self.stages()):
            features = stage(features)
            if level in self._levels:
                maps.append(features)
        return maps

    def stages(self) -> Sequence[nn.Sequential]:
        """Return the layers up to each level."""
        ends = [end for end in ENDS.values() if end <= len(self.features)]
        return [self.features[start:end] for start, end in zip([0, *ends], ends)]
