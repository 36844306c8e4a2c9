"""Which truth each anchor answers for: three rules, one result type.

Common to all three:
- An anchor that is not positive is *ignored*, neither positive nor negative, where an ignored truth (COCO's
  crowd, VOC's difficult) covers half of the anchor's own area, or their IoU reaches the threshold under which
  the rule calls an anchor negative. So with IoU 0.4 to a crowd an anchor is ignored by `match_two_thresholds`
  (low=0.3) and negative under a threshold of 0.5. An ignored truth never makes an anchor positive.
- Without truths every anchor is negative.
- Of equal overlaps an anchor takes the truth that comes first.
- Truths or anchors that hold NaN raise ValueError: every comparison with NaN is false, so that they would
  become background without a word.

No (A, N) matrix of IoUs is made: memory grows with A + N.
"""

import torch
from torch import Tensor

from detkit.boxes.best_overlap import CompiledOverlaps, TiledOverlaps, find_overlaps
from detkit.structures import Match

IGNORED_COVER = 0.5
"""Part of an anchor's own area inside an ignored truth from which on the anchor is ignored."""


def match_bipartite(
    anchors: Tensor, truths: Tensor, ignored_truths: Tensor | None = None, threshold: float = 0.5
) -> Match:
    """The assignment of "Dive into Deep Learning", 14.4: one anchor for every truth, then all that overlap enough.

    Repeatedly the largest entry of the matrix of IoUs binds its anchor to its truth, and its row and column are
    struck, until every truth has one anchor, be the overlap as small as 0. Then each remaining anchor takes its
    best truth if their IoU >= threshold. Of equal entries the first in row-major order of the (A, N) matrix
    goes first: the lower anchor, then the lower truth. With fewer anchors than truths, those truths that come
    last in this order stay without an anchor.

    Args:
        anchors: (A, 4) xyxy.
        truths: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        threshold: least IoU of a further anchor.
    """
    truth_indices, ignored = _set_apart(anchors, truths, ignored_truths, threshold)
    if len(truth_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, truths[truth_indices])
    positive = overlaps.anchor_iou >= threshold
    best_truth = overlaps.anchor_truth.clone()
    bound_anchors, bound_truths = _bind_greedily(overlaps)
    best_truth[bound_anchors] = bound_truths
    positive[bound_anchors] = True
    return Match(truth_indices[best_truth], positive, ignored & ~positive)


def match_ssd(anchors: Tensor, truths: Tensor, ignored_truths: Tensor | None = None, threshold: float = 0.5) -> Match:
    """SSD's assignment (Liu et al. 2016, section 2.2), equal to torchvision's SSDMatcher.

    Each anchor takes its best truth if their IoU >= threshold; then each truth is given its best anchor, however
    small their overlap. Of two truths with the same best anchor the later has it, and the earlier may stay
    without.

    Args:
        anchors: (A, 4) xyxy.
        truths: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        threshold: least IoU of a positive anchor.
    """
    truth_indices, ignored = _set_apart(anchors, truths, ignored_truths, threshold)
    if len(truth_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, truths[truth_indices])
    # The maximum, where plain indexed assignment would leave the winner to chance on a GPU.
    latest = torch.full_like(overlaps.anchor_truth, -1)
    order = torch.arange(len(truth_indices), device=latest.device)
    latest.scatter_reduce_(0, overlaps.truth_anchor, order, reduce="amax")
    forced = latest >= 0
    positive = (overlaps.anchor_iou >= threshold) | forced
    return Match(truth_indices[torch.where(forced, latest, overlaps.anchor_truth)], positive, ignored & ~positive)


def match_two_thresholds(
    anchors: Tensor,
    truths: Tensor,
    ignored_truths: Tensor | None = None,
    low: float = 0.3,
    high: float = 0.7,
    force_best: bool = True,
) -> Match:
    """The region-proposal assignment (Faster R-CNN, Ren et al. 2015, section 3.1.2).

    Positive: IoU >= high with a truth. Negative: IoU < low with all. Ignored: between. For example with the
    defaults best IoUs of (0.2, 0.5, 0.8) make an anchor negative, ignored and positive. With `force_best` the
    anchors that overlap some truth most, all that tie, are positive too; each still answers for its own best
    truth, which may be another one.

    Equal to torchvision's Matcher but for a truth that overlaps no anchor at all (one without area, for
    example): there every anchor ties at 0 and torchvision makes all of them positive; here such a truth
    forces none.

    Args:
        anchors: (A, 4) xyxy.
        truths: (N, 4) xyxy.
        ignored_truths: (N,) bool; see the module. Default none.
        low: an anchor under this IoU is negative.
        high: an anchor from this IoU on is positive.
        force_best: give every truth its best anchors, however small their overlap.

    Raises:
        ValueError: if low > high.
    """
    if low > high:
        raise ValueError(f"low must not be above high, but they are {low} and {high}")
    truth_indices, ignored = _set_apart(anchors, truths, ignored_truths, low)
    if len(truth_indices) == 0 or len(anchors) == 0:
        return _match_nothing(ignored)
    overlaps = find_overlaps(anchors, truths[truth_indices])
    positive = overlaps.anchor_iou >= high
    if force_best:
        positive |= overlaps.attain_best()
    return Match(truth_indices[overlaps.anchor_truth], positive, (ignored | (overlaps.anchor_iou >= low)) & ~positive)


def _set_apart(
    anchors: Tensor, truths: Tensor, ignored_truths: Tensor | None, negative_below: float
) -> tuple[Tensor, Tensor]:
    """Checks the arguments; (N,) indices of the truths that count, and (A,) which anchors the others make ignored."""
    for name, boxes in (("anchors", anchors), ("truths", truths)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must be (N, 4), but got {tuple(boxes.shape)}")
        nan = boxes.isnan()
        if nan.any():
            index = int(nan.any(1).nonzero()[0])
            raise ValueError(f"{name}[{index}] holds NaN: {boxes[index].tolist()}")
    if ignored_truths is None:
        ignored_truths = torch.zeros(len(truths), dtype=torch.bool, device=truths.device)
    if ignored_truths.shape != truths.shape[:1] or ignored_truths.dtype != torch.bool:
        raise ValueError(
            f"ignored_truths must be ({len(truths)},) bool like truths, "
            f"but got {tuple(ignored_truths.shape)} {ignored_truths.dtype}"
        )
    truth_indices = (~ignored_truths).nonzero().flatten()
    if len(anchors) == 0 or len(truth_indices) == len(truths):
        return truth_indices, torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    overlaps = find_overlaps(anchors, truths[ignored_truths])
    return truth_indices, overlaps.covered(IGNORED_COVER) | (overlaps.anchor_iou >= negative_below)


def _match_nothing(ignored: Tensor) -> Match:
    return Match(torch.zeros_like(ignored, dtype=torch.int64), torch.zeros_like(ignored), ignored)


def _bind_greedily(overlaps: TiledOverlaps | CompiledOverlaps) -> tuple[Tensor, Tensor]:
    """(K,) anchors and (K,) truths that `match_bipartite` binds; K = min(A, N).

    The maximum of all IoUs is not searched again for each truth. Each truth keeps its best anchor among those that
    remain, and only the truths whose best anchor was just taken look for another.
    """
    values, rows = overlaps.truth_iou.tolist(), overlaps.truth_anchor.tolist()
    free = torch.ones_like(overlaps.anchor_iou, dtype=torch.bool)
    remaining = list(range(len(values)))
    bound: list[tuple[int, int]] = []
    while remaining and len(bound) < len(free):
        # Of equal values the lowest truth, which binds as row-major order does: equal entries of different anchors
        # do not compete, and of those of one anchor the lowest truth comes first.
        truth = max(remaining, key=lambda n: values[n])
        anchor = rows[truth]
        bound.append((anchor, truth))
        remaining.remove(truth)
        free[anchor] = False
        for loser in [n for n in remaining if rows[n] == anchor]:
            values[loser], rows[loser] = overlaps.best_free(loser, free)
    anchors, truths = torch.tensor(bound, dtype=torch.int64, device=free.device).unbind(1)
    return anchors, truths
