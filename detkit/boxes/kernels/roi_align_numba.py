"""The CPU kernels of RoIAlign (He et al. 2017, "Mask R-CNN", section 3), forward and backward.

A cell is the mean over a grid of bilinear samples, whose weights are products of weights along y and x. So for each row
and each column of cells, the map locations that its samples read are listed once with the sum of their weights; then
the channel vectors at these locations are added. The map is channels_last, so that the sums run over contiguous memory
and are vectorised.

This module imports Numba, so `detkit.boxes.roi_align` imports it on first use.
"""

import math

import numpy as np

from detkit.boxes.kernels.compiling import cached

compiled = cached(nogil=True)
# Fused multiply-add is allowed in sums over channels, but not for coordinates, where torchvision rounds both.
contracted = cached(nogil=True, fastmath={"contract"})


@compiled
def pool(maps, rows, scale, sampling, aligned, cells, first, last):  # type: ignore[no-untyped-def]
    """Write the cells of the regions `first` to `last` (exclusive).

    Args:
        maps: (B, h, w, C) float32, C-contiguous.
        rows: (R, 5) float32, image index and xyxy; the index is in 0..B-1.
        scale: float32, map locations per pixel.
        sampling: samples per side of a cell; at most 0 for one per map location in the cell.
        aligned: shift by half a location.
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
    """Add the gradient of all cells to that of the maps, for the channels `first` to `last` (exclusive).

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
                        location = image[ys[i, y], xs[j, x], first:last]
                        _add(location, cell, y_weights[i, y] * x_weights[j, x])


@compiled
def _taps(low, high, scale, sampling, aligned, size, extent):  # type: ignore[no-untyped-def]
    """Compute along one side of a region the locations that each of `size` cells reads, (size, n), their weights, and
    their number for each cell.

    In torchvision's float32 arithmetic: samples more than one location outside the map are 0, other outside samples
    are clamped to the border.
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
    """Add a weight to a location and return the new count.

    Samples come in increasing order, so a location that is already listed is one of the last two.
    """
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
