"""Hierarchical grouping of regions (Uijlings et al., IJCV 2013, section 3) on the CPU.

Of all pairs of neighbouring regions the two most similar become one, until the image is one region. What is kept of
a region is its number of pixels, its box, and its histograms, which simply add up.

Similarities are integers, in ONE to 1, so that their sums do not depend on the order of the additions, and equal ones
are equal on every machine; of these the pair of the lowest regions comes first. Similarity and pair lie in one 64-bit
key, and the keys in a heap. A merge adds keys for the new region's neighbours; keys of regions that are gone stay until
they are on top, or until the heap is full, when all are swept out: it never holds more than twice the first number of
neighbours. The lists of neighbours are chained, not rewritten: a member that is gone stands for what it became part of.
"""

import numpy as np

from detkit.boxes.kernels.compiling import cached, compiled, inlined

COLOUR_BINS = 25
TEXTURE_BINS = 10
HALVES = 2 * TEXTURE_BINS  # an orientation and its opposite: of each pixel's derivative one of both is 0
AXES = 4

ONE = 1 << 20
REGION_BITS = 21  # of a key, for each region; the similarity has the other 22
MAX_REGIONS = 1 << (REGION_BITS - 1)
"""So many initial regions can be grouped: twice as many get a number."""

LAST_REGION = np.uint64((1 << REGION_BITS) - 1)
HIGHEST = np.int64((1 << (64 - 2 * REGION_BITS)) - 1)


@compiled
def _texture_row(above, row, below, scale, axes):  # type: ignore[no-untyped-def]
    """Writes the bin of each pixel of a row, (AXES, W), from rows of the smoothed plane; beyond edges pixels repeat."""
    width = len(row)
    diagonal = np.float32(np.sqrt(0.5))
    for x in range(width):
        dx = row[min(x + 1, width - 1)] - row[max(x - 1, 0)]
        dy = below[x] - above[x]
        axes[0, x] = _half_bin(dx, scale)
        axes[1, x] = _half_bin(dy, scale)
        axes[2, x] = _half_bin((dx + dy) * diagonal, scale)
        axes[3, x] = _half_bin((dx - dy) * diagonal, scale)


@inlined
def _half_bin(value, scale):  # type: ignore[no-untyped-def]
    size = min(np.int32(abs(value) * scale), np.int32(TEXTURE_BINS - 1))
    return np.uint8(size + (TEXTURE_BINS if value < np.float32(0.0) else 0))


@cached("uint8[:, ::1](uint8[:, :, ::1], float32[:, :, ::1], float64)", nogil=True)
def feature_bins(colours, planes, texture_scale):  # type: ignore[no-untyped-def]
    """The bin of each pixel in each histogram.

    Args:
        colours: (C, H, W) uint8.
        planes: (C, H, W) float32, the same smoothed; their central differences are derivatives of a Gaussian.
        texture_scale: bins to a difference of one grey level between the pixels on both sides.

    Returns:
        (5 C, H * W) uint8: of each channel the bin of its colour, 0..24; then of each channel and axis (x, y, and the
        two diagonals) that of its derivative: 0..9 upwards, 10..19 downwards.
    """
    channels, height, width = planes.shape
    bins = np.empty(((1 + AXES) * channels, height, width), dtype=np.uint8)
    for channel in range(channels):
        plane, first = planes[channel], channels + AXES * channel
        for y in range(height):
            for x in range(width):
                bins[channel, y, x] = (np.uint32(colours[channel, y, x]) * np.uint32(COLOUR_BINS)) >> np.uint32(8)
            _texture_row(
                plane[max(y - 1, 0)],
                plane[y],
                plane[min(y + 1, height - 1)],
                np.float32(texture_scale),
                bins[first : first + AXES, y],
            )
    return bins.reshape(((1 + AXES) * channels, height * width))


@compiled
def _describe(labels, bins, sizes, boxes, counts):  # type: ignore[no-untyped-def]
    """Counts pixels, writes boxes xyxy and histograms of the initial regions; all come filled with 0."""
    height, width = labels.shape
    features = len(bins)
    channels = features // (1 + AXES)
    offsets = np.empty(features, dtype=np.int64)
    for feature in range(features):
        colours = min(feature, channels)
        offsets[feature] = COLOUR_BINS * colours + HALVES * (feature - colours)
    for y in range(height):
        end = 0
        while end < width:
            start, region = end, labels[y, end]
            while end < width and labels[y, end] == region:
                end += 1
            box = boxes[region]
            if sizes[region] == 0:
                box[0], box[1] = start, y
            box[0], box[2], box[3] = min(box[0], start), max(box[2], end), y + 1
            sizes[region] += end - start
            for feature in range(features):
                histogram = counts[region, offsets[feature] :]
                for place in bins[feature, y * width + start : y * width + end]:
                    histogram[place] += 1
    for region in range(len(sizes)):
        for start in range(COLOUR_BINS * channels, counts.shape[1], TEXTURE_BINS):
            # A pixel whose derivative is counted in the opposite half has 0 in this one.
            rest = sizes[region]
            for i in range(start + 1, start + TEXTURE_BINS):
                rest -= counts[region, i]
            counts[region, start] = rest


@compiled
def _neighbours(labels, count):  # type: ignore[no-untyped-def]
    """(E, 2) pairs of regions that share an edge of pixels, each once, the lower region first."""
    height, width = labels.shape
    seen = np.empty((2 * height * width, 2), dtype=np.int32)  # only what is written takes memory
    filled = 0
    for y in range(height):
        filled = _note(labels[y, :-1], labels[y, 1:], seen, filled)
        if y + 1 < height:
            filled = _note(labels[y], labels[y + 1], seen, filled)
    starts = np.zeros(count + 1, dtype=np.int64)
    for index in range(filled):
        starts[seen[index, 0] + 1] += 1
    for region in range(count):
        starts[region + 1] += starts[region]
    others = np.empty(filled, dtype=np.int32)
    following = starts[:count].copy()
    for index in range(filled):
        region = seen[index, 0]
        others[following[region]] = seen[index, 1]
        following[region] += 1
    marks = np.full(count, -1, dtype=np.int32)  # the last lower region that each was found beside
    found = 0
    for region in range(count):
        for other in others[starts[region] : starts[region + 1]]:
            if marks[other] != region:
                marks[other] = region
                seen[found, 0], seen[found, 1] = region, other
                found += 1
    return seen[:found].copy()


@inlined
def _note(labels, others, seen, filled):  # type: ignore[no-untyped-def]
    """Writes pairs of different labels at the same place, but not one like the last; how many pairs there are."""
    low = high = np.int32(-1)
    for i in range(len(labels)):
        if labels[i] != others[i]:
            a, b = min(labels[i], others[i]), max(labels[i], others[i])
            if a != low or b != high:
                low, high = a, b
                seen[filled, 0], seen[filled, 1] = a, b
                filled += 1
    return filled


@compiled
def _intersection(first, second, first_scale, second_scale):  # type: ignore[no-untyped-def]
    """The common part of two histograms that the scales bring to a sum of ONE."""
    total = np.int32(0)
    for i in range(len(first)):
        total += np.int32(min(np.float32(first[i]) * first_scale, np.float32(second[i]) * second_scale))
    return total


@compiled
def _key(a, b, pixels, sizes, boxes, counts, colour_bins, use):  # type: ignore[no-untyped-def]
    """The priority of the pair (a, b): the more similar, the higher; ties go to the lower regions."""
    size = np.int64(sizes[a]) + np.int64(sizes[b])
    total = np.int64(0)
    channels = colour_bins // COLOUR_BINS
    scale_a, scale_b = ONE / np.float64(sizes[a]) / channels, ONE / np.float64(sizes[b]) / channels
    if use[0]:
        total += _intersection(
            counts[a, :colour_bins], counts[b, :colour_bins], np.float32(scale_a), np.float32(scale_b)
        )
    if use[1]:
        halves = 2 * AXES
        total += _intersection(
            counts[a, colour_bins:], counts[b, colour_bins:], np.float32(scale_a / halves), np.float32(scale_b / halves)
        )
    if use[2]:
        total += (pixels - size) * ONE // pixels
    if use[3]:
        width = max(boxes[a, 2], boxes[b, 2]) - min(boxes[a, 0], boxes[b, 0])
        height = max(boxes[a, 3], boxes[b, 3]) - min(boxes[a, 1], boxes[b, 1])
        total += (pixels - np.int64(width) * np.int64(height) + size) * ONE // pixels
    total = min(total, HIGHEST)
    low, high = np.uint64(min(a, b)), np.uint64(max(a, b))
    bits = np.uint64(REGION_BITS)
    return (np.uint64(total) << (bits + bits)) | ((LAST_REGION - low) << bits) | (LAST_REGION - high)


@inlined
def _pair(key):  # type: ignore[no-untyped-def]
    bits = np.uint64(REGION_BITS)
    return np.int64(LAST_REGION - ((key >> bits) & LAST_REGION)), np.int64(LAST_REGION - (key & LAST_REGION))


@inlined
def _sift_up(heap, place):  # type: ignore[no-untyped-def]
    key = heap[place]
    while place > 0:
        parent = (place - 1) >> 1
        if heap[parent] >= key:
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = key


@inlined
def _sift_down(heap, count, place):  # type: ignore[no-untyped-def]
    key = heap[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= key:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = key


@compiled
def _sweep(heap, count, into):  # type: ignore[no-untyped-def]
    """Drops the keys of regions that are gone, and makes the rest a heap; how many these are."""
    left = 0
    for place in range(count):
        a, b = _pair(heap[place])
        if into[a] == a and into[b] == b:
            heap[left] = heap[place]
            left += 1
    for place in range(left // 2 - 1, -1, -1):
        _sift_down(heap, left, place)
    return left


@inlined
def _find(into, region):  # type: ignore[no-untyped-def]
    while into[region] != region:
        into[region] = into[into[region]]
        region = into[region]
    return region


@compiled
def _chain(pairs, regions):  # type: ignore[no-untyped-def]
    """Lists of neighbours: heads and tails of each region, and the members with their successors."""
    heads = np.full(regions, -1, dtype=np.int32)
    tails = np.full(regions, -1, dtype=np.int32)
    members = np.empty(2 * len(pairs), dtype=np.int32)
    following = np.full(2 * len(pairs), -1, dtype=np.int32)
    for index in range(len(pairs)):
        for side in range(2):
            link, region = 2 * index + side, pairs[index, side]
            members[link] = pairs[index, 1 - side]
            if heads[region] < 0:
                heads[region] = link
            else:
                following[tails[region]] = link
            tails[region] = link
    return heads, tails, members, following


@compiled
def _merge(a, b, c, sizes, boxes, counts, heads, tails, following, into):  # type: ignore[no-untyped-def]
    """Makes c of a and b."""
    into[a] = into[b] = into[c] = c
    sizes[c] = sizes[a] + sizes[b]
    for side in range(2):
        boxes[c, side] = min(boxes[a, side], boxes[b, side])
        boxes[c, side + 2] = max(boxes[a, side + 2], boxes[b, side + 2])
    row, first, second = counts[c], counts[a], counts[b]
    for i in range(len(row)):
        row[i] = first[i] + second[i]
    following[tails[a]] = heads[b]
    heads[c], tails[c] = heads[a], tails[b]


@compiled
def _group(pairs, count, pixels, sizes, boxes, counts, colour_bins, use):  # type: ignore[no-untyped-def]
    """Merges all initial regions into one; region count + i comes from the i-th merge, its parts go to `merges`."""
    heads, tails, members, following = _chain(pairs, 2 * count - 1)
    into = np.arange(2 * count - 1).astype(np.int32)
    stamps = np.full(2 * count - 1, -1, dtype=np.int32)
    merges = np.empty((count - 1, 2), dtype=np.int32)
    heap = np.empty(2 * len(pairs) + 1, dtype=np.uint64)
    filled = 0
    for index in range(len(pairs)):
        a, b = pairs[index]
        heap[filled] = _key(a, b, pixels, sizes, boxes, counts, colour_bins, use)
        filled += 1
    filled = _sweep(heap, filled, into)
    c = count
    while filled:
        a, b = _pair(heap[0])
        filled -= 1
        heap[0] = heap[filled]
        _sift_down(heap, filled, 0)
        if into[a] != a or into[b] != b:
            continue
        merges[c - count, 0], merges[c - count, 1] = a, b
        _merge(a, b, c, sizes, boxes, counts, heads, tails, following, into)
        before, link = -1, heads[c]
        while link >= 0:
            other = _find(into, members[link])
            if other == c or stamps[other] == c:  # within, or twice: out of the list
                if before < 0:
                    heads[c] = following[link]
                else:
                    following[before] = following[link]
            else:
                stamps[other] = c
                members[link] = other
                before = link
                if filled == len(heap):
                    filled = _sweep(heap, filled, into)
                heap[filled] = _key(c, other, pixels, sizes, boxes, counts, colour_bins, use)
                _sift_up(heap, filled)
                filled += 1
            link = following[link]
        tails[c] = before
        c += 1
    return merges


@cached("Tuple((int32[:, :, ::1], int32[:, :, ::1]))(int32[:, ::1], int64, uint8[:, ::1], boolean[:, ::1])", nogil=True)
def group(labels, count, bins, strategies):  # type: ignore[no-untyped-def]
    """The hierarchies of regions.

    Args:
        labels: (H, W) int32 in 0..N-1, every region connected; from `segment`.
        count: N, at least 1, at most MAX_REGIONS.
        bins: (5 C, H * W) uint8 from `feature_bins`.
        strategies: (S, 4) bool: whether similarity has a part of colour, texture, size, fill.

    Returns:
        (S, 2 N - 1, 4) int32 boxes xyxy: of the initial regions, then of each that arises, the whole image last;
        (S, N - 1, 2) int32 the two regions of which each arises.
    """
    channels = len(bins) // (1 + AXES)
    colour_bins = COLOUR_BINS * channels
    regions = 2 * count - 1
    sizes = np.zeros(regions, dtype=np.int32)
    boxes = np.zeros((regions, 4), dtype=np.int32)
    counts = np.zeros((regions, colour_bins + HALVES * AXES * channels), dtype=np.int32)
    _describe(labels, bins, sizes[:count], boxes[:count], counts[:count])
    pairs = _neighbours(labels, count)
    found = np.empty((len(strategies), regions, 4), dtype=np.int32)
    merges = np.empty((len(strategies), count - 1, 2), dtype=np.int32)
    for index in range(len(strategies)):
        merges[index] = _group(pairs, count, labels.size, sizes, boxes, counts, colour_bins, strategies[index])
        found[index] = boxes
    return found, merges
