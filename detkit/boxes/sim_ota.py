"""SimOTA: assignment of ground-truth boxes to the cells of an anchor-free detector by the cost of their predictions.

Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430, section 2.1; a simplification of "OTA: Optimal
Transport Assignment for Object Detection", CVPR 2021, by the same authors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.iou import pairwise_iou
from detkit.structures import Match

IOU_WEIGHT = 3.0
SMALLEST_IOU = 1e-8
LEAST_LOG = -100.0
"""The logarithm of a probability of 0, as in torch's binary cross-entropy."""


@torch.no_grad()
def match_sim_ota(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    class_logits: Tensor,
    objectness: Tensor,
    targets: Tensor,
    labels: Tensor,
    ignored_targets: Tensor | None = None,
    centre_radius: float = 2.5,
    candidates: int = 10,
) -> Match:
    """Assign each target to the k cells with the lowest cost, where k estimates the number of good predictions.

    Candidates are the cells whose centre is inside some target, or inside the square of `centre_radius` cells around
    its centre. The cost of a candidate for a target is

        BCE(sqrt(class score x objectness), one-hot label) - 3 log IoU + P (0 inside both the target and its square)

    where P exceeds all differences of the other terms (1e5 in the paper's code). k is the sum of the target's
    `candidates` largest IoUs, rounded down, but at least 1: for largest IoUs of 0.9, 0.8, 0.7 and otherwise 0, k = 2. A
    cell chosen by several targets is assigned the target for which its cost is lowest, among all targets.

    A cell that is not positive is ignored if its centre is inside an ignored target (crowd, difficult).

    Args:
        points: (A, 2) centres (x, y) of the cells in pixels.
        strides: (A,) side of each cell in pixels.
        boxes: (A, 4) predicted xyxy.
        class_logits: (A, C).
        objectness: (A,) logits.
        targets: (N, 4) xyxy.
        labels: (N,) in 0..C-1.
        ignored_targets: (N,) bool; default all False.
        centre_radius: half the side of the square, in cells.
        candidates: number of largest IoUs that are summed.
    """
    if ignored_targets is None:
        ignored_targets = torch.zeros_like(labels, dtype=torch.bool)
    counted = (~ignored_targets).nonzero().flatten()
    ignored = _inside(points, targets[ignored_targets]).any(0)
    target_index, positive = torch.zeros_like(ignored, dtype=torch.int64), torch.zeros_like(ignored)
    targets, labels = targets[counted], labels[counted]
    in_target = _inside(points, targets)
    in_square = _inside(points, _squares(targets), centre_radius * strides)
    chosen = (in_target | in_square).any(0).nonzero().flatten()
    if len(chosen):
        iou = pairwise_iou(targets, boxes[chosen]).nan_to_num(0)  # predictions that are not valid boxes overlap nothing
        cost = _class_cost(class_logits[chosen], objectness[chosen], labels)
        cost = cost - IOU_WEIGHT * (iou + SMALLEST_IOU).log()
        outside = ~(in_target & in_square)[:, chosen]
        # Not 1e5, which would leave float32 only two decimals to compare the costs outside.
        cost = cost + outside * (cost.max() - cost.min() + 1)
        owner, taken = _assign(cost, iou, min(candidates, len(chosen)))
        target_index[chosen], positive[chosen] = counted[owner], taken
    return Match(target_index, positive, ignored & ~positive)


def _assign(cost: Tensor, iou: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Return (K,) the target assigned to each of K cells, and (K,) whether it is positive; cost and iou are (N, K)."""
    counts = iou.topk(candidates, dim=1).values.sum(1).int().clamp(min=1)
    cheapest = cost.topk(candidates, dim=1, largest=False).indices
    within = torch.arange(candidates, device=cost.device) < counts[:, None]
    claimed = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, cheapest, within)
    claims = claimed.sum(0)
    eligible = claimed | (claims > 1)
    return cost.masked_fill(~eligible, torch.inf).argmin(0), claims > 0


def _class_cost(class_logits: Tensor, objectness: Tensor, labels: Tensor) -> Tensor:
    """(N, K) binary cross-entropy between the scores of K cells and the one-hot labels of N targets."""
    log_scores = (F.logsigmoid(class_logits) + F.logsigmoid(objectness)[:, None]) / 2
    # The loss as if all classes were wrong, corrected by the right class of each target.
    log_others = torch.log1p(-log_scores.exp()).clamp(min=LEAST_LOG)
    right = log_others - log_scores.clamp(min=LEAST_LOG)
    return right.T[labels] - log_others.sum(1)


def _squares(targets: Tensor) -> Tensor:
    """(N, 4) boxes of zero size at the centres of the targets."""
    return ((targets[:, :2] + targets[:, 2:]) / 2).repeat(1, 2)


def _inside(points: Tensor, boxes: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """(N, A) whether A points lie inside N boxes expanded by a margin, which may differ for each point."""
    x, y = points.unbind(1)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    return (x > left - margin) & (x < right + margin) & (y > top - margin) & (y < bottom + margin)
