"""The CPU kernels of RoI align (He et al. 2017, "Mask R-CNN", section 3), forward and backward.

A cell is the mean over a grid of bilinear samples, and its weights are products of weights along y and along x. So for
each row and each column of cells the places of the map that its samples touch are listed once, each place once, with
the sum of its weights; then the vectors of channels of these places are added up. The map has the channels of a place
side by side (channels_last), so that the sums run over neighbours in memory, which LLVM turns into vector code.

Numba is imported with this module, so only `detkit.boxes.roi_align` imports it, when it is first called.
"""

import math

import numpy as np

from detkit.boxes.kernels.compiling import cached

compiled = cached(nogil=True)
# For sums over channels: a product and a sum may be joined into one rounding. Of coordinates, torchvision rounds both.
contracted = cached(nogil=True, fastmath={"contract"})


@compiled
def pool(maps, rows, scale, sampling, aligned, cells, first, last):  # type: ignore[no-untyped-def]
    """Writes the cells of the regions from `first` to before `last`.

    Args:
        maps: (B, h, w, C) float32, C-contiguous.
        rows: (R, 5) float32, image index and xyxy; the index is in 0..B-1.
        scale: float32, places of the map a pixel.
        sampling: samples on each side of a cell; 0 or less takes as many as the cell has places.
        aligned: shift by half a place.
        cells: (R, size, size, C) float32, C-contiguous.
    """
    size = cells.shape[1]
    for row in range(first, last):
        ys, y_weights, y_counts = _taps(rows[row, 2], rows[row, 4], scale, sampling, aligned, size, maps.shape[1])
        xs, x_weights, x_counts = _taps(rows[row, 1], rows[row, 3], scale, sampling, aligned, size, maps.shape[2])
        image = maps[int(rows[row, 0])]
        for i in range(size):
            for j in range(size):
                cell = cells[row, i, j]
                cell[:] = np.float32(0.0)
                for y in range(y_counts[i]):
                    for x in range(x_counts[j]):
                        _add(cell, image[ys[i, y], xs[j, x]], y_weights[i, y] * x_weights[j, x])


@compiled
def spread(gradient, rows, scale, sampling, aligned, maps, first, last):  # type: ignore[no-untyped-def]
    """Adds the gradient of all cells to that of the maps, for the channels from `first` to before `last`.

    Args:
        gradient: (R, size, size, C) float32, C-contiguous, of the cells.
        maps: (B, h, w, C) float32, C-contiguous, the gradient of the maps.
        rows, scale, sampling, aligned: as in `pool`.
    """
    size = gradient.shape[1]
    for row in range(len(rows)):
        ys, y_weights, y_counts = _taps(rows[row, 2], rows[row, 4], scale, sampling, aligned, size, maps.shape[1])
        xs, x_weights, x_counts = _taps(rows[row, 1], rows[row, 3], scale, sampling, aligned, size, maps.shape[2])
        image = maps[int(rows[row, 0])]
        for i in range(size):
            for j in range(size):
                cell = gradient[row, i, j, first:last]
                for y in range(y_counts[i]):
                    for x in range(x_counts[j]):
                        place = image[ys[i, y], xs[j, x], first:last]
                        _add(place, cell, y_weights[i, y] * x_weights[j, x])


@compiled
def _taps(low, high, scale, sampling, aligned, size, extent):  # type: ignore[no-untyped-def]
    """Along one side of a region: the places that each of `size` cells reads, (size, n), their weights, and how many
    there are of each cell.

    Torchvision's arithmetic in float32: samples more than a place outside the map count as 0, others outside as the
    place at the border.
    """
    half = np.float32(0.5)
    start = low * scale - (half if aligned else np.float32(0.0))
    length = high * scale - (half if aligned else np.float32(0.0)) - start
    if not aligned:
        length = max(length, np.float32(1.0))
    step = length / np.float32(size)
    grid = sampling
    if sampling <= 0:
        grid = math.ceil(step) if 0.0 < step < np.inf else 0
    places = np.empty((size, 2 * grid), dtype=np.int64)
    weights = np.empty((size, 2 * grid), dtype=np.float32)
    counts = np.zeros(size, dtype=np.int64)
    for cell in range(size):
        count = 0
        for sample in range(grid):
            at = start + np.float32(cell) * step + (np.float32(sample) + half) * step / np.float32(grid)
            if not (at >= np.float32(-1.0) and at <= np.float32(extent)):  # NaN is neither
                continue
            at = max(at, np.float32(0.0))
            below = int(at)
            if below >= extent - 1:
                below = extent - 1
                above, part = below, np.float32(0.0)
            else:
                above, part = below + 1, at - np.float32(below)
            share = np.float32(1.0) / np.float32(grid)
            count = _insert(places[cell], weights[cell], count, below, (np.float32(1.0) - part) * share)
            count = _insert(places[cell], weights[cell], count, above, part * share)
        counts[cell] = count
    return places, weights, counts


@compiled
def _insert(places, weights, count, place, weight):  # type: ignore[no-untyped-def]
    """The new count. Samples come in increasing order: a place that is listed already is one of the last two."""
    if count > 0 and places[count - 1] == place:
        weights[count - 1] += weight
        return count
    if count > 1 and places[count - 2] == place:
        weights[count - 2] += weight
        return count
    places[count], weights[count] = place, weight
    return count + 1


@contracted
def _add(total, values, weight):  # type: ignore[no-untyped-def]
    for channel in range(len(total)):
        total[channel] += weight * values[channel]
