"""What heads that name the class of every pixel have in common: logits of the input's size, their loss and labels."""

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
        logits: (B, C, H, W) at the size of the input.
        sizes: (height, width) of each image inside it.
        features: (B, D, h, w), what an auxiliary classifier reads in the loss; None without.
    """

    logits: Tensor
    sizes: tuple[tuple[int, int], ...]
    features: Tensor | None = None


class SemanticHead(Head):
    """A head whose raw outputs are logits of each pixel; a subclass computes them.

    Args:
        num_classes: of the data set, "background" among them where the data has it.
        class_weights: how much a pixel of each class counts in the loss, for classes of very different areas; by
            default all the same.

    Raises:
        ConfigError: there are more classes than a map of bytes can tell apart, or other than one weight for each.
    """

    task: ClassVar[str] = "segment"
    needs: ClassVar[frozenset[str]] = frozenset({"semantic"})
    class_weights: Tensor | None

    def __init__(self, num_classes: int, class_weights: tuple[float, ...] | None = None) -> None:
        super().__init__()
        if not 1 <= num_classes <= MOST_CLASSES:
            raise ConfigError(
                f"A semantic map tells 1 to {MOST_CLASSES} classes apart, but the data has {num_classes}."
            )
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) < 0):
            raise ConfigError(
                f"'head.class_weights' must be {num_classes} numbers from 0 on, one for each class in the order of the "
                f"labels, but is {list(class_weights)}."
            )
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, outputs: SemanticOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """`pixel`: the cross-entropy of a pixel, in the mean over all that count (Long et al. 2015, section 4.3).

        Pixels that are IGNORED_PIXEL or outside of their image do not count; where none counts it is 0.
        """
        target = stacked_target(targets, outputs.sizes, outputs.logits)
        return {"pixel": pixel_loss(outputs.logits, target, self.class_weights)}

    def decode(self, outputs: SemanticOutputs, options: Postprocess | None = None) -> list[SemanticMap]:
        """The most probable class of each pixel; the first of several that are equal."""
        maps = []
        for logits, (height, width) in zip(outputs.logits, outputs.sizes):
            logits = logits[:, :height, :width].float()
            maps.append(SemanticMap(labels_of(logits), logits))
        return maps


def labels_of(logits: Tensor) -> Tensor:
    """(H, W) uint8 of logits (C, H, W).

    Raises:
        DetkitError: a logit is not a number.
    """
    best, labels = logits.max(0)  # the maximum of NaN and numbers is NaN
    if torch.isnan(best.sum()) and torch.isnan(best).any():
        raise DetkitError(
            "The network's logits are not numbers (NaN): its weights are broken, as after a training that diverged, or "
            "half precision overflowed. Use another checkpoint, or train.precision 32-true."
        )
    return labels.to(torch.uint8)


def stacked_target(targets: Sequence[Target], sizes: tuple[tuple[int, int], ...], logits: Tensor) -> Tensor:
    """(B, H, W) int64 of the size of `logits` (B, C, H, W): the semantic maps, IGNORED_PIXEL outside of the images."""
    check_count(tuple(targets), sizes)
    ground_truth = torch.full((len(sizes), *logits.shape[2:]), IGNORED_PIXEL, dtype=torch.int64, device=logits.device)
    for row, target, (height, width) in zip(ground_truth, targets, sizes):
        assert target.semantic is not None, "open_split checks that the data has what the head needs"
        row[:height, :width] = target.semantic[:height, :width]
    return ground_truth


def pixel_loss(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of (B, C, H, W) logits, in the weighted mean over all pixels that are not IGNORED_PIXEL.

    Args:
        target: (B, H, W) int64 classes.
        class_weights: (C,), or None for 1 each.

    Returns:
        A scalar; 0 where no pixel counts.
    """
    total = F.cross_entropy(logits.float(), target, class_weights, ignore_index=IGNORED_PIXEL, reduction="sum")
    counted = target != IGNORED_PIXEL
    if class_weights is None:
        return total / counted.sum().clamp(min=1)
    weight = class_weights[target[counted]].sum()
    return total / torch.where(weight > 0, weight, 1.0)
