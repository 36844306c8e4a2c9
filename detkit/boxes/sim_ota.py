"""SimOTA: which predictions of an anchor-free detector answer for which ground truth, by what they predict themselves.

Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430, section 2.1; it simplifies "OTA: Optimal Transport
Assignment for Object Detection", CVPR 2021, of the same authors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.iou import pairwise_iou
from detkit.structures import Match

IOU_WEIGHT = 3.0
SMALLEST_IOU = 1e-8
LEAST_LOG = -100.0
"""As in torch's binary cross-entropy, the logarithm of a probability of 0."""


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
    """Each ground truth takes the k cells whose predictions cost least, k being about how many overlap it well.

    Candidates are the cells whose centre lies inside some ground truth, or inside the square of `centre_radius` cells
    around the centre of one. A candidate costs a ground truth

        BCE(sqrt(class score x objectness), one-hot label) - 3 log IoU + P (0 inside both that ground truth and its
        square)

    where P is larger than any difference of the rest (1e5 in the paper's code). The ground truth takes the k cheapest,
    k being the sum of its `candidates` largest IoUs, rounded down, but at least 1. A cell that several ground truths
    take answers for the one it costs least of all ground truths. For example largest IoUs of 0.9, 0.8, 0.7 and 0
    otherwise make k = 2.

    A cell is ignored if its centre lies in an ignored ground truth (crowd, difficult) and it is not positive.

    Args:
        points: (A, 2) centres (x, y) of the cells in pixels.
        strides: (A,) the side of each cell in pixels.
        boxes: (A, 4) xyxy predicted.
        class_logits: (A, C).
        objectness: (A,) logits.
        targets: (N, 4) xyxy.
        labels: (N,) in 0..C-1.
        ignored_truths: (N,) bool; default none.
        centre_radius: half the side of the square, in cells.
        candidates: predictions whose IoUs are summed up.
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
        iou = pairwise_iou(targets, boxes[chosen]).nan_to_num(0)  # a prediction that is no box overlaps nothing
        cost = _class_cost(class_logits[chosen], objectness[chosen], labels)
        cost = cost - IOU_WEIGHT * (iou + SMALLEST_IOU).log()
        outside = ~(in_target & in_square)[:, chosen]
        # Adding 1e5 would leave single precision but two decimals to tell the costs outside apart.
        cost = cost + outside * (cost.max() - cost.min() + 1)
        owner, taken = _assign(cost, iou, min(candidates, len(chosen)))
        target_index[chosen], positive[chosen] = counted[owner], taken
    return Match(target_index, positive, ignored & ~positive)


def _assign(cost: Tensor, iou: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """(K,) the ground truth that each of K cells answers for, and (K,) whether any took it; cost and iou are (N, K)."""
    counts = iou.topk(candidates, dim=1).values.sum(1).int().clamp(min=1)
    cheapest = cost.topk(candidates, dim=1, largest=False).indices
    within = torch.arange(candidates, device=cost.device) < counts[:, None]
    claimed = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, cheapest, within)
    claims = claimed.sum(0)
    eligible = claimed | (claims > 1)
    return cost.masked_fill(~eligible, torch.inf).argmin(0), claims > 0


def _class_cost(class_logits: Tensor, objectness: Tensor, labels: Tensor) -> Tensor:
    """(N, K) binary cross-entropies between the scores of K cells and the one-hot labels of N ground truths."""
    log_scores = (F.logsigmoid(class_logits) + F.logsigmoid(objectness)[:, None]) / 2
    # As if no class were right; then the right one of each ground truth is set straight.
    log_others = torch.log1p(-log_scores.exp()).clamp(min=LEAST_LOG)
    right = log_others - log_scores.clamp(min=LEAST_LOG)
    return right.T[labels] - log_others.sum(1)


def _squares(targets: Tensor) -> Tensor:
    """(N, 4) boxes without size at the centres of the ground truths."""
    return ((targets[:, :2] + targets[:, 2:]) / 2).repeat(1, 2)


def _inside(points: Tensor, boxes: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """(N, A) whether A points lie inside N boxes, each widened by a margin, by one for each point."""
    x, y = points.unbind(1)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    return (x > left - margin) & (x < right + margin) & (y > top - margin) & (y < bottom + margin)
