"""Losses on tensors; heads choose among them and decide what they are averaged over."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.coding import decode
from detkit.boxes.iou import elementwise_iou

BoxLoss = Literal["l1", "smooth_l1", "giou", "diou", "ciou"]


def box_loss(offsets: Tensor, anchors: Tensor, true_offsets: Tensor, kind: BoxLoss) -> Tensor:
    """The summed loss of predicted boxes.

    Args:
        offsets: (N, 4) predicted, as detkit.boxes.coding.encode defines them.
        anchors: (N, 4) xyxy pixels.
        true_offsets: (N, 4) of the truths.
        kind: l1 and smooth_l1 (beta 1) compare offsets; the others are 1 - GIoU (Rezatofighi et al. 2019),
            1 - DIoU or 1 - CIoU (Zheng et al. 2020) of the decoded boxes.

    Returns:
        A scalar; 0 where N is 0.
    """
    if kind == "l1":
        return F.l1_loss(offsets, true_offsets, reduction="sum")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(offsets, true_offsets, reduction="sum")
    overlap = elementwise_iou(decode(offsets, anchors), decode(true_offsets, anchors), kind=kind)
    return (1 - overlap).sum()


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of independent classes (Lin et al. 2017, equation 5), element by element.

    Args:
        logits: any shape.
        targets: same shape, 0 or 1.
        alpha: weight of positives; negatives weigh 1 - alpha.
        gamma: how strongly easy examples are discounted; 0 gives cross-entropy.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = torch.sigmoid(logits)
    miss = probability + targets - 2 * probability * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * miss**gamma * cross_entropy
