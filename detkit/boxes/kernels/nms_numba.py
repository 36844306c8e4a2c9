"""The CPU kernel of non-maximum suppression: exact greedy NMS, bit-identical to torchvision.ops.nms.

A single compiled call checks that all numbers are finite, sorts by score, partitions by image and class, suppresses
within each group, and writes the kept indices. It takes addresses of torch memory, since creating a NumPy view of a
tensor costs more than suppressing thirty boxes. Memory is O(N).

A group is suppressed in one of two ways, chosen by its size (FEW). Both compare each box with boxes kept before it,
sixteen at a time, by a test without division that rules out most; the rest is confirmed by torchvision's formula.
- few boxes: with all kept boxes;
- many boxes: only with nearby ones. Each kept box is stored in the grid cell of its centre; a box is compared with its
  own cell first, then with all cells within its reach.

The reach: if IoU > t in the plane, the IoU of the two intervals on each axis is above t as well. So for widths a and b,
a < b / t, and the distance of the centres is below (a + b) (1 - t) / (2 (1 + t)) if the intervals overlap partially,
and below (a - b) / 2 if one contains the other. Both are at most b (1 - t) / (2 t), that is `reach` times b, and since
IoU is symmetric, b may be the box or the kept one. The distance is also below (a + b) / 2, which helps for small t.

This module imports Numba, so detkit.boxes.nms imports it on first use. It is then compiled (about ten seconds) or
loaded from Numba's cache. All kernels are in this file because the cache does not notice changes in other files.
"""

import math

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from detkit.boxes.kernels.compiling import cached, compiled, inlined

NOT_FINITE = -1
"""`suppress` found NaN or infinity."""
NO_MEMORY = -3
"""`suppress_few` was given address 0: a tensor without values."""
SPARSE_KEYS = -2
"""`suppress` found labels and images whose ranges are too wide for counting; see `suppress`."""

FEW = 500  # measured: number of boxes for which both ways take the same time
RANK_SORT = 400  # measured: up to this count, counting lesser keys is faster than a radix sort
LANES = 16  # boxes compared at once: 512 bits; LLVM splits them for smaller registers
BLOCK = 5 * LANES  # a block holds lefts, tops, rights, bottoms, and bounds; see `_bound_of_area`
FEW_KEYS = 4000  # measured: up to this count, four radix passes of 8 bits are faster than three of 11
PER_CELL = 12  # mean number of boxes per grid cell; measured
CELL_OF_REACH = 0.6  # minimum cell side as a fraction of the side of the mean area of effect; measured
MARGIN = 1e-5  # relative; far above the rounding error of the test, small enough to avoid most confirmations
SLACK = np.float32(6e-45)  # four times the smallest float32: a relative margin has no effect on subnormal areas

ZERO = np.float32(0.0)
INFINITY = np.float32(np.inf)
Index = np.uint64  # LLVM knows that unsigned indices do not wrap, and vectorises


def words_needed(count: int) -> int:
    """Return the number of float32 words of working memory that `suppress` needs.

    Per box 2 for its index in the sorted order, 4 for its coordinates, 1 for its cell and 5 for its lane in a block.
    The grid has at most M / 4 + 1 cells for M boxes (see the sides of a cell in `_grid`), of 84 words each.
    """
    return (
        2 * padded.py_func(count)
        + padded.py_func(5 * count)
        + LANES
        + 84 * (count // 4 + 2)
        + 81 * (count // LANES + 2)
    )


def _pointer_to(element):  # type: ignore[no-untyped-def]
    """Return a function for kernels that converts an address to a pointer to `element`."""

    @intrinsic
    def pointer(context, address):  # type: ignore[no-untyped-def]
        def generate(target, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return types.CPointer(element)(address), generate

    return pointer


_float32_at = _pointer_to(types.float32)
_uint32_at = _pointer_to(types.uint32)
_int64_at = _pointer_to(types.int64)


@inlined
def padded(count):  # type: ignore[no-untyped-def]
    """Round up to a multiple of LANES."""
    return (count + LANES - 1) // LANES * LANES


@inlined
def _aligned(memory):  # type: ignore[no-untyped-def]
    """Align the memory to a cache line: loading a vector that spans two lines takes twice as long."""
    return memory[-(memory.ctypes.data // 4) % LANES :]


@inlined
def _finite(bits):  # type: ignore[no-untyped-def]
    """Return whether no float32 has all exponent bits set, as NaN and infinity have."""
    exponent = np.uint32(0x7F800000)
    largest = np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & exponent)
    return largest != exponent


@compiled
def _range(keys):  # type: ignore[no-untyped-def]
    """Return the smallest key and the number of integers up to the largest; negative on overflow."""
    if len(keys) == 0:
        return np.int64(0), np.int64(1)
    least = greatest = keys[0]
    for i in range(len(keys)):
        least = min(least, keys[i])
        greatest = max(greatest, keys[i])
    return least, greatest - least + 1


@inlined
def _score_keys(scores, score_bits, above_score, keys, indices):  # type: ignore[no-untyped-def]
    """Write keys in descending order of score, and indices, of the scores above a threshold; return their number."""
    count = 0
    for i in range(len(scores)):
        key = score_bits[i]
        if key == np.uint32(0x80000000):
            key = np.uint32(0)  # -0.0 equals 0.0
        keys[count] = key if key >> np.uint32(31) else key ^ np.uint32(0x7FFFFFFF)
        indices[count] = i
        count += scores[i] > above_score
    return count


@inlined
def _rank_sort(keys, indices, count, lesser, equal, order):  # type: ignore[no-untyped-def]
    """Write `indices` in stable ascending order of `keys`, to the positions given by the number of lesser keys.

    All arrays have the same length, a multiple of LANES. `lesser` and `equal` are overwritten.
    """
    lesser[:] = 0
    equal[:] = 0
    keys[count:] = np.uint32(0xFFFFFFFF)  # the largest key
    for j in range(0, count, 4):  # four at a time, since each pass reads and writes `lesser`
        first, second, third, fourth = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        for i in range(len(keys)):
            key = keys[i]
            lesser[i] += (
                np.uint32(first < key) + np.uint32(second < key) + np.uint32(third < key) + np.uint32(fourth < key)
            )
    for i in range(count):
        rank = lesser[i]
        order[rank + equal[rank]] = indices[i]
        equal[rank] += np.uint32(1)


@compiled
def _radix_sort(keys, indices, other_keys, other_indices):  # type: ignore[no-untyped-def]
    """Return `indices` in stable ascending order of `keys`, in one of the given arrays; all are overwritten."""
    bits = 8 if len(keys) <= FEW_KEYS else 11
    digits = 1 << bits
    mask = np.uint32(digits - 1)
    passes = (31 + bits) // bits
    starts = np.zeros(passes * digits, dtype=np.uint32)
    for i in range(len(keys)):
        for level in range(passes):
            starts[level * digits + ((keys[i] >> np.uint32(bits * level)) & mask)] += np.uint32(1)
    for level in range(passes):
        start = starts[level * digits : (level + 1) * digits]
        total = np.uint32(0)
        for digit in range(digits):
            total, start[digit] = total + start[digit], total
        shift = np.uint32(bits * level)
        for i in range(len(keys)):
            key = keys[i]
            digit = (key >> shift) & mask
            place = start[digit]
            start[digit] = place + np.uint32(1)
            other_keys[place] = key
            other_indices[place] = indices[i]
        keys, other_keys = other_keys, keys
        indices, other_indices = other_indices, indices
    return indices


@compiled
def _sort(scores, score_bits, above_score, memory):  # type: ignore[no-untyped-def]
    """Return uint32 indices of the scores above a threshold, by descending score, ties by index.

    They are in the first 2 * padded(len(scores)) words of `memory`; the next 3 * padded(len(scores)) are overwritten.
    """
    size = padded(len(scores))
    words = memory.view(np.uint32)
    indices, other_indices, keys = words[:size], words[size : 2 * size], words[2 * size : 3 * size]
    other_keys, equal = words[3 * size : 4 * size], words[4 * size : 5 * size]
    count = _score_keys(scores, score_bits, above_score, keys, indices)
    if len(scores) > RANK_SORT:
        return _radix_sort(keys[:count], indices[:count], other_keys[:count], other_indices[:count])
    _rank_sort(keys, indices, count, other_keys, equal, other_indices)
    return other_indices[:count]


@compiled
def _partition(order, labels, first_label, label_range, images, first_image, image_range):  # type: ignore[no-untyped-def]
    """Return box indices by group, best first in each; their ranks in `order`; and the start of each group."""
    groups = np.zeros(len(order), dtype=np.uint32)
    starts = np.zeros(label_range * image_range + 1, dtype=np.int64)
    for rank in range(len(order)):
        group = 0
        if len(images):
            group = (images[order[rank]] - first_image) * label_range
        if len(labels):
            group += labels[order[rank]] - first_label
        groups[rank] = group
        starts[group + 1] += 1
    for group in range(len(starts) - 1):
        starts[group + 1] += starts[group]
    following = starts[:-1].copy()
    indices = np.empty(len(order), dtype=np.uint32)
    ranks = np.empty(len(order), dtype=np.uint32)
    for rank in range(len(order)):
        place = following[groups[rank]]
        following[groups[rank]] = place + 1
        indices[place] = order[rank]
        ranks[place] = rank
    return indices, ranks, starts


@inlined
def _has_area(width, height):  # type: ignore[no-untyped-def]
    """Return whether a box can suppress and be suppressed; otherwise its intersections are 0, or its IoUs 0 or NaN."""
    area = width * height
    return width > ZERO and area > ZERO and area < INFINITY


@inlined
def _box(boxes, index):  # type: ignore[no-untyped-def]
    first = 4 * Index(index)
    return boxes[first], boxes[first + Index(1)], boxes[first + Index(2)], boxes[first + Index(3)]


@inlined
def _bound_of_area(threshold):  # type: ignore[no-untyped-def]
    """Return (factor, slack): the bound of a box is factor * area - slack.

    inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b), which is at least the sum of the two bounds.
    """
    return np.float32(threshold / (1.0 + threshold) * (1.0 - MARGIN)), SLACK if threshold > ZERO else ZERO


@inlined
def _lane(pool, at):  # type: ignore[no-untyped-def]
    return pool[at], pool[at + Index(LANES)], pool[at + Index(2 * LANES)], pool[at + Index(3 * LANES)]


@inlined
def _clear(pool, start):  # type: ignore[no-untyped-def]
    """Initialise a block with boxes that overlap nothing, whatever their tops and bottoms are."""
    pool[start : start + LANES] = INFINITY
    pool[start + 2 * LANES : start + 3 * LANES] = -INFINITY
    pool[start + 4 * LANES : start + 5 * LANES] = INFINITY


@inlined
def _put(pool, place, left, top, right, bottom, bound):  # type: ignore[no-untyped-def]
    pool[place] = left
    pool[place + LANES] = top
    pool[place + 2 * LANES] = right
    pool[place + 3 * LANES] = bottom
    pool[place + 4 * LANES] = bound


@inlined
def _any_near(pool, start, left, top, right, bottom, bound):  # type: ignore[no-untyped-def]
    """Return whether a box of the block may overlap too much; without divisions and branches, to be vectorised."""
    near = False
    at = Index(start)
    for j in range(Index(LANES)):
        left_j, top_j, right_j, bottom_j = _lane(pool, at + j)
        width = (right_j if right_j < right else right) - (left_j if left_j > left else left)
        height = (bottom_j if bottom_j < bottom else bottom) - (top_j if top_j > top else top)
        inter = (width if width > ZERO else ZERO) * height
        near |= inter - pool[at + j + Index(4 * LANES)] > bound
    return near


@inlined
def _any_hit(pool, start, left, top, right, bottom, threshold):  # type: ignore[no-untyped-def]
    """Return whether a box of the block overlaps too much, by torchvision's formula in its order of operations."""
    hit = np.bool_(False)
    at = Index(start)
    area = (right - left) * (bottom - top)
    for j in range(Index(LANES)):
        left_j, top_j, right_j, bottom_j = _lane(pool, at + j)
        width = (right_j if right_j < right else right) - (left_j if left_j > left else left)
        height = (bottom_j if bottom_j < bottom else bottom) - (top_j if top_j > top else top)
        inter = (width if width > ZERO else ZERO) * (height if height > ZERO else ZERO)
        iou = inter / ((right_j - left_j) * (bottom_j - top_j) + area - inter)
        hit |= iou > threshold
    return hit


@inlined
def _suppress_few(boxes, indices, threshold, limit, memory, kept):  # type: ignore[no-untyped-def]
    """Compare each box with all boxes kept before it.

    Args:
        boxes: (4 N,) float32, all boxes.
        indices: (M,) uint32 of the boxes of one group, by descending score.
        threshold: float32.
        limit: maximum number of kept boxes.
        memory: float32 words of working memory: 5 * padded(M) for few boxes, for many see `words_needed`.
        kept: (M,) int64, output: the positions in `indices` of the kept boxes.

    Returns:
        the number of kept boxes.
    """
    factor, slack = _bound_of_area(threshold)
    stored = count = 0
    for i in range(len(indices)):
        if count >= limit:
            break
        left, top, right, bottom = _box(boxes, indices[i])
        width, height = right - left, bottom - top
        if _has_area(width, height):
            bound = factor * (width * height) - slack
            hit = False
            for start in range(0, padded(stored) * 5, BLOCK):
                hit = _any_near(memory, start, left, top, right, bottom, bound) and _any_hit(
                    memory, start, left, top, right, bottom, threshold
                )
                if hit:
                    break
            if hit:
                continue
            if stored % LANES == 0:
                _clear(memory, stored // LANES * BLOCK)
            _put(memory, stored // LANES * BLOCK + stored % LANES, left, top, right, bottom, bound)
            stored += 1
        kept[count] = i
        count += 1
    return count


@compiled
def _gather(boxes, indices, gathered):  # type: ignore[no-untyped-def]
    """Write the boxes in the order of their indices; a separate loop hides memory latency best."""
    for i in range(len(indices)):
        to, first = 4 * Index(i), 4 * Index(indices[i])
        for k in range(Index(4)):
            gathered[to + k] = boxes[first + k]


@compiled
def _grid(boxes, threshold):  # type: ignore[no-untyped-def]
    """Choose the grid of cells for the centres: columns, rows, origin, cells per pixel; and the reach of boxes.

    Returns:
        (columns, rows, origin_x, origin_y, per_pixel, reach, widest, highest): a box is compared with boxes whose
        centre is nearer than min(reach * its width, (its width + widest) / 2), and likewise vertically.
    """
    low_x = low_y = math.inf
    high_x = high_y = -math.inf
    count = 0
    width_sum = height_sum = area_sum = widest = highest = 0.0
    ordinary = True  # areas for which MARGIN covers the error of a float32 IoU
    for i in range(len(boxes) // 4):
        left, top, right, bottom = _box(boxes, i)
        if _has_area(right - left, bottom - top):
            width, height = np.float64(right - left), np.float64(bottom - top)
            ordinary = ordinary and bool(1e-30 < width * height < 1e30)
            x, y = 0.5 * (np.float64(left) + right), 0.5 * (np.float64(top) + bottom)
            low_x, high_x, low_y, high_y = min(low_x, x), max(high_x, x), min(low_y, y), max(high_y, y)
            width_sum += width
            height_sum += height
            area_sum += width * height
            widest, highest = max(widest, width), max(highest, height)
            count += 1
    # For tiny thresholds rounding errors of the small float32 intersections matter: only (a + b) / 2 holds.
    reach = math.inf
    if threshold >= 1e-6:
        reach = ((1.0 - np.float64(threshold)) / (2.0 * np.float64(threshold)) + MARGIN) * (1.0 + MARGIN)
    widest, highest = widest * (1.0 + MARGIN), highest * (1.0 + MARGIN)
    if count == 0 or not ordinary:
        return 1, 1, 0.0, 0.0, 0.0, reach, widest, highest
    # Sums of the area and half the perimeter within which the boxes suppress. Cells not much smaller than the means of
    # these bound the number of cells that a box is compared with.
    area = min(
        4.0 * reach**2 * area_sum, area_sum + width_sum * highest + height_sum * widest + count * widest * highest
    )
    sides = min(2.0 * reach * (width_sum + height_sum), width_sum + height_sum + count * (widest + highest))
    across, down = high_x - low_x, high_y - low_y
    side = max(
        math.sqrt(across * down * PER_CELL / count),
        max(across, down) * PER_CELL / count,
        CELL_OF_REACH * math.sqrt(area / count),
        CELL_OF_REACH * sides / count / 4.0,
    )
    if side == 0.0:
        return 1, 1, 0.0, 0.0, 0.0, reach, widest, highest
    return int(across / side) + 1, int(down / side) + 1, low_x, low_y, 1.0 / side, reach, widest, highest


@compiled
def _home_cells(boxes, columns, rows, origin_x, origin_y, per_pixel, homes):  # type: ignore[no-untyped-def]
    """Write the cell of each box's centre, in advance, so that the search does not wait for the arithmetic."""
    for i in range(len(homes)):
        left, top, right, bottom = _box(boxes, i)
        x = (0.5 * (np.float64(left) + right) - origin_x) * per_pixel
        y = (0.5 * (np.float64(top) + bottom) - origin_y) * per_pixel
        # A box without area may lie outside the grid; it is kept regardless of its cell.
        column, row = min(max(x, 0.0), columns - 1.0), min(max(y, 0.0), rows - 1.0)
        homes[i] = int(row) * columns + int(column)


@inlined
def _cell_hits(pool, heads, following, cell, left, top, right, bottom, bound, threshold):  # type: ignore[no-untyped-def]
    """Return whether a kept box of this cell overlaps too much."""
    block = heads[cell]
    while block >= 0:
        if _any_near(pool, block * BLOCK, left, top, right, bottom, bound) and _any_hit(
            pool, block * BLOCK, left, top, right, bottom, threshold
        ):
            return True
        block = following[block]
    return False


@compiled
def _suppress_many(boxes, indices, threshold, limit, memory, kept):  # type: ignore[no-untyped-def]
    """Compare each box with boxes kept before it whose centres are within reach. Arguments as `_suppress_few`."""
    count = len(indices)
    gathered, homes = memory[: 4 * count], memory[4 * count : 5 * count].view(np.int32)
    _gather(boxes, indices, gathered)
    boxes = gathered
    columns, rows, origin_x, origin_y, per_pixel, reach, widest, highest = _grid(boxes, threshold)
    _home_cells(boxes, columns, rows, origin_x, origin_y, per_pixel, homes)
    # The kept boxes of a cell are a chain of blocks, oldest first, since the best scores suppress most.
    cells = columns * rows
    blocks = count // LANES + cells + 1
    free = padded(5 * count)
    pool = memory[free : free + blocks * BLOCK]
    numbers = memory[free + len(pool) :].view(np.int32)
    heads, tails, filled = numbers[:cells], numbers[cells : 2 * cells], numbers[2 * cells : 3 * cells]
    following = numbers[3 * cells : 3 * cells + blocks]
    heads[:] = -1
    tails[:] = -1
    filled[:] = LANES  # lanes in use of the last block
    following[:] = -1
    used = 0
    factor, slack = _bound_of_area(threshold)
    count = 0
    for i in range(len(indices)):
        if count >= limit:
            break
        left, top, right, bottom = _box(boxes, i)
        width, height = right - left, bottom - top
        home = homes[i]
        if _has_area(width, height):
            bound = factor * (width * height) - slack
            # Most suppressed boxes are suppressed from within their own cell.
            if _cell_hits(pool, heads, following, home, left, top, right, bottom, bound, threshold):
                continue
            if cells > 1:
                x = (0.5 * (np.float64(left) + right) - origin_x) * per_pixel
                y = (0.5 * (np.float64(top) + bottom) - origin_y) * per_pixel
                # 1e-6 of a cell is far above the rounding of x and y, which are below 2^28; reach includes MARGIN.
                reach_x = min(reach * width, 0.5 * (width + widest)) * per_pixel + 1e-6
                reach_y = min(reach * height, 0.5 * (height + highest)) * per_pixel + 1e-6
                first_column, last_column = int(max(x - reach_x, 0.0)), int(min(x + reach_x, columns - 1.0))
                first_row, last_row = int(max(y - reach_y, 0.0)), int(min(y + reach_y, rows - 1.0))
                hit = False
                for row in range(first_row, last_row + 1):
                    for cell in range(row * columns + first_column, row * columns + last_column + 1):
                        hit = cell != home and _cell_hits(
                            pool, heads, following, cell, left, top, right, bottom, bound, threshold
                        )
                        if hit:
                            break
                    if hit:
                        break
                if hit:
                    continue
            if filled[home] == LANES:
                if heads[home] < 0:
                    heads[home] = used
                else:
                    following[tails[home]] = used
                tails[home] = used
                filled[home] = 0
                _clear(pool, used * BLOCK)
                used += 1
            _put(pool, tails[home] * BLOCK + filled[home], left, top, right, bottom, bound)
            filled[home] += 1
        kept[count] = i
        count += 1
    return count


@compiled
def _suppress_group(boxes, indices, threshold, limit, memory, kept):  # type: ignore[no-untyped-def]
    if len(indices) <= FEW:
        return _suppress_few(boxes, indices, threshold, limit, memory, kept)
    return _suppress_many(boxes, indices, threshold, limit, memory, kept)


@inlined
def _float32_not_above(threshold):  # type: ignore[no-untyped-def]
    """Return the largest float32 not above a float64: the same float32 IoUs are above either."""
    rounded = np.float32(threshold)
    return np.nextafter(rounded, -INFINITY) if rounded > threshold else rounded


@cached("int64(int64, int64, float64, int64[::1])")
def suppress_few(boxes_at, scores_at, iou_threshold, result):  # type: ignore[no-untyped-def]
    """`suppress` for up to RANK_SORT boxes of one image and class without a score threshold.

    For so few boxes it takes a microsecond or two, so every argument and array matters, and the GIL is not released.
    """
    count = len(result)
    if count and (boxes_at == 0 or scores_at == 0):
        return NO_MEMORY
    boxes = carray(_float32_at(boxes_at), 4 * count)
    scores = carray(_float32_at(scores_at), count)
    score_bits = carray(_uint32_at(scores_at), count)
    if not (_finite(carray(_uint32_at(boxes_at), 4 * count)) and _finite(score_bits)):
        return NOT_FINITE
    size = padded(count)
    memory = _aligned(np.empty(10 * size + LANES, dtype=np.float32))
    order = _sort(scores, score_bits, -np.inf, memory)
    threshold = _float32_not_above(iou_threshold)
    kept = _suppress_few(boxes, order, threshold, count, memory[5 * size :], result)
    for i in range(kept):
        result[i] = order[result[i]]
    return kept


@cached("int64(int64, int64, int64, int64, float64, float64, int64, float32[::1], int64[::1])", nogil=True)
def suppress(boxes_at, scores_at, labels_at, images_at, iou_threshold, above_score, limit, memory, result):  # type: ignore[no-untyped-def]
    """Greedy NMS of N boxes within each image and class.

    Args:
        boxes_at: address of (N, 4) float32 xyxy.
        scores_at: address of (N,) float32.
        labels_at: address of (N,) int64, or 0 for one class.
        images_at: address of (N,) int64, or 0 for one image.
        iou_threshold: in 0..1; boxes whose IoU with a kept box is above it are removed.
        above_score: boxes with a score of at most this value are discarded.
        limit: maximum number of kept boxes per image.
        memory: (words_needed(N),) float32 of working memory; reused between calls, since for 100,000 boxes fresh memory
            costs a third of the total time.
        result: (N,) int64 with N < 2^32, output: the kept indices, by descending score, ties by index.

    Returns:
        K, the number of kept boxes; NOT_FINITE; or SPARSE_KEYS if (range of labels) x (range of images) is above
        4 N + 1024, to be called again with dense keys. In the last two cases nothing is written.
    """
    count = len(result)
    boxes = carray(_float32_at(boxes_at), 4 * count)
    scores = carray(_float32_at(scores_at), count)
    score_bits = carray(_uint32_at(scores_at), count)
    labels = carray(_int64_at(labels_at), count if labels_at else 0)
    images = carray(_int64_at(images_at), count if images_at else 0)
    if not (_finite(carray(_uint32_at(boxes_at), 4 * count)) and _finite(score_bits)):
        return NOT_FINITE

    first_label, label_range = _range(labels)
    first_image, image_range = _range(images)
    # Checked separately, since the product of two wide ranges overflows.
    bound = 4 * count + 1024
    if not (0 < label_range <= bound and 0 < image_range <= bound and label_range * image_range <= bound):
        return SPARSE_KEYS

    memory = _aligned(memory)
    order = _sort(scores, score_bits, above_score, memory)
    candidates = len(order)
    free = memory[2 * padded(count) :]
    threshold = _float32_not_above(iou_threshold)
    if label_range * image_range == 1:
        kept = _suppress_group(boxes, order, threshold, limit, free, result)
        for i in range(kept):
            result[i] = order[result[i]]
        return kept

    indices, ranks, starts = _partition(order, labels, first_label, label_range, images, first_image, image_range)
    keep = np.zeros(candidates, dtype=np.bool_)
    for group in range(len(starts) - 1):
        begin = starts[group]
        if starts[group + 1] == begin:
            continue
        kept = _suppress_group(boxes, indices[begin : starts[group + 1]], threshold, limit, free, result)
        for i in range(kept):
            keep[ranks[begin + result[i]]] = True
    seen = np.zeros(image_range, dtype=np.int64)
    kept = 0
    for rank in range(candidates):
        if keep[rank]:
            image = images[order[rank]] - first_image if len(images) else 0
            if seen[image] < limit:
                seen[image] += 1
                result[kept] = order[rank]
                kept += 1
    return kept
