"""Embedding losses, which pull images of one class together and push other classes apart.

The functions are pure; the modules, selected by `head.loss`, hold their options and class vectors.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import check_range
from detkit.registry import Registry

embed_losses = Registry("loss of embeddings", "detkit.zoo.embedding")
PATH = "head.loss"
CLOSE = 1e-7
"""Lower bound of sin² when computing the sine, since the derivative of the root is unbounded at 0."""


def batch_hard_triplet(vectors: Tensor, labels: Tensor, margin: float | None) -> Tensor:
    """Triplet loss with the hardest positive and negative of each image (Hermans et al. 2017, equation 5).

    With p the distance to the farthest image of the same class and n that to the nearest of another, the loss of a
    image is max(0, margin + p - n), or, without a margin, log(1 + exp(p - n)).

    Args:
        vectors: (B, D).
        labels: (B,) int64.
        margin: in units of distance; None for the soft margin.

    Returns:
        The mean over images that have both a positive and a negative; 0 where there is none.
    """
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    counted = positive.any(1) & (~same).any(1)
    if not counted.any():
        return vectors.sum() * 0
    farthest = distances.masked_fill(~positive, -math.inf)[counted].amax(1)
    nearest = distances.masked_fill(same, math.inf)[counted].amin(1)
    gap = farthest - nearest
    losses = F.softplus(gap) if margin is None else F.relu(margin + gap)
    return losses.mean()


def large_margin_logits(vectors: Tensor, weights: Tensor, labels: Tensor, margin: int, relax: float = 0.0) -> Tensor:
    """Logits of the large-margin softmax, L-Softmax (Liu et al. 2016, equations 4 to 7).

    The logit of a class is |w| |x| cos t; that of the true class |w| |x| psi(t), with psi(t) = (-1)^k cos(m t) - 2 k
    where t lies in [k pi / m, (k + 1) pi / m]. It is smaller: the angle must shrink by m for the same answer.

    Args:
        vectors: (B, D).
        weights: (C, D).
        labels: (B,) int64.
        margin: m, 1 or more; 1 is softmax.
        relax: share of the plain logit in the true one, the paper's lambda: (lambda cos t + psi(t)) / (1 + lambda).

    Returns:
        (B, C).
    """
    logits = F.linear(vectors, weights)
    true = weights[labels]
    lengths = torch.linalg.vector_norm(vectors, dim=1) * torch.linalg.vector_norm(true, dim=1)
    cosine = _cosine(vectors, true)
    edges = torch.cos(math.pi / margin * torch.arange(1, margin, device=vectors.device, dtype=vectors.dtype))
    k = (cosine.detach()[:, None] <= edges).sum(1)
    psi = (1 - 2 * (k % 2)) * _multiple_angle(cosine, margin) - 2 * k
    return _with_true(logits, labels, lengths * (relax * cosine + psi) / (1 + relax))


def cosface_logits(vectors: Tensor, weights: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Logits scale · cos t, of the true class scale · (cos t - margin) (Wang et al. 2018, equation 4); as above."""
    cosines = _cosines(vectors, weights)
    true = cosines.gather(1, labels[:, None])[:, 0]
    return scale * _with_true(cosines, labels, true - margin)


def arcface_logits(vectors: Tensor, weights: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Logits scale · cos t, of the true class scale · cos(t + margin) (Deng et al. 2019, equation 3); as above.

    Beyond t + margin = pi, where the cosine would rise again, it goes on as the line cos t - margin · sin(margin), as
    in the authors' code.
    """
    cosines = _cosines(vectors, weights)
    true = cosines.gather(1, labels[:, None])[:, 0]
    sine = (1 - true.square()).clamp(min=CLOSE).sqrt()
    turned = true * math.cos(margin) - sine * math.sin(margin)
    turned = torch.where(true > -math.cos(margin), turned, true - margin * math.sin(margin))
    return scale * _with_true(cosines, labels, turned)


class EmbedLoss(nn.Module):
    """Base class of embedding losses.

    The constructor takes `dimensions` and `num_classes`, then options; `forward` takes unnormalized vectors (B, D) and
    labels (B,), and returns a scalar, 0 if B is 0.
    """


@embed_losses.register("triplet")
class Triplet(EmbedLoss):
    """Batch-hard triplet loss of the vectors at length 1; see `batch_hard_triplet`. Set train.per_class.

    Args:
        margin: distance in 0..2 by which the nearest image of another class must be farther away than the farthest of
            the same class; null for a soft margin.
    """

    def __init__(self, dimensions: int, num_classes: int, margin: float | None = 0.3) -> None:
        super().__init__()
        if margin is not None:
            check_range(PATH, 0, 2, margin=margin)
        self.margin = margin

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        return batch_hard_triplet(F.normalize(vectors), labels, self.margin)


class _WithClasses(EmbedLoss):
    """Base class of losses with one vector per class."""

    def __init__(self, dimensions: int, num_classes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_classes, dimensions))
        nn.init.xavier_uniform_(self.weights)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


@embed_losses.register("large_margin")
class LargeMargin(_WithClasses):
    """L-Softmax; see `large_margin_logits`.

    Args:
        margin: m, an integer.
        relax: the paper's lambda, constant here; a few units help if training does not start.
    """

    def __init__(self, dimensions: int, num_classes: int, margin: int = 2, relax: float = 0.0) -> None:
        super().__init__(dimensions, num_classes)
        check_range(PATH, 1, 8, margin=margin)
        check_range(PATH, 0, relax=relax)
        self.margin, self.relax = margin, relax

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        logits = large_margin_logits(vectors, self.weights, labels, self.margin, self.relax)
        return self.cross_entropy(logits, labels)


@embed_losses.register("cosface")
class CosFace(_WithClasses):
    """See `cosface_logits`.

    Args:
        margin: of the cosine, in 0..1.
        scale: of the logits.
    """

    def __init__(self, dimensions: int, num_classes: int, margin: float = 0.35, scale: float = 32.0) -> None:
        super().__init__(dimensions, num_classes)
        check_range(PATH, 0, 1, margin=margin)
        check_range(PATH, 1, scale=scale)
        self.margin, self.scale = margin, scale

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        return self.cross_entropy(cosface_logits(vectors, self.weights, labels, self.margin, self.scale), labels)


@embed_losses.register("arcface")
class ArcFace(_WithClasses):
    """See `arcface_logits`.

    Args:
        margin: of the angle, in 0..pi/2.
        scale: of the logits.
    """

    def __init__(self, dimensions: int, num_classes: int, margin: float = 0.5, scale: float = 32.0) -> None:
        super().__init__(dimensions, num_classes)
        check_range(PATH, 0, math.pi / 2, margin=margin)
        check_range(PATH, 1, scale=scale)
        self.margin, self.scale = margin, scale

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        return self.cross_entropy(arcface_logits(vectors, self.weights, labels, self.margin, self.scale), labels)


def build_embed_loss(options: dict[str, Any], dimensions: int, num_classes: int) -> EmbedLoss:
    """Build the loss that `head.loss` describes by `name` and options.

    Raises:
        ConfigError: the name or an option is unknown.
    """
    loss: EmbedLoss = embed_losses.build(options, PATH, dimensions=dimensions, num_classes=num_classes)
    return loss


def _cosines(vectors: Tensor, weights: Tensor) -> Tensor:
    return F.linear(F.normalize(vectors), F.normalize(weights)).clamp(-1, 1)


def _cosine(vectors: Tensor, others: Tensor) -> Tensor:
    return (F.normalize(vectors) * F.normalize(others)).sum(1).clamp(-1, 1)


def _multiple_angle(cosine: Tensor, multiple: int) -> Tensor:
    """cos(m t) of cos t: Chebyshev's polynomial, whose derivative is finite at 1 and -1, unlike that of the arc
    cosine."""
    before, value = torch.ones_like(cosine), cosine
    for _ in range(multiple - 1):
        before, value = value, 2 * cosine * value - before
    return value


def _with_true(logits: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """Logits (B, C) with (B,) `true` in place of those of the true classes."""
    return logits.scatter(1, labels[:, None], true[:, None].to(logits.dtype))
