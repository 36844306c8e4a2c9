"""Fully convolutional networks FCN-32s, -16s and -8s on any backbone.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import ConfigError, check_range
from detkit.heads.parts.semantic import SemanticHead, SemanticOutputs
from detkit.registry import heads
from detkit.structures import Inputs


@heads.register("fcn")
class FCN(SemanticHead):
    """Per-map class scores by 1x1 convolutions, fused from coarse to fine and upsampled to the input size.

    Starting at the coarsest map, scores are upsampled to the next finer map by a learned transposed convolution,
    initialized as bilinear interpolation, and added to that map's own scores (the "skips" of section 4.2). The final
    upsampling to the input size is fixed bilinear interpolation. Score layers are initialized to 0.

    The paper converts VGG's fully connected layers to convolutions on the coarsest map (section 3.1); here `hidden`, a
    3x3 convolution with batch norm, ReLU and dropout, takes their place.

    Args:
        channels, strides: of the feature maps.
        num_classes: number of classes of the data set, including "background" if the data has it.
        finest_stride: stride of the finest map to use, with all coarser ones; with a coarsest stride of 32, 8 gives
            FCN-8s and 32 gives FCN-32s.
        hidden: channels of the layer between the coarsest map and its scores; null for none.
        dropout: dropout probability after this layer.
        class_weights: see `SemanticHead`.

    Raises:
        ConfigError: no map has that stride, or the strides from there on do not grow by even integer factors.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        finest_stride: int = 8,
        hidden: int | None = None,
        dropout: float = 0.1,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(num_classes, class_weights)
        if finest_stride not in strides:
            raise ConfigError(
                f"'head.finest_stride' is {finest_stride}, but the feature maps have the strides {list(strides)}. Use "
                f"one of these, or add the map of that stride to backbone.levels."
            )
        used = [level for level, stride in enumerate(strides) if stride >= finest_stride]
        self.levels = tuple(used)
        steps = [strides[coarse] / strides[fine] for fine, coarse in pairwise(used)]
        if any(step != int(step) or int(step) % 2 for step in (*steps, finest_stride)):
            raise ConfigError(
                f"The head 'fcn' upsamples maps by even factors, but the feature maps have the strides "
                f"{[strides[level] for level in used]}. Use strides such as 8, 16 and 32 (backbone.levels)."
            )
        check_range("head", 0, 1, dropout=dropout)
        widths = [channels[level] for level in used]
        self.hidden: nn.Sequential | None = None
        if hidden is not None:
            check_range("head", 1, hidden=hidden)
            self.hidden = _hidden(widths[-1], hidden, dropout)
            widths[-1] = hidden
        self.scores = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths)
        for score in self.scores:
            nn.init.zeros_(score.weight)  # type: ignore[arg-type]
            nn.init.zeros_(score.bias)  # type: ignore[arg-type]
        self.enlargements = nn.ModuleList(_enlargement(num_classes, int(step)) for step in steps)
        self.stride = finest_stride
        self.register_buffer("kernel", bilinear_kernel(finest_stride).expand(num_classes, 1, -1, -1), persistent=False)

    kernel: Tensor

    def forward(self, features: list[Tensor], inputs: Inputs) -> SemanticOutputs:
        """Compute logits at the input size.

        Maps are aligned with the input at the top left corner. If sizes are not multiples of the strides, scores are
        cropped at the right and bottom, or (for networks that round sizes down) padded by replication.
        """
        maps = [features[level] for level in self.levels]
        if self.hidden is not None:
            maps[-1] = self.hidden(maps[-1])
        scores = [layer(values) for layer, values in zip(self.scores, maps)]
        total = scores[-1]
        for score, enlarge in zip(reversed(scores[:-1]), reversed(self.enlargements)):
            total = score + fitted(enlarge(total), score.shape[2:])
        classes = total.shape[1]
        logits = F.conv_transpose2d(
            total, self.kernel.to(total.dtype), stride=self.stride, padding=self.stride // 2, groups=classes
        )
        return SemanticOutputs(fitted(logits, inputs.size), inputs.sizes)


def bilinear_kernel(factor: int) -> Tensor:
    """Return a kernel (2·factor, 2·factor) float32 with which a transposed convolution of stride `factor` and padding
    factor / 2 interpolates bilinearly, with zeros outside the map."""
    offsets = torch.arange(2 * factor) + 0.5 - factor
    line = 1 - offsets.abs() / factor
    return torch.outer(line, line)


def fitted(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Crop scores (B, C, h, w) at the right and bottom to `size` (height, width), or pad them by replication."""
    scores = scores[:, :, : size[0], : size[1]]
    bottom, right = size[0] - scores.shape[2], size[1] - scores.shape[3]
    return F.pad(scores, (0, right, 0, bottom), mode="replicate") if bottom or right else scores


def _hidden(channels: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
    )


def _enlargement(num_classes: int, factor: int) -> nn.ConvTranspose2d:
    """Create a transposed convolution that is initialized as bilinear interpolation of each class separately."""
    layer = nn.ConvTranspose2d(num_classes, num_classes, 2 * factor, stride=factor, padding=factor // 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        for label in range(num_classes):
            layer.weight[label, label] = bilinear_kernel(factor)
    return layer
