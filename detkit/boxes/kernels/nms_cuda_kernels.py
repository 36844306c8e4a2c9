"""The GPU kernels of non-maximum suppression for numba-cuda, launched by detkit.boxes.kernels.nms_cuda.

This module imports Numba, so it is imported on first use. All kernels read candidates sorted by group (image and
class) and by descending score within each group; the index in this order is called the position, the index within the
group the rank. Candidates are processed in rounds of ROUND ranks:

1. `fill` writes for each candidate of the round which later candidates of its round and group it would suppress.
2. `resolve` goes through these masks by descending score, one thread block per group.
3. `spread` lets the kept candidates of the round suppress those of later rounds.

IoU is torchvision's formula, inter / (area_i + area_j - inter) in float32, each operation rounded to nearest.
"""

import operator

import numpy as np
from numba import config, cuda

ROUND = 4096  # ranks per round; their diagonal masks fill 32 of the 48 KiB of a block's shared memory
WORD = 64  # candidates per mask word
WORDS = ROUND // WORD
SLICE = 512  # candidates that one thread of `spread` compares with; ROUND is a multiple of it
THREADS = 128  # per block of `fill` and `spread`
RESOLVE_THREADS = 512  # per block of `resolve`; a multiple of WORDS
RESOLVE_BLOCKS = 1024  # each handles several groups if there are more
LEAST_BLOCKS = 128  # per launch, since Numba warns about fewer; surplus blocks return immediately

simulated: bool = bool(config.ENABLE_CUDASIM)

# The compiler may contract a * b + c, here the product `inter` in the sum of the areas, into one fused operation. It
# must not contract intrinsics, and their division is correctly rounded.
if simulated:  # the simulator has no intrinsics; NumPy's float32 rounds after each operation
    multiply, divide = operator.mul, operator.truediv
else:
    from numba.cuda import libdevice

    multiply, divide = libdevice.fmul_rn, libdevice.fdiv_rn


@cuda.jit(device=True)
def overlaps(boxes, areas, other, left, top, right, bottom, area, threshold):  # type: ignore[no-untyped-def]
    """Return whether the IoU of a box of positive area with that at position `other` is above the threshold."""
    zero = np.float32(0.0)
    width = min(right, boxes[other, 2]) - max(left, boxes[other, 0])
    height = min(bottom, boxes[other, 3]) - max(top, boxes[other, 1])
    if not (width > zero and height > zero and areas[other] > zero):
        return False
    inter = multiply(width, height)
    return divide(inter, area + areas[other] - inter) > threshold


@cuda.jit
def fill(boxes, areas, groups, starts, ends, keep, masks, first_rank, threshold):  # type: ignore[no-untyped-def]
    """Write one mask word per thread: which of WORD candidates of the round a position would suppress.

    Words before the position's own, and words beyond the group, are not written.

    Args:
        boxes: (N, 4) float32 xyxy.
        areas: (N,) float32; 0 for boxes that suppress nothing and are not suppressed.
        groups: (N,) int64, the group of each position.
        starts: (N + 1,) int64, start of each group; N beyond the last group.
        ends: (N,) int64, end of the candidates of each group that take part.
        keep: (N,) uint8, 0 for candidates that are suppressed or do not take part.
        masks: (N, words) uint64, output.
        first_rank: first rank of the round, which ends before first_rank + ROUND.
        threshold: float32.
    """
    position = first_rank + cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if position >= keep.shape[0] or keep[position] == 0:
        return
    begin = starts[groups[position]] + first_rank
    end = min(ends[groups[position]], begin + ROUND)
    first = begin + cuda.blockIdx.y * WORD
    last = min(first + WORD, end)
    if position < begin or position >= end or first >= end or last <= position:
        return
    bits = np.uint64(0)
    area = areas[position]
    if area > np.float32(0.0):
        left, top, right, bottom = boxes[position, 0], boxes[position, 1], boxes[position, 2], boxes[position, 3]
        for other in range(max(first, position + 1), last):
            if overlaps(boxes, areas, other, left, top, right, bottom, area, threshold):
                # An int64 beside a uint64 would make both float64.
                bits |= np.uint64(1) << np.uint64(other - first)
    masks[position, cuda.blockIdx.y] = bits


@cuda.jit
def resolve(starts, ends, keep, masks, first_rank):  # type: ignore[no-untyped-def]
    """Clear `keep` of candidates suppressed within the round, one group per block at a time. Arguments as in `fill`.

    All threads of a block reach the same `syncthreads` calls.
    """
    diagonals = cuda.shared.array(ROUND, np.uint64)  # for each rank, the mask word that contains its own bit
    removed = cuda.shared.array(WORDS, np.uint64)
    count = keep.shape[0]
    for group in range(cuda.blockIdx.x, count, cuda.gridDim.x):
        if starts[group] == count:
            break
        begin = starts[group] + first_rank
        size = min(ends[group] - begin, ROUND)
        if size <= 0:
            continue
        load_round(keep, masks, begin, size, diagonals, removed)
        cuda.syncthreads()
        tiles = (size + WORD - 1) // WORD
        for tile in range(tiles):
            if cuda.threadIdx.x == 0:
                settle_tile(diagonals, removed, tile, min(WORD, size - tile * WORD))
            cuda.syncthreads()
            remove_by_tile(masks, begin, tile, tiles, removed)
            cuda.syncthreads()
        for rank in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            if (removed[rank // WORD] >> np.uint64(rank % WORD)) & np.uint64(1):
                keep[begin + rank] = 0
        cuda.syncthreads()  # before the next group overwrites the shared memory


@cuda.jit(device=True)
def load_round(keep, masks, begin, size, diagonals, removed):  # type: ignore[no-untyped-def]
    """Load the diagonal words of the remaining candidates, and the bits of those suppressed by earlier rounds."""
    for tile in range(cuda.threadIdx.x, WORDS, cuda.blockDim.x):
        removed[tile] = np.uint64(0)
    cuda.syncthreads()
    for rank in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        if keep[begin + rank] != 0:
            diagonals[rank] = masks[begin + rank, rank // WORD]
        else:
            cuda.atomic.or_(removed, rank // WORD, np.uint64(1) << np.uint64(rank % WORD))


@cuda.jit(device=True)
def settle_tile(diagonals, removed, tile, size):  # type: ignore[no-untyped-def]
    """Run the greedy loop over the candidates of one word, in one thread."""
    gone = removed[tile]
    for bit in range(size):
        if (gone >> np.uint64(bit)) & np.uint64(1) == np.uint64(0):
            gone |= diagonals[tile * WORD + bit]
    removed[tile] = gone


@cuda.jit(device=True)
def remove_by_tile(masks, begin, tile, tiles, removed):  # type: ignore[no-untyped-def]
    """Suppress candidates of later tiles by the kept ones of a tile; each thread handles some rows of one word."""
    word = cuda.threadIdx.x % WORDS
    if word <= tile or word >= tiles:
        return
    gone = removed[tile]
    bits = np.uint64(0)
    # Tiles before the last are full.
    for row in range(cuda.threadIdx.x // WORDS, WORD, cuda.blockDim.x // WORDS):
        if (gone >> np.uint64(row)) & np.uint64(1) == np.uint64(0):
            bits |= masks[begin + tile * WORD + row, word]
    if bits != np.uint64(0):
        cuda.atomic.or_(removed, word, bits)


@cuda.jit
def spread(boxes, areas, groups, starts, keep, first_rank, threshold):  # type: ignore[no-untyped-def]
    """Clear `keep` of a candidate beyond the round if one of SLICE ranks of the round overlaps it, per thread.

    Arguments as in `fill`. Several threads may write the same value to one candidate.
    """
    position = first_rank + ROUND + cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if position >= keep.shape[0] or keep[position] == 0:
        return
    begin = starts[groups[position]] + first_rank
    area = areas[position]
    if position < begin + ROUND or not area > np.float32(0.0):
        return
    left, top, right, bottom = boxes[position, 0], boxes[position, 1], boxes[position, 2], boxes[position, 3]
    first = begin + cuda.blockIdx.y * SLICE
    for other in range(first, first + SLICE):  # all in the same group, since a later position is
        if keep[other] != 0 and overlaps(boxes, areas, other, left, top, right, bottom, area, threshold):
            keep[position] = 0
            return
