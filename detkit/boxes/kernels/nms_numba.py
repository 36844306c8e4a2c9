"""The CPU kernel of non-maximum suppression: exact greedy NMS, equal to torchvision.ops.nms bit for bit.

One compiled call does everything: it checks that all numbers are finite, sorts by score, partitions by image and
class, suppresses within each group, and writes the indices that are kept. It takes addresses of torch memory, for
a NumPy view of a tensor costs more than suppressing thirty boxes. Everything is O(N) in memory.

Two ways to suppress a group, chosen by its size (FEW). Either compares each box with those kept before it, sixteen
at a time, by a test without division that passes over most; what it reports is confirmed by torchvision's formula.
- few boxes: with all that are kept;
- many boxes: only with those near. Each kept box lies in the cell of a grid that holds its centre; a box looks
  through its own cell first, and then through all cells within its reach.

The reach. With IoU > t in the plane, the IoU of the two intervals on each axis is above t as well. So of widths a
and b, a < b / t, and the centres are nearer than (a + b) (1 - t) / (2 (1 + t)) where the intervals overlap in part,
nearer than (a - b) / 2 where one holds the other. Both are at most b (1 - t) / (2 t), `reach` times b, and IoU being
symmetrical, b may be the box or the kept one. The centres are also nearer than (a + b) / 2, which helps for small t.

Numba is imported with this module, so only detkit.boxes.nms imports it, when it first suppresses. There, all is
compiled (some ten seconds) or loaded from Numba's cache. All kernels are in this file because the cache does not
notice changes in other files.
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
"""`suppress` found labels and images that span too wide a range to count them; see `suppress`."""

FEW = 500  # measured: with so many boxes both ways take as long
RANK_SORT = 400  # measured: up to here counting the lesser keys is faster than a radix sort
LANES = 16  # boxes compared at once: 512 bits; LLVM splits them where registers are smaller
BLOCK = 5 * LANES  # a block holds lefts, tops, rights, bottoms, and bounds, see `_bound_of_area`
FEW_KEYS = 4000  # measured: up to here four radix passes of 8 bits are faster than three of 11
PER_CELL = 12  # boxes, on average, in a cell of the grid; measured
CELL_OF_REACH = 0.6  # least cell side as a part of the mean area of effect's side; measured
MARGIN = 1e-5  # relative; far above the rounding of the test, far below what would cost many confirmations
SLACK = np.float32(6e-45)  # four times the smallest float32: the relative margin is void on subnormal areas

ZERO = np.float32(0.0)
INFINITY = np.float32(np.inf)
Index = np.uint64  # of an unsigned index LLVM knows that it does not wrap, and makes vector code


def words_needed(count: int) -> int:
    """How many float32 words `suppress` works in.

    For each box 2 for its index in the sorted order, 4 for itself, 1 for its cell, 5 for its place in a block. The
    grid has at most M / 4 + 1 cells for M boxes (see the sides of a cell in `_grid`), and each takes 84 words.
    """
    return (
        2 * padded.py_func(count)
        + padded.py_func(5 * count)
        + LANES
        + 84 * (count // 4 + 2)
        + 81 * (count // LANES + 2)
    )


def _pointer_to(element):  # type: ignore[no-untyped-def]
    """A function for kernels that takes an address for a pointer to `element`."""

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
    """The least multiple of LANES that is not below."""
    return (count + LANES - 1) // LANES * LANES


@inlined
def _aligned(memory):  # type: ignore[no-untyped-def]
    """The memory from its first cache line on: a vector that lies in two lines takes twice as long to load."""
    return memory[-(memory.ctypes.data // 4) % LANES :]


@inlined
def _finite(bits):  # type: ignore[no-untyped-def]
    """Whether no float32 has all bits of its exponent set, as NaN and infinity have."""
    exponent = np.uint32(0x7F800000)
    largest = np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & exponent)
    return largest != exponent


@compiled
def _range(keys):  # type: ignore[no-untyped-def]
    """The least key, and how many integers there are from it to the greatest; negative where that overflows."""
    if len(keys) == 0:
        return np.int64(0), np.int64(1)
    least = greatest = keys[0]
    for i in range(len(keys)):
        least = min(least, keys[i])
        greatest = max(greatest, keys[i])
    return least, greatest - least + 1


@inlined
def _score_keys(scores, score_bits, above_score, keys, indices):  # type: ignore[no-untyped-def]
    """Writes keys that grow as the scores fall, and indices, of the scores above a score; returns how many."""
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
    """Writes `indices` in stable ascending order of `keys`: each goes where the number of lesser keys says.

    All arrays are of one length, a multiple of LANES. `lesser` and `equal` are overwritten.
    """
    lesser[:] = 0
    equal[:] = 0
    keys[count:] = np.uint32(0xFFFFFFFF)  # less than none
    for j in range(0, count, 4):  # four at a time, for each pass reads and writes `lesser`
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
    """`indices` in stable ascending order of `keys`: one of the given arrays, all of which are overwritten."""
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
    """uint32 indices of the scores above a score, the best first, equal ones in the order they come.

    They lie in the first 2 * padded(len(scores)) words of `memory`; another 3 are overwritten.
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
    """Box indices group after group, best first in each; their ranks in `order`; and where each group begins."""
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
    """Whether a box can suppress and be suppressed: otherwise its intersections are 0, or its IoUs are 0 or NaN."""
    area = width * height
    return width > ZERO and area > ZERO and area < INFINITY


@inlined
def _box(boxes, index):  # type: ignore[no-untyped-def]
    first = 4 * Index(index)
    return boxes[first], boxes[first + Index(1)], boxes[first + Index(2)], boxes[first + Index(3)]


@inlined
def _bound_of_area(threshold):  # type: ignore[no-untyped-def]
    """(factor, slack): the bound of a box is factor * area - slack.

    inter / (a + b - inter) > t  <=>  inter > t / (1 + t) * (a + b), which is to be above the sum of two bounds.
    """
    return np.float32(threshold / (1.0 + threshold) * (1.0 - MARGIN)), SLACK if threshold > ZERO else ZERO


@inlined
def _lane(pool, at):  # type: ignore[no-untyped-def]
    return pool[at], pool[at + Index(LANES)], pool[at + Index(2 * LANES)], pool[at + Index(3 * LANES)]


@inlined
def _clear(pool, start):  # type: ignore[no-untyped-def]
    """Makes a block one whose boxes are near to nothing, whatever its tops and bottoms hold."""
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
    """Whether a box of the block may overlap too much; without division or a branch, so that it is one vector each."""
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
    """Whether a box of the block overlaps too much, by torchvision's formula in its order of operations."""
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
    """Compares each box with all that are kept before it.

    Args:
        boxes: (4 N,) float32, all boxes.
        indices: (M,) uint32 of the boxes of one group, the best score first.
        threshold: float32.
        limit: the most that are kept.
        memory: float32 words to work in: 5 * padded(M) for few boxes, for many see `words_needed`.
        kept: (M,) int64, to which the places in `indices` of the kept are written.

    Returns:
        how many are kept.
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
    """Writes the boxes in the order of their indices. A loop that does nothing else waits least for memory."""
    for i in range(len(indices)):
        to, first = 4 * Index(i), 4 * Index(indices[i])
        for k in range(Index(4)):
            gathered[to + k] = boxes[first + k]


@compiled
def _grid(boxes, threshold):  # type: ignore[no-untyped-def]
    """How to divide the centres into cells: columns, rows, the origin, cells per pixel; and what boxes reach.

    Returns:
        (columns, rows, origin_x, origin_y, per_pixel, reach, widest, highest): a box looks for others whose centre
        is nearer than min(reach * its width, (its width + widest) / 2), and likewise down.
    """
    low_x = low_y = math.inf
    high_x = high_y = -math.inf
    count = 0
    width_sum = height_sum = area_sum = widest = highest = 0.0
    ordinary = True  # areas with which the error of a float32 IoU is as small as MARGIN allows
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
    # Under tiny thresholds float32 intersections are so small that their rounding is not: only (a + b) / 2 holds.
    reach = math.inf
    if threshold >= 1e-6:
        reach = ((1.0 - np.float64(threshold)) / (2.0 * np.float64(threshold)) + MARGIN) * (1.0 + MARGIN)
    widest, highest = widest * (1.0 + MARGIN), highest * (1.0 + MARGIN)
    if count == 0 or not ordinary:
        return 1, 1, 0.0, 0.0, 0.0, reach, widest, highest
    # The area, and half the circumference, in which a box suppresses; the mean of all. Cells not much smaller than
    # these bound the number of cells that a box looks through.
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
    """Writes the cell of each box's centre; beforehand, so that the search need not wait for the arithmetic."""
    for i in range(len(homes)):
        left, top, right, bottom = _box(boxes, i)
        x = (0.5 * (np.float64(left) + right) - origin_x) * per_pixel
        y = (0.5 * (np.float64(top) + bottom) - origin_y) * per_pixel
        # A box without area may lie outside the grid. It is kept whatever its cell.
        column, row = min(max(x, 0.0), columns - 1.0), min(max(y, 0.0), rows - 1.0)
        homes[i] = int(row) * columns + int(column)


@inlined
def _cell_hits(pool, heads, following, cell, left, top, right, bottom, bound, threshold):  # type: ignore[no-untyped-def]
    """Whether a kept box of this cell overlaps too much."""
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
    """Compares each box with those kept before it whose centres are in reach. Arguments as for few."""
    count = len(indices)
    gathered, homes = memory[: 4 * count], memory[4 * count : 5 * count].view(np.int32)
    _gather(boxes, indices, gathered)
    boxes = gathered
    columns, rows, origin_x, origin_y, per_pixel, reach, widest, highest = _grid(boxes, threshold)
    _home_cells(boxes, columns, rows, origin_x, origin_y, per_pixel, homes)
    # The kept boxes of a cell: a chain of blocks, the oldest first, for the best scores suppress most.
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
            # Most that go are suppressed from within their own cell.
            if _cell_hits(pool, heads, following, home, left, top, right, bottom, bound, threshold):
                continue
            if cells > 1:
                x = (0.5 * (np.float64(left) + right) - origin_x) * per_pixel
                y = (0.5 * (np.float64(top) + bottom) - origin_y) * per_pixel
                # 1e-6 of a cell is far above the rounding of x and y, which are below 2^28; MARGIN is in the reach.
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
    """The largest float32 not above a float64: a float32 IoU is above the one if it is above the other."""
    rounded = np.float32(threshold)
    return np.nextafter(rounded, -INFINITY) if rounded > threshold else rounded


@cached("int64(int64, int64, float64, int64[::1])")
def suppress_few(boxes_at, scores_at, iou_threshold, result):  # type: ignore[no-untyped-def]
    """`suppress` for up to RANK_SORT boxes of one image and class, all of which take part.

    Of so few boxes it takes a microsecond or two, so that each argument and each array counts, and so does
    releasing the GIL.
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
        iou_threshold: in 0..1; a box goes whose IoU with a kept one is above it.
        above_score: only boxes of a higher score take part.
        limit: the most boxes kept of an image.
        memory: (words_needed(N),) float32 to work in; from call to call the same, for fresh memory costs as much time
            at 100,000 boxes as a third of the work.
        result: (N,) int64, below 2^32 of them, to which the kept indices are written, best score first, ties by index.

    Returns:
        K, how many are kept; NOT_FINITE; or SPARSE_KEYS if (labels' range) x (images' range) is above 4 N + 1024,
        to be called again with dense ones. Then nothing was written.
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
    # Apart, since the product of two wide ranges overflows.
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
