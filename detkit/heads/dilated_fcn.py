"""Torchvision's FCN on a dilated network: one fine map, a small classifier, bilinear interpolation."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import ConfigError, check_range
from detkit.heads.parts.semantic import SemanticHead, SemanticOutputs, pixel_loss, stacked_target
from detkit.registry import heads
from detkit.structures import Inputs, Target


@heads.register("dilated_fcn")
class DilatedFCN(SemanticHead):
    """The head of torchvision's `fcn_resnet50`: a 3x3 convolution to a quarter of the channels of the last map, batch
    norm, ReLU, dropout, a 1x1 convolution, and bilinear interpolation to the input size.

    It needs a fine last map, as from `{name: resnet50, output_stride: 8}` (Chen et al. 2015, "Semantic Image
    Segmentation with Deep Convolutional Nets": dilated convolutions keep the resolution). An auxiliary classifier on
    the second-to-last map supports training (Zhao et al. 2017, PSPNet, section 3.3) and is not used for prediction.

    Args:
        channels, strides: of the feature maps.
        num_classes: number of classes of the data set, including "background" if the data has it.
        auxiliary_weight: factor of the auxiliary classifier's loss; 0 for no auxiliary classifier.
        dropout: dropout probability.
        class_weights: see `SemanticHead`.

    Raises:
        ConfigError: an option is out of range, or there is no map for the auxiliary classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        auxiliary_weight: float = 0.5,
        dropout: float = 0.1,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(num_classes, class_weights)
        check_range("head", 0, auxiliary_weight=auxiliary_weight)
        check_range("head", 0, 1, dropout=dropout)
        if auxiliary_weight and len(channels) < 2:
            raise ConfigError(
                "The head 'dilated_fcn' has an auxiliary classifier on the second-to-last map, but gets only one map. "
                "Add one to backbone.levels, or set head.auxiliary_weight to 0."
            )
        self.classifier = _classifier(channels[-1], num_classes, dropout)
        self.auxiliary_weight = auxiliary_weight
        self.auxiliary = _classifier(channels[-2], num_classes, dropout) if auxiliary_weight else None

    def forward(self, features: list[Tensor], inputs: Inputs) -> SemanticOutputs:
        logits = _enlarged(self.classifier(features[-1]), inputs.size)
        return SemanticOutputs(logits, inputs.sizes, features[-2] if self.auxiliary is not None else None)

    def loss(self, outputs: SemanticOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `pixel`, as in every semantic head, and `auxiliary`, the weighted auxiliary loss."""
        losses = super().loss(outputs, targets)
        if self.auxiliary is not None:
            assert outputs.features is not None
            logits = _enlarged(self.auxiliary(outputs.features), outputs.logits.shape[2:])
            target = stacked_target(targets, outputs.sizes, logits)
            losses["auxiliary"] = self.auxiliary_weight * pixel_loss(logits, target, self.class_weights)
        return losses


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    width = max(1, channels // 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(width, num_classes, 1),
    )


def _enlarged(scores: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=False)
