"""The CPU kernel of non-maximum suppression: exact greedy NMS, equal to torchvision.ops.nms bit for bit.

Numba is imported with this module, so only `detkit.boxes.nms.nms` imports it, when it is first called. The
first call of all compiles for some seconds; later processes load the result from Numba's cache.

Every candidate is compared with the boxes that were kept before it. A test without division, which LLVM turns
into vector code, passes over most of them; it is laid out so that it never passes over a true hit, and what it
reports is confirmed by torchvision's own formula, inter / (area_i + area_j - inter) > threshold in float32.
"""

import numpy as np
from numba import njit

BLOCK = 256  # kept boxes tested before looking whether one of them hit
MARGIN = 1e-5  # relative; far above the rounding of the test, far below what would cost many confirmations
SLACK = np.float32(6e-45)  # four times the smallest float32: the relative margin is void on subnormal areas


@njit(cache=True, nogil=True)
def suppress(boxes, order, starts, threshold):  # type: ignore[no-untyped-def]
    """Greedy NMS within each group.

    Args:
        boxes: (N, 4) float32 xyxy, C-contiguous and finite.
        order: (N,) int64 indices of boxes, group after group, the best score first in each.
        starts: (G + 1,) int64, where in `order` each group begins, and N.
        threshold: float64 in 0..1; a box goes whose IoU with a kept one is above it.

    Returns:
        (N,) bool, true for each box that is kept.
    """
    keep = np.zeros(len(boxes), dtype=np.bool_)
    largest = 0
    for group in range(len(starts) - 1):
        largest = max(largest, starts[group + 1] - starts[group])
    # One array for each coordinate: neighbouring kept boxes fill one vector register. Rows of a single (6, N)
    # array would not do: Numba takes them for strided ones, and the code is then ten times slower.
    lefts, tops = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    rights, bottoms = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    areas, bounds = np.empty(largest, dtype=np.float32), np.empty(largest, dtype=np.float32)
    # inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b), each box's part of which is its bound.
    factor = np.float32(threshold / (1.0 + threshold) * (1.0 - MARGIN))
    slack = SLACK if threshold > 0.0 else np.float32(0.0)

    for group in range(len(starts) - 1):
        kept = 0
        for position in range(starts[group], starts[group + 1]):
            index = order[position]
            left, top, right, bottom = boxes[index]
            area = (right - left) * (bottom - top)
            if not (right > left and area > 0.0 and area < np.inf):
                # Its intersections are 0, or its IoUs are 0 or NaN: it is kept and suppresses nothing.
                keep[index] = True
                continue
            bound = factor * area - slack
            hit = False
            for begin in range(0, kept, BLOCK):
                end = min(begin + BLOCK, kept)
                if _any_near(
                    lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], bounds[begin:end],
                    left, top, right, bottom, bound,
                ) and _any_hit(
                    lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], areas[begin:end],
                    left, top, right, bottom, area, threshold,
                ):  # fmt: skip
                    hit = True
                    break
            if not hit:
                keep[index] = True
                lefts[kept], tops[kept], rights[kept], bottoms[kept] = left, top, right, bottom
                areas[kept], bounds[kept] = area, bound
                kept += 1
    return keep


@njit(cache=True, nogil=True)
def _any_near(lefts, tops, rights, bottoms, bounds, left, top, right, bottom, bound):  # type: ignore[no-untyped-def]
    """Whether a kept box may overlap too much; without division or a branch, so that it is vectorised."""
    zero = np.float32(0.0)
    near = False
    for j in range(len(lefts)):
        left_j, top_j, right_j, bottom_j = lefts[j], tops[j], rights[j], bottoms[j]
        width = (right_j if right_j < right else right) - (left_j if left_j > left else left)
        height = (bottom_j if bottom_j < bottom else bottom) - (top_j if top_j > top else top)
        inter = (width if width > zero else zero) * height
        near |= inter - bounds[j] > bound
    return near


@njit(cache=True, nogil=True)
def _any_hit(lefts, tops, rights, bottoms, areas, left, top, right, bottom, area, threshold):  # type: ignore[no-untyped-def]
    """Whether a kept box overlaps too much, by torchvision's formula in its order of operations."""
    zero = np.float32(0.0)
    for j in range(len(lefts)):
        width = max(zero, min(right, rights[j]) - max(left, lefts[j]))
        height = max(zero, min(bottom, bottoms[j]) - max(top, tops[j]))
        inter = width * height
        # Kept and candidate areas are positive, and inter is at most the lesser: the sum is never 0.
        if inter / (areas[j] + area - inter) > threshold:
            return True
    return False
