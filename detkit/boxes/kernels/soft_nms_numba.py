"""The CPU kernel of Soft-NMS: bit-identical to the paper's loop, with less work.

The paper's loop takes the best box and decays all remaining ones, so each box taken costs a pass over the others. Since
scores only decrease, a score without its latest decays is an upper bound of the true score. Each group is kept as a
heap of these bounds. The box on top is decayed by the boxes taken since it was last updated, in the order in which they
were taken, and is taken itself if it remains on top. So a box that cannot be next is not touched, a box whose score
falls below the threshold is not compared further, and with a limit the remaining boxes are never updated.

This module imports Numba, so `detkit.boxes.soft_nms.soft_nms` imports it on first use.
"""

import math

import numpy as np

from detkit.boxes.kernels.compiling import cached

BLOCK = 128  # taken boxes per vectorised test
MARGIN = 1e-5  # relative; far above the rounding error of the test, small enough to avoid most confirmations
SLACK = np.float32(6e-45)  # four times the smallest float32: a relative margin has no effect on subnormal areas


@cached(nogil=True, error_model="python")
def take_and_decay(  # type: ignore[no-untyped-def]
    boxes, scores, order, starts, gaussian, sigma, iou_threshold, score_threshold, limit
):
    """Soft-NMS within each group.

    Args:
        boxes: (N, 4) float32 xyxy, C-contiguous and finite.
        scores: (N,) float32 or float64, finite.
        order: (M,) int64 indices of boxes whose score is above `score_threshold`, grouped, by descending score in each
            group, ties by index.
        starts: (G + 1,) int64, start of each group in `order`, and M.
        gaussian: use the Gaussian decay, otherwise the linear one.
        sigma: float32, of the Gaussian decay; ignored by the linear decay.
        iou_threshold: float64 in 0..1; IoU above which boxes decay. 0 for the Gaussian decay.
        score_threshold: float64, at least 0; boxes whose score is not above it are removed.
        limit: maximum number of boxes taken per group.

    Returns:
        (K,) int64 boxes taken, grouped; and (N,) scores, fully decayed for the boxes taken.
    """
    decayed = scores.copy()
    taken = np.empty(len(order), dtype=np.int64)
    count = 0
    largest = 0
    for group in range(len(starts) - 1):
        largest = max(largest, starts[group + 1] - starts[group])
    # One array per coordinate, so that consecutive boxes fill a vector register.
    lefts, tops = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    rights, bottoms = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    areas, bounds = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    seen = np.zeros(len(boxes), dtype=np.int64)  # number of taken boxes that each box was decayed by
    # inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b); the bound of a box is its part of the sum.
    factor = np.float32(iou_threshold / (1.0 + iou_threshold) * (1.0 - MARGIN))
    slack = SLACK if iou_threshold > 0.0 else np.float32(0.0)

    for group in range(len(starts) - 1):
        heap = order[starts[group] : starts[group + 1]].copy()  # sorted, hence a heap
        size = len(heap)
        first, filled = count, 0
        while size > 0 and count - first < limit:
            index = heap[0]
            left, top, right, bottom = boxes[index]
            area = (right - left) * (bottom - top)
            overlaps = right > left and area > 0.0 and area < np.inf  # otherwise its IoUs are 0 or NaN
            bound = factor * area - slack
            before = score = decayed[index]
            if overlaps:
                for begin in range(seen[index], filled, BLOCK):
                    end = min(begin + BLOCK, filled)
                    if _any_near(
                        lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], bounds[begin:end],
                        left, top, right, bottom, bound,
                    ):  # fmt: skip
                        score = _decay(
                            lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end],
                            areas[begin:end], left, top, right, bottom, area, score, gaussian, sigma, iou_threshold,
                        )  # fmt: skip
                        if score <= score_threshold:
                            break
                seen[index] = filled
                decayed[index] = score
            if score == before:  # up to date, and no other bound is above it
                taken[count] = index
                count += 1
                if overlaps:
                    lefts[filled], tops[filled], rights[filled], bottoms[filled] = left, top, right, bottom
                    areas[filled], bounds[filled] = area, bound
                    filled += 1
            if score == before or score <= score_threshold:
                size -= 1
                heap[0] = heap[size]
            _sift_down(heap[:size], decayed)
    return taken[:count], decayed


@cached(nogil=True, error_model="python")
def _any_near(lefts, tops, rights, bottoms, bounds, left, top, right, bottom, bound):  # type: ignore[no-untyped-def]
    """Return whether a taken box may overlap enough; without divisions and branches, so that it is vectorised."""
    zero = np.float32(0.0)
    near = False
    for j in range(len(lefts)):
        left_j, top_j, right_j, bottom_j = lefts[j], tops[j], rights[j], bottoms[j]
        width = (right_j if right_j < right else right) - (left_j if left_j > left else left)
        height = (bottom_j if bottom_j < bottom else bottom) - (top_j if top_j > top else top)
        inter = (width if width > zero else zero) * height
        near |= inter - bounds[j] > bound
    return near


@cached(nogil=True, error_model="python")
def _decay(  # type: ignore[no-untyped-def]
    lefts, tops, rights, bottoms, areas, left, top, right, bottom, area, score, gaussian, sigma, iou_threshold
):
    """Decay the score by these boxes, one after the other. IoU and weight are float32."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for j in range(len(lefts)):
        width = max(zero, min(right, rights[j]) - max(left, lefts[j]))
        height = max(zero, min(bottom, bottoms[j]) - max(top, tops[j]))
        inter = width * height
        if inter > zero:
            iou = inter / (areas[j] + area - inter)
            if iou > iou_threshold:
                score *= math.exp(-(iou * iou) / sigma) if gaussian else one - iou
    return score


@cached(nogil=True, error_model="python")
def _sift_down(heap, scores):  # type: ignore[no-untyped-def]
    """Sift the first entry down: the best score on top, ties by lower index."""
    if len(heap) == 0:
        return
    index, position = heap[0], 0
    while True:
        child = 2 * position + 1
        if child >= len(heap):
            break
        if child + 1 < len(heap) and _goes_first(heap[child + 1], heap[child], scores):
            child += 1
        if not _goes_first(heap[child], index, scores):
            break
        heap[position] = heap[child]
        position = child
    heap[position] = index


@cached(nogil=True, error_model="python")
def _goes_first(a, b, scores):  # type: ignore[no-untyped-def]
    return scores[a] > scores[b] or (scores[a] == scores[b] and a < b)
