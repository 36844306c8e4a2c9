"""The CPU kernel of weighted box fusion.

Each box is compared with the fused boxes of its group. A vectorisable test without division skips those that cannot
exceed the best IoU so far; for the others the IoU is computed as inter / (area_i + area_j - inter) in float32.

This module imports Numba, so `detkit.boxes.fusion.weighted_box_fusion` imports it on first use.
"""

import numpy as np

from detkit.boxes.kernels.compiling import cached

BLOCK = 128  # clusters per vectorised test
MARGIN = 1e-5  # relative; far above the rounding error of the test, small enough to avoid most divisions
SLACK = np.float32(6e-45)  # four times the smallest float32: a relative margin has no effect on subnormal areas


@cached(nogil=True, error_model="python")
def fuse(boxes, weights, order, starts, iou_threshold):  # type: ignore[no-untyped-def]
    """Cluster and fuse the boxes within each group.

    Args:
        boxes: (N, 4) float32 xyxy, C-contiguous and finite.
        weights: (N,) float64, at least 0.
        order: (M,) int64 indices of boxes, grouped, by descending weight in each group.
        starts: (G + 1,) int64, the start of each group in `order`, and M.
        iou_threshold: float64 in 0..1; IoU with a cluster above which a box joins it.

    Returns:
        For the K clusters, grouped, in order of creation: (K, 4) float32 fused boxes, (K,) float64 sums of weights,
        (K,) int64 numbers of boxes, and (K,) int64 indices of the first boxes.
    """
    total = len(order)
    # One array per coordinate, so that consecutive boxes fill a vector register.
    lefts, tops = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.float32)
    rights, bottoms = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.float32)
    areas = np.empty(total, dtype=np.float32)
    moments = np.empty((total, 4), dtype=np.float64)  # sums of weight * corner
    sums = np.empty(total, dtype=np.float64)
    members = np.empty(total, dtype=np.int64)
    founders = np.empty(total, dtype=np.int64)
    count = 0
    for group in range(len(starts) - 1):
        first = count
        for position in range(starts[group], starts[group + 1]):
            index = order[position]
            weight = weights[index]
            left, top, right, bottom = boxes[index]
            area = (right - left) * (bottom - top)
            best = -1
            if right > left and area > 0.0 and area < np.inf:  # else its intersections are 0, or its IoUs 0 or NaN
                best = _best(
                    lefts[first:count], tops[first:count], rights[first:count], bottoms[first:count],
                    areas[first:count], left, top, right, bottom, area, iou_threshold,
                )  # fmt: skip
            if best < 0:
                lefts[count], tops[count], rights[count], bottoms[count] = left, top, right, bottom
                areas[count] = area
                for axis in range(4):
                    moments[count, axis] = weight * boxes[index, axis]
                sums[count], members[count], founders[count] = weight, 1, index
                count += 1
                continue
            cluster = first + best
            sums[cluster] += weight
            members[cluster] += 1
            for axis in range(4):
                moments[cluster, axis] += weight * boxes[index, axis]
            if weight > 0.0:  # boxes without weight do not move the fused box
                lefts[cluster], tops[cluster] = moments[cluster, 0] / sums[cluster], moments[cluster, 1] / sums[cluster]
                rights[cluster] = moments[cluster, 2] / sums[cluster]
                bottoms[cluster] = moments[cluster, 3] / sums[cluster]
                areas[cluster] = (rights[cluster] - lefts[cluster]) * (bottoms[cluster] - tops[cluster])
    fused = np.stack((lefts[:count], tops[:count], rights[:count], bottoms[:count]), axis=1)
    return fused, sums[:count], members[:count], founders[:count]


@cached(nogil=True, error_model="python")
def _best(lefts, tops, rights, bottoms, areas, left, top, right, bottom, area, iou_threshold):  # type: ignore[no-untyped-def]
    """Return the fused box with the largest IoU above the threshold, the first of ties; -1 if there is none."""
    zero = np.float32(0.0)
    best, best_iou = -1, iou_threshold
    for begin in range(0, len(lefts), BLOCK):
        end = min(begin + BLOCK, len(lefts))
        # inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b)
        factor = np.float32(best_iou / (1.0 + best_iou) * (1.0 - MARGIN))
        slack = SLACK if best_iou > 0.0 else zero
        if not _any_above(
            lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], areas[begin:end],
            left, top, right, bottom, factor, factor * area - slack,
        ):  # fmt: skip
            continue
        for j in range(begin, end):
            width = max(zero, min(right, rights[j]) - max(left, lefts[j]))
            height = max(zero, min(bottom, bottoms[j]) - max(top, tops[j]))
            inter = width * height
            if inter > zero:
                iou = inter / (areas[j] + area - inter)
                if iou > best_iou:
                    best, best_iou = j, np.float64(iou)
    return best


@cached(nogil=True, error_model="python")
def _any_above(  # type: ignore[no-untyped-def]
    lefts, tops, rights, bottoms, areas, left, top, right, bottom, factor, bound
):
    """Return whether any fused box may overlap enough; without divisions and branches, so that it is vectorised."""
    zero = np.float32(0.0)
    above = False
    for j in range(len(lefts)):
        left_j, top_j, right_j, bottom_j = lefts[j], tops[j], rights[j], bottoms[j]
        width = (right_j if right_j < right else right) - (left_j if left_j > left else left)
        height = (bottom_j if bottom_j < bottom else bottom) - (top_j if top_j > top else top)
        inter = (width if width > zero else zero) * height
        above |= inter - factor * areas[j] > bound
    return above
