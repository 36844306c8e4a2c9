"""Assignment of ground-truth boxes to anchors, by three rules with one result type.

All rules have in common:
- An anchor that is not positive is *ignored*, neither positive nor negative, if an ignored ground-truth box (COCO's
  crowd, VOC's difficult) covers half of the anchor's area, or their IoU reaches the threshold below which the rule
  makes anchors negative. For example, an anchor with IoU 0.4 to a crowd is ignored by `match_two_thresholds` (low=0.3)
  and negative for a threshold of 0.5. Ignored boxes never make an anchor positive.
- Without ground-truth boxes all anchors are negative.
- If an anchor has the same IoU with several ground-truth boxes, the first is assigned.
- Boxes or anchors with NaN raise ValueError: since comparisons with NaN are false, they would silently become
  background.

The (A, N) matrix of IoUs is not stored: memory is O(A + N).
"""

import torch
from torch import Tensor

from detkit.boxes.best_overlap import CompiledOverlaps, TiledOverlaps, find_overlaps
from detkit.structures import Match

IGNORED_COVER = 0.5
"""Fraction of an anchor's area inside an ignored box from which the anchor is ignored."""


def match_bipartite(
    anchors: Tensor, targets: Tensor, ignored_targets: Tensor | None = None, threshold: float = 0.5
) -> Match:
    """Assign one anchor to every target, then all anchors with a sufficient IoU ("Dive into Deep Learning", 14.4).

    Repeatedly, the largest entry of the IoU matrix assigns its target to its anchor and its row and column are removed,
    until every target has one anchor, even with an IoU of 0. Then each remaining anchor is assigned its best target if
    their IoU >= threshold. Ties are resolved in row-major order of the (A, N) matrix: the lower anchor, then the lower
    target. If there are fewer anchors than targets, the last targets in this order remain without an anchor.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_targets: (N,) bool; see the module. Default all False.
        threshold: minimum IoU of a further anchor.
    """
    target_indices, ignored = _set_apart(anchors, targets, ignored_targets, threshold)
    if len(target_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, targets[target_indices])
    positive = overlaps.anchor_iou >= threshold
    best_target = overlaps.anchor_target.clone()
    bound_anchors, bound_targets = _bind_greedily(overlaps)
    best_target[bound_anchors] = bound_targets
    positive[bound_anchors] = True
    return Match(target_indices[best_target], positive, ignored & ~positive)


def match_ssd(anchors: Tensor, targets: Tensor, ignored_targets: Tensor | None = None, threshold: float = 0.5) -> Match:
    """Assign targets by SSD's rule (Liu et al. 2016, section 2.2), equal to torchvision's SSDMatcher.

    Each anchor is assigned its best target if their IoU >= threshold; then each target is assigned to its best anchor,
    regardless of the IoU. If two targets have the same best anchor, it is assigned the later one, and the earlier may
    remain without an anchor.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_targets: (N,) bool; see the module. Default all False.
        threshold: minimum IoU of a positive anchor.
    """
    target_indices, ignored = _set_apart(anchors, targets, ignored_targets, threshold)
    if len(target_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, targets[target_indices])
    # amax, since plain indexed assignment with duplicates is not deterministic on a GPU.
    latest = torch.full_like(overlaps.anchor_target, -1)
    order = torch.arange(len(target_indices), device=latest.device)
    latest.scatter_reduce_(0, overlaps.target_anchor, order, reduce="amax")
    forced = latest >= 0
    positive = (overlaps.anchor_iou >= threshold) | forced
    return Match(target_indices[torch.where(forced, latest, overlaps.anchor_target)], positive, ignored & ~positive)


def match_two_thresholds(
    anchors: Tensor,
    targets: Tensor,
    ignored_targets: Tensor | None = None,
    low: float = 0.3,
    high: float = 0.7,
    force_best: bool = True,
) -> Match:
    """Assign targets by the rule of region-proposal networks (Faster R-CNN, Ren et al. 2015, section 3.1.2).

    Positive: IoU >= high with a target. Negative: IoU < low with all targets. Ignored: otherwise. For example, with the
    defaults, anchors with best IoUs of 0.2, 0.5 and 0.8 are negative, ignored and positive. With `force_best` the
    anchors with the largest IoU of some target, including ties, are positive too; each is still assigned its own best
    target, which may be another one.

    Equal to torchvision's Matcher, except for a target that overlaps no anchor (for example one without area): all
    anchors tie at 0, which makes all of them positive in torchvision and none here.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_targets: (N,) bool; see the module. Default all False.
        low: anchors below this IoU are negative.
        high: anchors of at least this IoU are positive.
        force_best: make the best anchors of every target positive, regardless of their IoU.

    Raises:
        ValueError: low > high.
    """
    if low > high:
        raise ValueError(f"low must not be above high, but they are {low} and {high}")
    target_indices, ignored = _set_apart(anchors, targets, ignored_targets, low)
    if len(target_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, targets[target_indices])
    positive = overlaps.anchor_iou >= high
    if force_best:
        positive |= overlaps.attain_best()
    return Match(target_indices[overlaps.anchor_target], positive, (ignored | (overlaps.anchor_iou >= low)) & ~positive)


def _set_apart(
    anchors: Tensor, targets: Tensor, ignored_targets: Tensor | None, negative_below: float
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return (N,) indices of the targets to match, and (A,) bool, anchors that others ignore."""
    for name, boxes in (("anchors", anchors), ("targets", targets)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must be (N, 4), but got {tuple(boxes.shape)}")
        nan = boxes.isnan()
        if nan.any():
            index = int(nan.any(1).nonzero()[0])
            raise ValueError(f"{name}[{index}] contains NaN: {boxes[index].tolist()}")
    if ignored_targets is None:
        ignored_targets = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    if ignored_targets.shape != targets.shape[:1] or ignored_targets.dtype != torch.bool:
        raise ValueError(
            f"ignored_targets must be ({len(targets)},) bool, one for each target, "
            f"but got {tuple(ignored_targets.shape)} {ignored_targets.dtype}"
        )
    target_indices = (~ignored_targets).nonzero().flatten()
    if len(anchors) == 0 or len(target_indices) == len(targets):
        return target_indices, torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    overlaps = find_overlaps(anchors, targets[ignored_targets])
    return target_indices, overlaps.covered(IGNORED_COVER) | (overlaps.anchor_iou >= negative_below)


def _match_nothing(ignored: Tensor) -> Match:
    return Match(torch.zeros_like(ignored, dtype=torch.int64), torch.zeros_like(ignored), ignored)


def _bind_greedily(overlaps: TiledOverlaps | CompiledOverlaps) -> tuple[Tensor, Tensor]:
    """Return the (K,) anchors and (K,) targets that `match_bipartite` pairs; K = min(A, N).

    Each target keeps its best anchor among the free ones; only targets whose best anchor was just taken search again.
    """
    values, rows = overlaps.target_iou.tolist(), overlaps.target_anchor.tolist()
    free = torch.ones_like(overlaps.anchor_iou, dtype=torch.bool)
    remaining = list(range(len(values)))
    bound: list[tuple[int, int]] = []
    while remaining and len(bound) < len(free):
        # Among ties, the lowest target. This equals row-major order: ties of different anchors do not compete, and
        # among those of one anchor the lowest target comes first.
        target = max(remaining, key=lambda n: values[n])
        anchor = rows[target]
        bound.append((anchor, target))
        remaining.remove(target)
        free[anchor] = False
        for loser in [n for n in remaining if rows[n] == anchor]:
            values[loser], rows[loser] = overlaps.best_free(loser, free)
    anchors, targets = torch.tensor(bound, dtype=torch.int64, device=free.device).unbind(1)
    return anchors, targets
