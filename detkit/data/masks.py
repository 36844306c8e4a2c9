"""Conversion of object masks between polygons, run lengths (RLE) and bool arrays, in COCO's encoding.

It uses faster-coco-eval, so that masks have the same pixels as in COCO's evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

from detkit.data.parsing.json_values import finite, short

Rle = dict[str, Any]
"""COCO's compressed run lengths: {"size": [height, width], "counts": bytes}, in column-major order."""

FURTHEST = 1e6
"""Pixels: polygon coordinates beyond this are errors, not locations outside the image."""
LONGEST_OUTLINE = 100_000
"""Length of a polygon's outline in pixels that is allowed for any image; each pixel takes 80 bytes to draw."""
COMPRESSED = re.compile("(?:[P-o]{0,6}[0-O])+")
"""COCO's text encoding of run lengths: 5 bits per character, the last character of each number below "P"."""


def encode(mask: np.ndarray) -> Rle:
    """Encode one mask as run lengths for JSON.

    Args:
        mask: (H, W) bool.

    Returns:
        {"size": [H, W], "counts": str}, COCO's compressed form.
    """
    height, width = mask.shape
    columns = np.flatnonzero(mask.any(axis=0))
    first, last = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    # Transpose only the columns of the object, which is much faster for small objects.
    pixels = np.concatenate([[False], mask[:, first:last].T.ravel(), [False]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + first * height
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def area(rle: Rle) -> int:
    """Return the number of pixels of the mask."""
    return int(coco_mask.area(rle))


def decode(rles: Sequence[Rle], size: tuple[int, int]) -> np.ndarray:
    """Decode run lengths to masks.

    Args:
        rles: N compressed run lengths of one image.
        size: (height, width) of that image in pixels.

    Returns:
        (N, H, W) bool.
    """
    if not rles:
        return np.zeros((0, *size), dtype=bool)
    height, width = size
    masks = np.zeros((len(rles), height, width), dtype=bool)
    for mask, rle in zip(masks, toUncompressedRLE(list(rles))):
        ends = np.cumsum(rle["counts"])
        ends = ends[: len(ends) // 2 * 2]  # from the first to the last pixel of the object
        if len(ends):
            # As in `encode`, transpose only the columns of the object.
            first, last = ends[0] // height, -(-ends[-1] // height)
            runs = np.diff(ends, prepend=first * height, append=last * height)
            mask[:, first:last] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(-1, height).T
    return masks


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """Return the tight xyxy box (pixels, exclusive right and bottom) of an (H, W) bool mask; None for an empty mask."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def rle_from_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
    """Rasterise the union of polygons to run lengths.

    The pixels are those of pycocotools, unless a polygon exceeds the image by more than the image's longer side: then
    it is clipped first, so that the memory depends on the image and not on the coordinates.

    Args:
        polygons: each x1, y1, x2, y2 ... in pixels, at least three points; parts outside the image are clipped.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: a polygon has fewer than three points, an odd number of coordinates, a coordinate that is not a
            finite number or beyond FURTHEST, or an outline longer than the number of pixels of the image.
    """
    return coco_mask.merge(coco_mask.frPyObjects([_drawable(polygon, size) for polygon in polygons], *size))


def _drawable(polygon: object, size: tuple[int, int]) -> list[float]:
    """Check and clip a polygon so that drawing it takes memory of the order of the image; see `rle_from_polygons`."""
    if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"a polygon must be a list of at least three points as x, y pairs, but one is {short(polygon)}"
        )
    numbers = [finite(value) for value in polygon]
    least, most, longer = min(numbers), max(numbers), max(size)
    if max(-least, most) > FURTHEST:
        furthest = max(numbers, key=abs)
        raise ValueError(f"a polygon has the coordinate {furthest:g}, which is too large for pixels")
    if least < -longer or most > 2 * longer:
        numbers = _cut(numbers, -longer, 2 * longer)
    bound = max(LONGEST_OUTLINE, size[0] * size[1])
    if 1.5 * len(numbers) * longer > bound:  # otherwise shorter, since no side is over three times the image's
        points = np.array(numbers).reshape(-1, 2)
        outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
        if outline > bound:
            raise ValueError(
                f"the outline of a polygon is {outline:.0f} pixels long, longer than the number of pixels of the image"
            )
    return numbers


def _cut(polygon: list[float], low: float, high: float) -> list[float]:
    """Clip a polygon x1, y1, x2, y2 ... to coordinates in low..high (Sutherland and Hodgman 1974).

    A polygon completely outside becomes a point.
    """
    points = list(zip(polygon[0::2], polygon[1::2]))
    for axis, bound, side in ((0, low, 1), (0, high, -1), (1, low, 1), (1, high, -1)):
        kept: list[tuple[float, float]] = []
        for start, end in zip([points[-1], *points], points):
            if side * (start[axis] - bound) < 0 < side * (end[axis] - bound) or (
                side * (end[axis] - bound) < 0 < side * (start[axis] - bound)
            ):
                part = (bound - start[axis]) / (end[axis] - start[axis])
                crossing = start[1 - axis] + part * (end[1 - axis] - start[1 - axis])
                kept.append((bound, crossing) if axis == 0 else (crossing, bound))
            if side * (end[axis] - bound) >= 0:
                kept.append(end)
        points = kept or [(low, low)] * 3
    return [value for point in points for value in point]


def rle_from_coco(segmentation: object, size: tuple[int, int]) -> Rle:
    """Convert a COCO "segmentation" to run lengths: polygons, a list of run lengths, or compressed run lengths.

    Args:
        segmentation: the JSON value.
        size: (height, width) of the image in pixels, which run lengths must have.

    Raises:
        ValueError: it is invalid or does not match the size; the message is only the reason.
    """
    if isinstance(segmentation, list) and segmentation:
        return rle_from_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(
            f"a segmentation must be a list of polygons or {{'size': ..., 'counts': ...}}, not {short(segmentation)}"
        )
    if segmentation["size"] != list(size):
        raise ValueError(f"its run lengths have the size {short(segmentation['size'])}, but the image has {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise ValueError(
                f"its run lengths {short(counts)} must be whole numbers whose sum is the {size[0] * size[1]} pixels "
                f"of the image"
            )
        return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    if not isinstance(counts, str) or not COMPRESSED.fullmatch(counts):
        raise ValueError(f"'counts' must be a list of run lengths or a text of compressed ones, not {short(counts)}")
    rle = {"size": list(size), "counts": counts.encode()}
    try:
        coco_mask.decode(rle)  # fail here instead of during training
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"its compressed run lengths {short(counts)} do not match this size: {error}") from None
    return rle


def polygon_area(polygon: Sequence[float]) -> float:
    """Compute the area of a polygon x1, y1, x2, y2 ... in square units of its coordinates (shoelace formula)."""
    x, y = np.asarray(polygon[0::2], dtype=float), np.asarray(polygon[1::2], dtype=float)
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
