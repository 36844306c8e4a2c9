"""Base of semantic segmentation heads: logits at the input size, their loss and labels."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.errors import ConfigError, DetkitError
from detkit.heads.base import Head, Postprocess, check_count
from detkit.structures import IGNORED_PIXEL, SemanticMap, Target

MOST_CLASSES = IGNORED_PIXEL


class SemanticOutputs(NamedTuple):
    """Raw outputs of a semantic head.

    Args:
        logits: (B, C, H, W) at the input size.
        sizes: (height, width) of each image inside the input.
        features: (B, D, h, w), the map that an auxiliary classifier reads in the loss; None if there is none.
    """

    logits: Tensor
    sizes: tuple[tuple[int, int], ...]
    features: Tensor | None = None


class SemanticHead(Head):
    """Base class of heads whose raw outputs are per-pixel logits.

    Args:
        num_classes: number of classes of the data set, including "background" if the data has it.
        class_weights: weight of a pixel of each class in the loss, for classes of very different areas; default equal
            weights.

    Raises:
        ConfigError: there are more classes than a uint8 map can represent, or not exactly one weight per class.
    """

    task: ClassVar[str] = "segment"
    needs: ClassVar[frozenset[str]] = frozenset({"semantic"})
    class_weights: Tensor | None

    def __init__(self, num_classes: int, class_weights: tuple[float, ...] | None = None) -> None:
        super().__init__()
        if not 1 <= num_classes <= MOST_CLASSES:
            raise ConfigError(
                f"A semantic map can represent 1 to {MOST_CLASSES} classes, but the data has {num_classes}."
            )
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) < 0):
            raise ConfigError(
                f"'head.class_weights' must be {num_classes} non-negative numbers, one for each class in the order of "
                f"the labels, but is {list(class_weights)}."
            )
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, outputs: SemanticOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `pixel`, the mean cross-entropy over valid pixels (Long et al. 2015, section 4.3).

        Pixels that are IGNORED_PIXEL or outside their image are excluded; the loss is 0 if no pixel remains.
        """
        target = stacked_target(targets, outputs.sizes, outputs.logits)
        return {"pixel": pixel_loss(outputs.logits, target, self.class_weights)}

    def decode(self, outputs: SemanticOutputs, options: Postprocess | None = None) -> list[SemanticMap]:
        """Return the most probable class of each pixel; ties are resolved in favour of the first class."""
        maps = []
        for logits, (height, width) in zip(outputs.logits, outputs.sizes):
            logits = logits[:, :height, :width].float()
            maps.append(SemanticMap(labels_of(logits), logits))
        return maps


def labels_of(logits: Tensor) -> Tensor:
    """Return the labels (H, W) uint8 of logits (C, H, W).

    Raises:
        DetkitError: a logit is NaN.
    """
    best, labels = logits.max(0)  # max propagates NaN
    if torch.isnan(best.sum()) and torch.isnan(best).any():
        raise DetkitError(
            "The network's logits are NaN: its weights are broken, for example because training diverged, or half "
            "precision overflowed. Use another checkpoint, or train.precision 32-true."
        )
    return labels.to(torch.uint8)


def stacked_target(targets: Sequence[Target], sizes: tuple[tuple[int, int], ...], logits: Tensor) -> Tensor:
    """Stack semantic maps to (B, H, W) int64, the size of `logits` (B, C, H, W), padded with IGNORED_PIXEL."""
    check_count(tuple(targets), sizes)
    ground_truth = torch.full((len(sizes), *logits.shape[2:]), IGNORED_PIXEL, dtype=torch.int64, device=logits.device)
    for row, target, (height, width) in zip(ground_truth, targets, sizes):
        assert target.semantic is not None, "open_split checks that the data has what the head needs"
        row[:height, :width] = target.semantic[:height, :width]
    return ground_truth


def pixel_loss(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Compute the weighted mean cross-entropy of logits (B, C, H, W) over all pixels that are not IGNORED_PIXEL.

    Args:
        target: (B, H, W) int64 classes.
        class_weights: (C,), or None for equal weights.

    Returns:
        A scalar; 0 if there is no such pixel.
    """
    total = F.cross_entropy(logits.float(), target, class_weights, ignore_index=IGNORED_PIXEL, reduction="sum")
    counted = target != IGNORED_PIXEL
    if class_weights is None:
        return total / counted.sum().clamp(min=1)
    weight = class_weights[target[counted]].sum()
    return total / torch.where(weight > 0, weight, 1.0)
