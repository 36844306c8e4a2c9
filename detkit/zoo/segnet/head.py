"""SegNet's max-unpooling decoder, which restores values at the locations of pooled maxima.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015; Badrinarayanan et al.,
"SegNet", PAMI 2017.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.vgg import VGG
from detkit.errors import ConfigError
from detkit.heads.parts.semantic import SemanticHead, SemanticOutputs
from detkit.registry import backbones, heads
from detkit.structures import Inputs


@heads.register("unpool")
class Unpool(SemanticHead):
    """SegNet: the convolutions of a VGG network, and its mirror image as the decoder.

    The encoder is part of the head, since the decoder needs the location of each pooled maximum; the head reads the
    image itself and requires `backbone: {name: pixels}` without a neck. Each encoder block is followed by 2x2 max
    pooling; the decoder reverses the pooling, with values at their original locations and 0 elsewhere, each followed by
    as many 3x3 convolutions with batch norm and ReLU as the encoder block has. The last convolution has no norm and
    gives the logits.

    Args:
        channels, strides: of the feature map, which must be the image's 3 channels.
        num_classes: number of classes of the data set, including "background" if the data has it.
        encoder: `name` (vgg11, vgg16 or vgg19) and options of a VGG backbone; its last level sets the depth. Default
            SegNet's, vgg16 with batch norm.
        class_weights: see `SemanticHead`.

    Raises:
        ConfigError: the map is not the image itself, or the encoder is not a VGG network.
        CheckpointError: the encoder's weights are not available.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        encoder: dict[str, Any] | None = None,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(num_classes, class_weights)
        if tuple(channels) != (3,) or tuple(strides) != (1,):
            raise ConfigError(
                f"The head 'unpool' reads the pixels of the image, but gets feature maps of strides {list(strides)}. "
                f"Use backbone: {{name: pixels}} without a neck; its own network is head.encoder."
            )
        encoder = {"name": "vgg16", "batch_norm": True} if encoder is None else encoder
        built = backbones.build(encoder, "head.encoder")
        if not isinstance(built, VGG):
            raise ConfigError(
                f"'head.encoder' of the head 'unpool' must be a VGG network, whose pools can be undone, such as vgg16, "
                f"but is '{encoder['name']}'."
            )
        self.backbone = built
        self.register_buffer("mean", torch.tensor(built.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(built.std).view(1, 3, 1, 1), persistent=False)
        self.decoder = nn.ModuleList(_mirrored(stage) for stage in reversed(built.stages()))
        # The first convolution of the encoder turned round would give a colour; it gives a logit for each class.
        last = self.decoder[-1]
        assert isinstance(last, nn.Sequential)
        convolution = last[-3]
        assert isinstance(convolution, nn.Conv2d)
        self.decoder[-1] = last[:-3].append(nn.Conv2d(convolution.in_channels, num_classes, 3, padding=1))
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, features: list[Tensor], inputs: Inputs) -> SemanticOutputs:
        """Logits of the size of the input, whatever that is: pools round sizes up."""
        values = (features[0] - self.mean) / self.std
        pools: list[tuple[Tensor, torch.Size]] = []
        for stage in self.backbone.stages():
            for layer in stage[1:] if pools else stage:
                values = layer(values)
            size = values.shape[2:]
            values, places = F.max_pool2d(values, 2, ceil_mode=True, return_indices=True)
            pools.append((places, size))
        for (places, size), block in zip(reversed(pools), self.decoder):
            values = block(F.max_unpool2d(values, places, [2, 2], output_size=list(size)))
        return SemanticOutputs(values, inputs.sizes)


def _mirrored(stage: nn.Sequential) -> nn.Sequential:
    """The convolutions of a block in reverse, each from its output's channels to its input's."""
    layers: list[nn.Module] = []
    for layer in reversed(stage):
        if isinstance(layer, nn.Conv2d):
            # No bias: the batch norm behind would subtract it again.
            layers += [
                nn.Conv2d(layer.out_channels, layer.in_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(layer.in_channels),
                nn.ReLU(inplace=True),
            ]
    return nn.Sequential(*layers)
