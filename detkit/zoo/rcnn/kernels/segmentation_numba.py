"""Graph-based over-segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) on the CPU.

Pixels are the nodes of a graph, and each has an edge to its eight neighbours, whose weight is the distance of the two
colours. Edges are taken in the order of their weights; two regions become one if the edge between them is no heavier
than the heaviest inside either, plus k / (pixels of that region). Then regions below a least size join the neighbour
with the lightest edge.

Weights are integers, in STEPS to a grey level: they are sorted by counting, for all k at once; and since equal weights
are common, and stay in the order of the image, the passes over the edges run through memory mostly forwards. All
comparisons are exact.
"""

import math

import numpy as np

from detkit.boxes.kernels.compiling import cached, compiled, inlined

STEPS = 16
"""The integers that a weight of one grey level is; fractions below are rounded."""

LEVELS = int(STEPS * 255 * math.sqrt(3)) + 2
"""Weights of up to three channels in 0..255 are below this."""

NO_EDGE = np.uint16(65535)

MAX_PIXELS = 1 << 30
"""Edges are numbered with 32 bits, four to a pixel."""


@compiled
def _row_weights(planes, row, column, other_row, other_column, squares, weights):  # type: ignore[no-untyped-def]
    """Weights between len(weights) pixels of a row, from a column on, and as many of another or the same row."""
    squares[:] = np.float32(0.0)
    count = len(weights)
    for channel in range(planes.shape[0]):
        near = planes[channel, row, column : column + count]
        far = planes[channel, other_row, other_column : other_column + count]
        for i in range(count):
            difference = near[i] - far[i]
            squares[i] += difference * difference
    for i in range(count):
        weights[i] = np.uint16(np.sqrt(squares[i]) * np.float32(STEPS) + np.float32(0.5))


@cached("Tuple((uint32[::1], int64[::1]))(float32[:, :, ::1])", nogil=True)
def sorted_edges(planes):  # type: ignore[no-untyped-def]
    """All edges of an image, the lightest first, and of one weight in the order of the image.

    Args:
        planes: (C, H, W) float32 in 0..255, of one to three channels and at most MAX_PIXELS.

    Returns:
        (E,) uint32, 4 p + d for the edge from pixel p to its neighbour on the right (d = 0), below (1), below on the
        right (2) or below on the left (3); and (LEVELS + 1,) int64: where the edges of each weight begin.
    """
    _, height, width = planes.shape
    weights = np.full((4, height, width), NO_EDGE, dtype=np.uint16)
    squares = np.empty(width, dtype=np.float32)
    for row in range(height):
        _row_weights(planes, row, 0, row, 1, squares[: width - 1], weights[0, row, : width - 1])
        if row + 1 < height:
            _row_weights(planes, row, 0, row + 1, 0, squares, weights[1, row])
            _row_weights(planes, row, 0, row + 1, 1, squares[: width - 1], weights[2, row, : width - 1])
            _row_weights(planes, row, 1, row + 1, 0, squares[: width - 1], weights[3, row, 1:])
    flat = weights.reshape((4, height * width))
    starts = np.zeros(LEVELS + 1, dtype=np.int64)
    for direction in range(4):
        for weight in flat[direction]:
            if weight != NO_EDGE:
                starts[weight + 1] += 1
    for level in range(LEVELS):
        starts[level + 1] += starts[level]
    following = starts[:LEVELS].copy()
    edges = np.empty(starts[LEVELS], dtype=np.uint32)
    for pixel in range(height * width):
        for direction in range(4):
            weight = flat[direction, pixel]
            if weight != NO_EDGE:
                edges[following[weight]] = np.uint32(4 * pixel + direction)
                following[weight] += 1
    return edges, starts


@inlined
def _find(nodes, node):  # type: ignore[no-untyped-def]
    """The root of a node; the path to it is halved."""
    above = nodes[node]
    if above < 0:
        return node
    higher = nodes[above]
    while higher >= 0:
        nodes[node] = higher
        node = higher
        above = nodes[node]
        if above < 0:
            return node
        higher = nodes[above]
    return above


@inlined
def _join(nodes, sizes, a, b, weight, tolerance):  # type: ignore[no-untyped-def]
    """Makes one region of two roots by an edge of a weight: the root of the larger, or the first, stays."""
    if sizes[a] < sizes[b]:
        a, b = b, a
    nodes[b] = a
    sizes[a] += sizes[b]
    nodes[a] = _bound(weight + tolerance // sizes[a])


@inlined
def _bound(weight):  # type: ignore[no-untyped-def]
    """The value of a root in `nodes`: below 0, and the lower the heavier the edges by which it still grows."""
    return np.int32(-1) - np.int32(weight)


@compiled
def _numbered(nodes, height, width):  # type: ignore[no-untyped-def]
    """The number of each pixel's root, in the order of the pixels, and how many there are."""
    labels = np.empty(height * width, dtype=np.int32)
    numbers = np.full(height * width, -1, dtype=np.int32)
    count = 0
    for pixel in range(height * width):
        root = _find(nodes, np.int32(pixel))
        if numbers[root] < 0:
            numbers[root] = count
            count += 1
        labels[pixel] = numbers[root]
    return labels.reshape((height, width)), count


@cached("Tuple((int32[:, ::1], int64))(uint32[::1], int64[::1], int64, int64, int64, int64)", nogil=True)
def segment(edges, starts, height, width, tolerance, min_size):  # type: ignore[no-untyped-def]
    """The regions of an image.

    Args:
        edges: from `sorted_edges`.
        starts: likewise.
        height: of the image in pixels.
        width: likewise.
        tolerance: k in STEPS to a grey level, below 2^30.
        min_size: pixels of the smallest region, where the image has as many.

    Returns:
        (H, W) int32 region of each pixel, numbered 0..N-1 in the order of their first pixels; and N.
    """
    steps = np.array([1, width, width + 1, width - 1], dtype=np.int32)
    tolerance = np.int32(tolerance)
    # A node above this one, or of a root its bound: one look finds both.
    nodes = np.full(height * width, _bound(tolerance), dtype=np.int32)
    sizes = np.ones(height * width, dtype=np.int32)  # of roots
    between = np.empty(len(edges), dtype=np.uint32)
    left = 0
    for weight in range(len(starts) - 1):
        bound = _bound(weight)
        for edge in edges[starts[weight] : starts[weight + 1]]:
            pixel = np.int32(edge >> np.uint32(2))
            a, b = _find(nodes, pixel), _find(nodes, pixel + steps[edge & np.uint32(3)])
            if a == b:
                continue
            if nodes[a] <= bound and nodes[b] <= bound:
                _join(nodes, sizes, a, b, weight, tolerance)
            elif sizes[a] < min_size or sizes[b] < min_size:
                between[left] = edge
                left += 1
    for edge in between[:left]:
        pixel = np.int32(edge >> np.uint32(2))
        a, b = _find(nodes, pixel), _find(nodes, pixel + steps[edge & np.uint32(3)])
        if a != b and (sizes[a] < min_size or sizes[b] < min_size):
            _join(nodes, sizes, a, b, 0, tolerance)
    return _numbered(nodes, height, width)
