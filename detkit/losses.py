"""Losses on tensors; heads choose among them and decide what they are averaged over."""

from collections.abc import Sequence
from typing import Literal

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
        true_offsets: (N, 4) of the truths.
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
    boxes, truths = (decode(values, anchors, deviations=deviations) for values in (offsets, true_offsets))
    overlap = elementwise_iou(boxes, truths, kind=kind)
    return (1 - overlap).sum()
