"""The CPU kernels for IoU: best overlaps and the IoU matrix, bit-identical to `pairwise_iou`.

This module imports Numba, so it is imported on first use. The first call compiles for some seconds; later processes
load the code from Numba's cache.

Boxes are passed as columns, one array per coordinate and one for the areas, so that consecutive boxes fill a vector
register. Loops that LLVM should vectorise are functions over whole arrays. IoUs are computed by the operations of
`detkit.boxes.iou` in the same order and without fused multiply-add, so that both give the same bits.

IoUs are neither negative nor NaN, so they compare like their bits read as integers. Maxima are taken over these bits,
since a maximum of integers is vectorised and one of floats is not.
"""

import numpy as np

from detkit.boxes.kernels.compiling import cached

# With Numba's default error model division by 0 raises, and loops that can raise are not vectorised.
compiled = cached(nogil=True)


@compiled
def columns(boxes):  # type: ignore[no-untyped-def]
    """Split (N, 4) xyxy, float32 or float64, into five (N,): left, top, right, bottom, and area as `convert.area`."""
    count, dtype = len(boxes), boxes.dtype
    zero = dtype.type(0)
    lefts, tops = np.empty(count, dtype), np.empty(count, dtype)
    rights, bottoms, areas = np.empty(count, dtype), np.empty(count, dtype), np.empty(count, dtype)
    for i in range(count):
        lefts[i], tops[i], rights[i], bottoms[i] = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        width, height = rights[i] - lefts[i], bottoms[i] - tops[i]
        # NaN stays NaN, as in torch's clamp.
        areas[i] = (zero if width < zero else width) * (zero if height < zero else height)
    return lefts, tops, rights, bottoms, areas


@compiled
def pairwise(boxes_a, boxes_b, iou):  # type: ignore[no-untyped-def]
    """Write the IoUs of N boxes with M boxes into `iou`, the (N * M,) flattened matrix.

    Args:
        boxes_a: columns of N boxes.
        boxes_b: columns of M boxes.
        iou: (N * M,) of the same dtype, contiguous.
    """
    lefts, tops, rights, bottoms, areas = boxes_a
    lefts_b, tops_b, rights_b, bottoms_b, areas_b = boxes_b
    count = len(lefts_b)
    for i in range(len(lefts)):
        _iou_row(
            lefts_b, tops_b, rights_b, bottoms_b, areas_b,
            lefts[i], tops[i], rights[i], bottoms[i], areas[i], iou[i * count : (i + 1) * count],
        )  # fmt: skip


@compiled
def best_overlaps(anchors, targets, row, bits):  # type: ignore[no-untyped-def]
    """Compute the largest IoU of each anchor and each ground-truth box, in one pass over tiles of anchors.

    Args:
        anchors: columns of A boxes.
        targets: columns of N boxes.
        row: (T,) scratch of the same dtype; a tile has T anchors.
        bits: `row` viewed as integers of the same width.

    Returns:
        (A,) largest IoU of each anchor and (A,) integers, the first ground-truth box with it; (N,) bits of the largest
        IoU of each ground-truth box, (N,) the first anchor with it, and (N,) the end of the last tile with such an
        anchor. Indices are 0 if all IoUs are 0.
    """
    lefts, tops, rights, bottoms, areas = anchors
    lefts_t, tops_t, rights_t, bottoms_t, areas_t = targets
    count, target_count = len(lefts), len(lefts_t)
    anchor_iou, anchor_target = np.zeros(count, row.dtype), np.zeros(count, bits.dtype)
    target_bits = np.zeros(target_count, bits.dtype)
    target_anchor, target_end = np.zeros(target_count, np.int64), np.zeros(target_count, np.int64)
    for begin in range(0, count, len(row)):
        end = min(begin + len(row), count)
        size = end - begin
        left, top = _smallest(lefts[begin:end]), _smallest(tops[begin:end])
        right, bottom = _largest(rights[begin:end]), _largest(bottoms[begin:end])
        for n in range(target_count):
            if lefts_t[n] >= right or rights_t[n] <= left or tops_t[n] >= bottom or bottoms_t[n] <= top:
                continue  # outside the tile: all IoUs are 0, the initial value
            _iou_row(
                lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], areas[begin:end],
                lefts_t[n], tops_t[n], rights_t[n], bottoms_t[n], areas_t[n], row[:size],
            )  # fmt: skip
            most = _largest_bits(bits[:size])
            if most == 0:
                continue
            _take_better(row[:size], bits.dtype.type(n), anchor_iou[begin:end], anchor_target[begin:end])
            if most > target_bits[n]:
                target_bits[n] = most
                target_anchor[n] = begin + _first_equal(bits, most)
            if most == target_bits[n]:
                target_end[n] = end
    return anchor_iou, anchor_target, target_bits, target_anchor, target_end


@compiled
def attain_best(anchors, targets, target_bits, target_anchor, target_end, row, bits):  # type: ignore[no-untyped-def]
    """(A,) bool, anchors with the largest IoU, above 0, of some target; arguments as for `best_overlaps`."""
    lefts, tops, rights, bottoms, areas = anchors
    lefts_t, tops_t, rights_t, bottoms_t, areas_t = targets
    attains = np.zeros(len(lefts), np.bool_)
    for n in range(len(target_bits)):
        if target_bits[n] == 0:
            continue
        for begin in range(target_anchor[n], target_end[n], len(row)):
            end = min(begin + len(row), target_end[n])
            _iou_row(
                lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], areas[begin:end],
                lefts_t[n], tops_t[n], rights_t[n], bottoms_t[n], areas_t[n], row[: end - begin],
            )  # fmt: skip
            _mark_equal(bits[: end - begin], target_bits[n], attains[begin:end])
    return attains


@compiled
def best_free(anchors, targets, target, free, row, bits):  # type: ignore[no-untyped-def]
    """Return the largest IoU of one ground-truth box with the `free` anchors, (A,) bool, and the first such anchor.

    Returns -1 and 0 if no anchor is free. The other arguments are as for `best_overlaps`.
    """
    lefts, tops, rights, bottoms, areas = anchors
    lefts_t, tops_t, rights_t, bottoms_t, areas_t = targets
    iou, index, record = row.dtype.type(-1), 0, bits.dtype.type(-1)
    for begin in range(0, len(lefts), len(row)):
        end = min(begin + len(row), len(lefts))
        size = end - begin
        _iou_row(
            lefts[begin:end], tops[begin:end], rights[begin:end], bottoms[begin:end], areas[begin:end],
            lefts_t[target], tops_t[target], rights_t[target], bottoms_t[target], areas_t[target], row[:size],
        )  # fmt: skip
        _strike(bits[:size], free[begin:end])
        most = _largest_bits(bits[:size])
        if most > record:
            record = most
            position = _first_equal(bits, most)
            iou, index = row[position], begin + position
    return iou, index


@compiled
def largest_cover(anchors, regions):  # type: ignore[no-untyped-def]
    """(A,) largest fraction of each anchor's area inside one of the regions, as `intersection_over_area`."""
    lefts, tops, rights, bottoms, areas = anchors
    lefts_r, tops_r, rights_r, bottoms_r, _ = regions
    cover = np.zeros(len(lefts), areas.dtype)
    for n in range(len(lefts_r)):
        _raise_cover(lefts, tops, rights, bottoms, areas, lefts_r[n], tops_r[n], rights_r[n], bottoms_r[n], cover)
    return cover


@compiled
def _intersection(left, top, right, bottom, left_b, top_b, right_b, bottom_b, zero):  # type: ignore[no-untyped-def]
    width = (right_b if right_b < right else right) - (left_b if left_b > left else left)
    height = (bottom_b if bottom_b < bottom else bottom) - (top_b if top_b > top else top)
    # <= and not <, so that -0.0 becomes 0.0: IoUs are compared by their bits.
    return (zero if width <= zero else width) * (zero if height <= zero else height)


@compiled
def _iou_row(lefts, tops, rights, bottoms, areas, left, top, right, bottom, area, row):  # type: ignore[no-untyped-def]
    """Write the IoU of one box with each of the others into `row`."""
    zero, one = row.dtype.type(0), row.dtype.type(1)
    for j in range(len(row)):
        inter = _intersection(lefts[j], tops[j], rights[j], bottoms[j], left, top, right, bottom, zero)
        union = area + areas[j] - inter
        positive = union > zero  # false for NaN, from NaN or infinite coordinates
        row[j] = (inter if positive else zero) / (union if positive else one)


@compiled
def _raise_cover(lefts, tops, rights, bottoms, areas, left, top, right, bottom, cover):  # type: ignore[no-untyped-def]
    zero = cover.dtype.type(0)
    for j in range(len(cover)):
        inter = _intersection(lefts[j], tops[j], rights[j], bottoms[j], left, top, right, bottom, zero)
        part = inter / areas[j]  # NaN for a box without area, which compares as false
        cover[j] = part if part > cover[j] else cover[j]


@compiled
def _take_better(row, target, best_iou, best_target):  # type: ignore[no-untyped-def]
    for j in range(len(row)):
        better = row[j] > best_iou[j]
        best_iou[j] = row[j] if better else best_iou[j]
        best_target[j] = target if better else best_target[j]


@compiled
def _strike(bits, free):  # type: ignore[no-untyped-def]
    struck = bits.dtype.type(-1)
    for j in range(len(bits)):
        bits[j] = bits[j] if free[j] else struck


@compiled
def _mark_equal(bits, value, marks):  # type: ignore[no-untyped-def]
    for j in range(len(bits)):
        marks[j] |= bits[j] == value


@compiled
def _largest_bits(bits):  # type: ignore[no-untyped-def]
    most = bits.dtype.type(-1)
    for j in range(len(bits)):
        most = bits[j] if bits[j] > most else most
    return most


@compiled
def _first_equal(bits, value):  # type: ignore[no-untyped-def]
    position = 0
    while bits[position] != value:
        position += 1
    return position


@compiled
def _smallest(values):  # type: ignore[no-untyped-def]
    least = values[0]
    for j in range(len(values)):
        least = values[j] if values[j] < least else least
    return least


@compiled
def _largest(values):  # type: ignore[no-untyped-def]
    most = values[0]
    for j in range(len(values)):
        most = values[j] if values[j] > most else most
    return most
