"""Classification of whole images, single-label or multi-label."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import ConfigError, check_range
from detkit.heads.base import Head, Postprocess, check_count
from detkit.heads.parts.pooling import pooled_images
from detkit.registry import heads
from detkit.structures import Classification, Inputs, Target

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class ClassifyOutputs(NamedTuple):
    """Raw outputs of the classifier.

    Args:
        logits: (B, C).
        auxiliary: (A, B, C) of the auxiliary classifiers.
    """

    logits: Tensor
    auxiliary: Tensor


@heads.register("classify")
class Classify(Head):
    """An image classifier on the coarsest map: average pooling, optional hidden layers and a linear layer.

    Without hidden layers it is the classifier of NiN, GoogLeNet, ResNet and DenseNet; {pool: 5, widths: [120, 84],
    activation: tanh} is LeNet's, {pool: 6, widths: [4096, 4096], dropout: 0.5} AlexNet's, and with pool 7 VGG's.

    Args:
        channels, strides: of the feature maps; the last map and those in `auxiliary` are read.
        num_classes: C.
        pool: side of the grid that a map, excluding its padding, is average-pooled to.
        widths: widths of the hidden fully connected layers.
        activation: activation after each hidden layer.
        dropout: dropout probability before the last layer and every hidden one but the first.
        multi_label: whether an image has any number of classes (binary cross-entropy) instead of exactly one (softmax
            cross-entropy).
        label_smoothing: fraction of the target distributed uniformly over all classes (Szegedy et al. 2016, section
            7), or over yes and no with multi_label.
        auxiliary: indices of earlier maps (positions in the backbone's `levels`, from 0) with an auxiliary classifier
            for training only (Szegedy et al. 2015, section 5).
        auxiliary_weight: factor of each auxiliary loss.
    """

    task: ClassVar[str] = "classify"
    needs: ClassVar[frozenset[str]] = frozenset({"image_labels"})
    reads_sizes: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        pool: int = 1,
        widths: tuple[int, ...] = (),
        activation: Literal["relu", "tanh", "sigmoid"] = "relu",
        dropout: float = 0.0,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        auxiliary: tuple[int, ...] = (),
        auxiliary_weight: float = 0.3,
    ) -> None:
        super().__init__()
        check_range("head", 1, pool=pool)
        check_range("head", 0, 0.99, dropout=dropout, label_smoothing=label_smoothing)
        check_range("head", 0, auxiliary_weight=auxiliary_weight)
        if widths and min(widths) < 1:
            raise ConfigError(f"'head.widths' must hold positive numbers, but is {list(widths)}.")
        if len(set(auxiliary)) < len(auxiliary) or not set(auxiliary) <= set(range(len(channels) - 1)):
            raise ConfigError(
                f"'head.auxiliary' must list distinct indices of maps before the last one, but is {list(auxiliary)}: "
                f"there are {len(channels)} maps, so 0 to {len(channels) - 2} can be given."
                if len(channels) > 1
                else "'head.auxiliary' needs maps before the last one, but the backbone has only one. Give it more "
                "'levels'."
            )
        if num_classes < 2 and not multi_label:
            raise ConfigError(
                "The data has only one class, so every image shows it. Use data with more classes, or set "
                "head.multi_label to true to predict whether an image shows that class."
            )
        self.multi_label, self.label_smoothing, self.pool = multi_label, label_smoothing, pool
        self.auxiliary_maps, self.auxiliary_weight = tuple(auxiliary), auxiliary_weight
        sides = (channels[-1] * pool**2, *widths)
        layers: list[nn.Module] = []
        for number, pair in enumerate(pairwise(sides)):
            layers += [nn.Dropout(dropout)] if dropout and number else []
            layers += [nn.Linear(*pair), ACTIVATIONS[activation]()]
        layers += [nn.Dropout(dropout)] if dropout else []
        self.hidden = nn.Sequential(*layers)
        self.predictor = nn.Linear(sides[-1], num_classes)
        self.auxiliary = nn.ModuleList(_Auxiliary(channels[index], num_classes) for index in auxiliary)

    def forward(self, features: list[Tensor], inputs: Inputs) -> ClassifyOutputs:
        """Compute the logits of each image from feature maps [(B, C_i, h_i, w_i)]."""
        logits = self.predictor(self.hidden(pooled_images(features[-1], inputs, self.pool))).float()
        found = [head(features[index], inputs) for index, head in zip(self.auxiliary_maps, self.auxiliary)]
        return ClassifyOutputs(logits, torch.stack(found).float() if found else logits.new_zeros(0, *logits.shape))

    def loss(self, outputs: ClassifyOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `class`, the mean cross-entropy, and `auxiliary`, the weighted sum over auxiliary classifiers.

        Unless multi_label, images without a class are ignored.

        Raises:
            ValueError: the number of targets is wrong, or an image has no image_labels, or several without multi_label.
        """
        if len(targets) != len(outputs.logits):
            check_count(targets, ((0, 0),) * len(outputs.logits))
        losses = {"class": self._cross_entropy(outputs.logits, targets)}
        if len(outputs.auxiliary):
            found = [self._cross_entropy(logits, targets) for logits in outputs.auxiliary]
            losses["auxiliary"] = self.auxiliary_weight * torch.stack(found).sum()
        return losses

    def _cross_entropy(self, logits: Tensor, targets: tuple[Target, ...]) -> Tensor:
        labels = [_labels(target) for target in targets]
        if self.multi_label:
            ground_truth = torch.zeros_like(logits)
            for row, present in zip(ground_truth, labels):
                row[present] = 1.0
            ground_truth = ground_truth * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, ground_truth)
        if max(len(present) for present in labels) > 1:
            raise ValueError("an image has several classes, but the head expects one; set head.multi_label")
        counted = [image for image, present in enumerate(labels) if len(present)]
        ground_truth = torch.cat(labels)
        total = F.cross_entropy(logits[counted], ground_truth, reduction="sum", label_smoothing=self.label_smoothing)
        return total / max(len(counted), 1)

    @torch.no_grad()
    def decode(self, outputs: ClassifyOutputs, options: Postprocess | None = None) -> list[Classification]:
        """Return the probability of every class for each image."""
        scores = outputs.logits.sigmoid() if self.multi_label else outputs.logits.softmax(-1)
        return [Classification(image) for image in scores]


class _Auxiliary(nn.Module):
    """An auxiliary classifier with the layer sizes of Szegedy et al. 2015, section 5, plus batch norm and adaptive
    pooling as in torchvision."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 128, 1, bias=False)
        self.norm = nn.BatchNorm2d(128, eps=0.001)
        self.hidden = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(0.7)
        self.predictor = nn.Linear(1024, num_classes)

    def forward(self, feature: Tensor, inputs: Inputs) -> Tensor:
        cells = pooled_images(feature, inputs, 4).unflatten(1, (-1, 4, 4))
        values = F.relu(self.norm(self.conv(cells))).flatten(1)
        return self.predictor(self.dropout(F.relu(self.hidden(values))))


def _labels(target: Target) -> Tensor:
    if target.image_labels is None:
        raise ValueError("an image has no image_labels")
    return target.image_labels
