"""The CPU kernel of Soft-NMS: the result of the paper's loop to the bit, in less work.

The paper's loop takes the best box and decays all that remain, so that each box taken costs a pass over the
others. Scores only ever fall, though, hence a score that lacks its latest decays is an upper bound of the true
one. Each group is kept as a heap under these bounds. The box on top is decayed by those taken since it was last
looked at, in the order in which they were taken, and is taken itself if it still is on top. So a box that cannot
come next is not touched, one whose score falls under the threshold is compared with no further box, and with a
limit to the boxes taken the others may never be looked at.

Numba is imported with this module, so only `detkit.boxes.soft_nms.soft_nms` imports it, when it is first called.
"""

import math

import numpy as np

from detkit.boxes.kernels.compiling import cached

BLOCK = 128  # taken boxes tested before looking whether one of them decays the score
MARGIN = 1e-5  # relative; far above the rounding of the test, far below what would cost many confirmations
SLACK = np.float32(6e-45)  # four times the smallest float32: the relative margin is void on subnormal areas


@cached(nogil=True, error_model="python")
def take_and_decay(  # type: ignore[no-untyped-def]
    boxes, scores, order, starts, gaussian, sigma, iou_threshold, score_threshold, limit
):
    """Soft-NMS within each group.

    Args:
        boxes: (N, 4) float32 xyxy, C-contiguous and finite.
        scores: (N,) float32 or float64, finite.
        order: (M,) int64 indices of boxes whose score is above `score_threshold`, group after group, in each the
            best score first, equal ones by index.
        starts: (G + 1,) int64, where in `order` each group begins, and M.
        gaussian: whether the decay is the Gaussian one, else the linear one.
        sigma: float32, of the Gaussian decay; the linear one makes no use of it.
        iou_threshold: float64 in 0..1; boxes decay whose IoU is above it. 0 for the Gaussian decay.
        score_threshold: float64, 0 or more; boxes are out whose score falls to it or below.
        limit: the most boxes taken of each group.

    Returns:
        (K,) int64 the boxes taken, group after group; and (N,) the scores, decayed to the end for those.
    """
    decayed = scores.copy()
    taken = np.empty(len(order), dtype=np.int64)
    count = 0
    largest = 0
    for group in range(len(starts) - 1):
        largest = max(largest, starts[group + 1] - starts[group])
    # One array for each coordinate: neighbouring boxes fill one vector register.
    lefts, tops = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    rights, bottoms = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    areas, bounds = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    seen = np.zeros(len(boxes), dtype=np.int64)  # how many of those arrays each box was decayed by
    # inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b), each box's part of which is its bound.
    factor = np.float32(iou_threshold / (1.0 + iou_threshold) * (1.0 - MARGIN))
    slack = SLACK if iou_threshold > 0.0 else np.float32(0.0)

    for group in range(len(starts) - 1):
        heap = order[starts[group] : starts[group + 1]].copy()  # sorted: a heap already
        size = len(heap)
        first, filled = count, 0
        while size > 0 and count - first < limit:
            index = heap[0]
            left, top, right, bottom = boxes[index]
            area = (right - left) * (bottom - top)
            overlaps = right > left and area > 0.0 and area < np.inf  # else its IoUs are 0 or NaN: it decays nothing
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
            if score == before:  # it is up to date, and the others' bounds are not above it
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
    """Whether a taken box may overlap enough to decay; without division or a branch, so that it is vectorised."""
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
    """The score after the decays by these boxes, one after the other. IoU and weight are float32."""
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
    """Moves the first entry to where it belongs: the best score on top, of equal ones the lower index."""
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
