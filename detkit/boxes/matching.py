"""Which ground truth each anchor answers for: three rules, one result type.

Common to all three:
- An anchor that is not positive is *ignored*, neither positive nor negative, where an ignored ground truth (COCO's
  crowd, VOC's difficult) covers half of the anchor's own area, or their IoU reaches the threshold under which
  the rule calls an anchor negative. So with IoU 0.4 to a crowd an anchor is ignored by `match_two_thresholds`
  (low=0.3) and negative under a threshold of 0.5. An ignored ground truth never makes an anchor positive.
- Without ground truths every anchor is negative.
- Of equal overlaps an anchor takes the ground truth that comes first.
- Ground truths or anchors that hold NaN raise ValueError: every comparison with NaN is false, so that they would
  become background without a word.

No (A, N) matrix of IoUs is made: memory grows with A + N.
"""

import torch
from torch import Tensor

from detkit.boxes.best_overlap import CompiledOverlaps, TiledOverlaps, find_overlaps
from detkit.structures import Match

IGNORED_COVER = 0.5
"""Part of an anchor's own area inside an ignored ground truth from which on the anchor is ignored."""


def match_bipartite(
    anchors: Tensor, targets: Tensor, ignored_targets: Tensor | None = None, threshold: float = 0.5
) -> Match:
    """The assignment of "Dive into Deep Learning", 14.4: one anchor for every target, then all that overlap enough.

    Repeatedly the largest entry of the matrix of IoUs binds its anchor to its ground truth, and its row and column are
    struck, until every ground truth has one anchor, be the overlap as small as 0. Then each remaining anchor takes its
    best ground truth if their IoU >= threshold. Of equal entries the first in row-major order of the (A, N) matrix goes
    first: the lower anchor, then the lower ground truth. With fewer anchors than ground truths, those ground truths
    that come last in this order stay without an anchor.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        threshold: least IoU of a further anchor.
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
    """SSD's assignment (Liu et al. 2016, section 2.2), equal to torchvision's SSDMatcher.

    Each anchor takes its best ground truth if their IoU >= threshold; then each ground truth is given its best anchor,
    however small their overlap. Of two ground truths with the same best anchor the later has it, and the earlier may
    stay without.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        threshold: least IoU of a positive anchor.
    """
    target_indices, ignored = _set_apart(anchors, targets, ignored_targets, threshold)
    if len(target_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, targets[target_indices])
    # The maximum, where plain indexed assignment would leave the winner to chance on a GPU.
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
    """The region-proposal assignment (Faster R-CNN, Ren et al. 2015, section 3.1.2).

    Positive: IoU >= high with a ground truth. Negative: IoU < low with all. Ignored: between. For example with the
    defaults best IoUs of (0.2, 0.5, 0.8) make an anchor negative, ignored and positive. With `force_best` the
    anchors that overlap some ground truth most, all that tie, are positive too; each still answers for its own best
    ground truth, which may be another one.

    Equal to torchvision's Matcher but for a ground truth that overlaps no anchor at all (one without area, for
    example): there every anchor ties at 0 and torchvision makes all of them positive; here such a ground truth
    forces none.

    Args:
        anchors: (A, 4) xyxy.
        targets: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        low: an anchor under this IoU is negative.
        high: an anchor from this IoU on is positive.
        force_best: give every ground truth its best anchors, however small their overlap.

    Raises:
        ValueError: if low > high.
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
    """Check the arguments; (N,) indices of the targets that count, and (A,) which anchors the others make ignored."""
    for name, boxes in (("anchors", anchors), ("targets", targets)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must be (N, 4), but got {tuple(boxes.shape)}")
        nan = boxes.isnan()
        if nan.any():
            index = int(nan.any(1).nonzero()[0])
            raise ValueError(f"{name}[{index}] holds NaN: {boxes[index].tolist()}")
    if ignored_targets is None:
        ignored_targets = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    if ignored_targets.shape != targets.shape[:1] or ignored_targets.dtype != torch.bool:
        raise ValueError(
            f"ignored_truths must be ({len(targets)},) bool like ground truths, "
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
    """(K,) anchors and (K,) ground truths that `match_bipartite` binds; K = min(A, N).

    The maximum of all IoUs is not searched again for each ground truth. Each ground truth keeps its best anchor among
    those that remain, and only the ground truths whose best anchor was just taken look for another.
    """
    values, rows = overlaps.target_iou.tolist(), overlaps.target_anchor.tolist()
    free = torch.ones_like(overlaps.anchor_iou, dtype=torch.bool)
    remaining = list(range(len(values)))
    bound: list[tuple[int, int]] = []
    while remaining and len(bound) < len(free):
        # Of equal values the lowest ground truth, which binds as row-major order does: equal entries of different
        # anchors do not compete, and of those of one anchor the lowest ground truth comes first.
        target = max(remaining, key=lambda n: values[n])
        anchor = rows[target]
        bound.append((anchor, target))
        remaining.remove(target)
        free[anchor] = False
        for loser in [n for n in remaining if rows[n] == anchor]:
            values[loser], rows[loser] = overlaps.best_free(loser, free)
    anchors, targets = torch.tensor(bound, dtype=torch.int64, device=free.device).unbind(1)
    return anchors, targets
