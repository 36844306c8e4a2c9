"""Sampling of the anchors for a loss, since nearly all of them are background."""

import torch
from torch import Tensor

from detkit.structures import Match


def sample_balanced(
    match: Match, count: int = 256, positive_fraction: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sample positives and negatives at random (Faster R-CNN, Ren et al. 2015: 128 + 128 of one image).

    At most int(count * positive_fraction) positives; the rest are negatives, as far as there are enough. Ignored
    anchors are never chosen.

    Args:
        match: the assignment of A anchors.
        count: total number of samples.
        positive_fraction: maximum fraction of positives, in 0..1.
        generator: random generator on any device; default torch's global CPU generator, whose state a run saves.

    Returns:
        (P,) int64 indices of positive anchors and (Q,) of negative ones, P + Q <= count, in random order.
    """
    if count < 0 or not 0 <= positive_fraction <= 1:
        raise ValueError(f"count must be >= 0 and positive_fraction in 0..1, but are {count} and {positive_fraction}")
    positives = _choose(match.positive, int(count * positive_fraction), generator)
    return positives, _choose(match.negative, count - len(positives), generator)


def hard_negatives(losses: Tensor, positive: Tensor, ignored: Tensor, ratio: float = 3.0, minimum: int = 0) -> Tensor:
    """Select the negatives with the highest loss, `ratio` per positive of the same image (SSD, Liu et al. 2016: 3:1).

    Torchvision's rule, except for `ignored` and `minimum`. Ties by index. A loss of NaN counts as the highest, so that
    it is selected and stops the training instead of being hidden.

    Args:
        losses: (B, A) classification loss of each anchor of each image; the selection is not differentiable.
        positive: (B, A) bool.
        ignored: (B, A) bool; never selected.
        ratio: negatives per positive.
        minimum: minimum number of negatives per image, as far as there are enough; above 0, images without objects
            contribute background, too.

    Returns:
        (B, A) bool, true for the selected negatives.
    """
    if not losses.shape == positive.shape == ignored.shape or losses.ndim != 2:
        raise ValueError(
            f"losses, positive and ignored must be one (B, A), but got {tuple(losses.shape)}, "
            f"{tuple(positive.shape)} and {tuple(ignored.shape)}"
        )
    negative = ~(positive | ignored)
    wanted = (ratio * positive.sum(1, keepdim=True)).clamp(min=minimum)
    # Sorting puts NaN above every number, and anchors that are not negative below every number.
    candidates = losses.detach().masked_fill(~negative, -torch.inf)
    order = candidates.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < wanted) & negative


def _choose(mask: Tensor, limit: int, generator: torch.Generator | None) -> Tensor:
    """Choose at most `limit` indices of true entries of `mask` at random."""
    indices = mask.nonzero().flatten()
    order = torch.randperm(len(indices), generator=generator, device=None if generator is None else generator.device)
    return indices[order[:limit].to(mask.device)]
