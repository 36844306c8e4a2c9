"""Losses on tensors; heads choose among them and decide what they are averaged over."""

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
    """The summed loss of predicted boxes.

    Args:
        offsets: (N, 4) predicted, as detkit.boxes.coding.encode defines them.
        anchors: (N, 4) xyxy pixels.
        true_offsets: (N, 4) of the ground truths.
        kind: l1 and smooth_l1 compare offsets; the others are 1 - GIoU (Rezatofighi et al. 2019),
            1 - DIoU or 1 - CIoU (Zheng et al. 2020) of the decoded boxes.
        deviations: those that the offsets were encoded with.
        beta: where smooth_l1 turns from a parabola into a line.

    Returns:
        A scalar; 0 where N is 0.
    """
    if kind == "l1":
        return F.l1_loss(offsets, true_offsets, reduction="sum")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(offsets, true_offsets, reduction="sum", beta=beta)
    boxes, targets = (decode(values, anchors, deviations=deviations) for values in (offsets, true_offsets))
    overlap = elementwise_iou(boxes, targets, kind=kind)
    return (1 - overlap).sum()


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy in which what is easy counts little (Lin et al. 2017, "Focal Loss", equation 5).

    With p the probability of the true answer it is -alpha (1 - p)^gamma log(p) where the ground truth is true, and with
    1 - alpha in place of alpha where it is false. For example gamma 2 makes an answer of p = 0.9 count a hundredth
    of what it does in cross-entropy, one of 0.5 a quarter.

    Args:
        logits: of any shape, float.
        target: of the same shape, bool.
        alpha: weight of what is true, in 0..1.
        gamma: 0 or more; 0 is cross-entropy weighted by alpha.

    Returns:
        the loss of each element, of the same shape. It and its gradient are finite for every finite logit.

    Raises:
        ValueError: the shapes differ, or the ground truth is not bool.
    """
    if target.shape != logits.shape or target.dtype != torch.bool:
        raise ValueError(
            f"ground truth must be {tuple(logits.shape)} bool, but got {tuple(target.shape)} {target.dtype}"
        )
    right = torch.where(target, logits, -logits)
    weight = (1 - alpha) + (2 * alpha - 1) * target.to(logits.dtype)
    # (1 - p)^gamma as an exponential, whose gradient is finite where 1 - p is 0.
    return -weight * torch.exp(gamma * F.logsigmoid(-right)) * F.logsigmoid(right)


def weigh_background(losses: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Keep images without objects from outweighing the others, where the sum of `losses` is divided by the positives.

    An image without objects adds negatives to that sum and nothing to what it is divided by, so that a batch of such
    images would count a hundred times as much as one with objects. Therefore all negatives of a batch together count
    as much as those of its images with a positive: of 30 negatives in the one image that has positives and 8 in each
    of 15 others, each counts 30 / 150 = 0.2. In a batch without positives the mean over the images counts, and 1 at
    most, which bounds its gradient.

    Args:
        losses: (B, A), 0 or more.
        positive: (B, A) bool, anchors that answer for an object.
        negative: (B, A) bool, background anchors that count.

    Returns:
        (B, A), the losses, of negatives times a constant; the same to the bit where every image has a positive.
    """
    counts = negative.sum(1)
    beside_objects = (counts * positive.any(1)).sum()
    alone = torch.where(negative, losses.detach(), 0.0).sum().clamp(min=len(losses)).reciprocal()
    weight = torch.where(beside_objects > 0, beside_objects / counts.sum().clamp(min=1), alone)
    return torch.where(negative, weight * losses, losses)


def weigh_empty_images(losses: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Let the images without a positive count as one negative in all, where the sum of `losses` is divided by the
    positives of the batch.

    For hard negatives, chosen by the number of positives: in the images with objects they count as in Liu et al. 2016,
    "SSD", section 2.2, and the others, which torchvision leaves out, still teach background.

    Args:
        losses: (B, A), 0 or more.
        positive: (B, A) bool, anchors that answer for an object.
        negative: (B, A) bool, background anchors that count.

    Returns:
        (B, A), the losses, of images without a positive divided by the number of their negatives and by B.
    """
    count = negative.sum(1, keepdim=True).clamp(min=1) * len(losses)
    return torch.where(positive.any(1, keepdim=True), losses, losses / count)


def gram_matrix(features: Tensor) -> Tensor:
    """How strongly the channels of a map occur together: its style, without where anything is.

    Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks", equation 3, divided by c·h·w as in
    "Dive into Deep Learning", so that neither the size of the image nor the number of channels matters.

    Args:
        features: (B, c, h, w).

    Returns:
        (B, c, c): XXᵀ / (c·h·w), with X the map as (c, h·w).
    """
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    flat = features.reshape(len(features), channels, pixels)
    # Divided first: of half-precision maps the sum over a large image would overflow.
    return flat @ (flat / (channels * pixels)).transpose(1, 2)


def style_loss(features: Tensor, gram: Tensor) -> Tensor:
    """The mean squared difference of the Gram matrices of (B, c, h, w) maps and `gram`, (1 or B, c, c)."""
    return (gram_matrix(features) - gram).square().mean()


def total_variation(images: Tensor) -> Tensor:
    """How much neighbours in (B, C, H, W) differ: (mean |x_ij - x_i+1,j| + mean |x_ij - x_i,j+1|) / 2.

    Means and not the sum over an image, so that a weight means the same at every size; 0 along a side of one pixel.
    """
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return 0.5 * (down.sum() / max(down.numel(), 1) + right.sum() / max(right.numel(), 1))
