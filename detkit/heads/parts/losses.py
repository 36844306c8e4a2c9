"""Loss functions on tensors; heads select them and decide on their normalization."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.coding import decode
from detkit.boxes.iou import elementwise_iou

BoxLoss = Literal["l1", "smooth_l1", "giou", "diou", "ciou"]


def box_loss(
    offsets: Tensor,
    anchors: Tensor,
    true_offsets: Tensor,
    kind: BoxLoss,
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    beta: float = 1.0,
) -> Tensor:
    """Compute the summed loss of predicted boxes.

    Args:
        offsets: (N, 4) predicted, as defined by detkit.boxes.coding.encode.
        anchors: (N, 4) xyxy pixels.
        true_offsets: (N, 4) of the matched ground-truth boxes.
        kind: l1 and smooth_l1 compare offsets; the others are 1 - GIoU (Rezatofighi et al. 2019),
            1 - DIoU or 1 - CIoU (Zheng et al. 2020) of the decoded boxes.
        deviations: the deviations that the offsets were encoded with.
        beta: threshold at which smooth_l1 changes from quadratic to linear.

    Returns:
        A scalar; 0 if N is 0.
    """
    if kind == "l1":
        return F.l1_loss(offsets, true_offsets, reduction="sum")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(offsets, true_offsets, reduction="sum", beta=beta)
    boxes, targets = (decode(values, anchors, deviations=deviations) for values in (offsets, true_offsets))
    overlap = elementwise_iou(boxes, targets, kind=kind)
    return (1 - overlap).sum()


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss, a binary cross-entropy that down-weights easy examples (Lin et al. 2017, equation 5).

    With p the predicted probability of the target, it is -alpha (1 - p)^gamma log(p) for true targets, and the same
    with 1 - alpha instead of alpha for false ones. For example, with gamma 2 a prediction of p = 0.9 has a hundredth of
    its cross-entropy, and one of 0.5 a quarter.

    Args:
        logits: of any shape, float.
        target: of the same shape, bool.
        alpha: weight of true targets, in 0..1.
        gamma: focusing parameter, 0 or more; 0 is cross-entropy weighted by alpha.

    Returns:
        The loss of each element, in the same shape. It and its gradient are finite for every finite logit.

    Raises:
        ValueError: the shapes differ, or the target is not bool.
    """
    if target.shape != logits.shape or target.dtype != torch.bool:
        raise ValueError(f"target must be {tuple(logits.shape)} bool, but got {tuple(target.shape)} {target.dtype}")
    right = torch.where(target, logits, -logits)
    weight = (1 - alpha) + (2 * alpha - 1) * target.to(logits.dtype)
    # (1 - p)^gamma as an exponential, so that the gradient is finite at 1 - p = 0.
    return -weight * torch.exp(gamma * F.logsigmoid(-right)) * F.logsigmoid(right)


def weigh_background(losses: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Reweight negatives so that images without objects do not dominate losses normalized by the number of positives.

    An image without objects adds negatives to the sum but nothing to the normalizer, so a batch of such images would
    count a hundred times as much as one with objects. Therefore all negatives of a batch together are given the weight
    of the negatives in images with a positive: with 30 negatives in one image with positives and 8 in each of 15
    others, each negative is weighted by 30 / 150 = 0.2. In a batch without positives the loss is the mean over images,
    at most 1, which bounds its gradient.

    Args:
        losses: (B, A), 0 or more.
        positive: (B, A) bool, anchors matched to an object.
        negative: (B, A) bool, background anchors that count.

    Returns:
        (B, A), the losses, with negatives scaled by a constant; bit-identical if every image has a positive.
    """
    counts = negative.sum(1)
    beside_objects = (counts * positive.any(1)).sum()
    alone = torch.where(negative, losses.detach(), 0.0).sum().clamp(min=len(losses)).reciprocal()
    weight = torch.where(beside_objects > 0, beside_objects / counts.sum().clamp(min=1), alone)
    return torch.where(negative, weight * losses, losses)


def weigh_empty_images(losses: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Scale down losses of images without positives, so that together they count as at most one negative when the sum
    is divided by the positives of the batch.

    For hard negatives, selected in proportion to the positives: images with objects count as in Liu et al. 2016, "SSD",
    section 2.2, and images without, which torchvision ignores, still contribute background.

    Args:
        losses: (B, A), 0 or more.
        positive: (B, A) bool, anchors matched to an object.
        negative: (B, A) bool, background anchors that count.

    Returns:
        (B, A), the losses; those of images without a positive are divided by the number of their negatives and by B.
    """
    count = negative.sum(1, keepdim=True).clamp(min=1) * len(losses)
    return torch.where(positive.any(1, keepdim=True), losses, losses / count)


def gram_matrix(features: Tensor) -> Tensor:
    """Compute the Gram matrix: the correlations of the channels of a map, which describe style independent of layout.

    Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks", equation 3, divided by c·h·w as in
    "Dive into Deep Learning", so that it does not depend on the image size or the number of channels.

    Args:
        features: (B, c, h, w).

    Returns:
        (B, c, c): XXᵀ / (c·h·w), where X is the map reshaped to (c, h·w).
    """
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    flat = features.reshape(len(features), channels, pixels)
    # Divide first, since in half precision the sum over a large image would overflow.
    return flat @ (flat / (channels * pixels)).transpose(1, 2)


def style_loss(features: Tensor, gram: Tensor) -> Tensor:
    """Compute the mean squared difference between the Gram matrices of maps (B, c, h, w) and `gram` (1 or B, c, c)."""
    return (gram_matrix(features) - gram).square().mean()


def total_variation(images: Tensor) -> Tensor:
    """Compute the total variation of images (B, C, H, W): (mean |x_ij - x_i+1,j| + mean |x_ij - x_i,j+1|) / 2.

    It uses means, not sums, so that its weight is independent of the image size; 0 along a side of one pixel.
    """
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return 0.5 * (down.sum() / max(down.numel(), 1) + right.sum() / max(right.numel(), 1))
