"""Masks of objects: polygons and run lengths (RLE) to bool arrays and back, in COCO's own encoding.

The coding is faster-coco-eval's, so that a mask has the pixels that COCO's evaluation gives it.
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
"""COCO's compressed run lengths: {"size": [height, width], "counts": bytes}, columns first."""

FURTHEST = 1e6
"""Pixels: a coordinate of a polygon beyond is an error, not a place outside the image."""
LONGEST_OUTLINE = 100_000
"""Pixels that the outline of a polygon may have in any image, however small; each takes 80 bytes to draw."""
COMPRESSED = re.compile("(?:[P-o]{0,6}[0-O])+")
"""COCO's text of run lengths: numbers of 5 bits a character, the last of each number below "P"."""


def encode(mask: np.ndarray) -> Rle:
    """Run lengths of one mask, ready for JSON.

    Args:
        mask: (H, W) bool.

    Returns:
        {"size": [H, W], "counts": str}, COCO's compressed form.
    """
    height, width = mask.shape
    columns = np.flatnonzero(mask.any(axis=0))
    first, last = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    # Only the columns of the object are turned, which takes far less time than the whole mask where it is small.
    pixels = np.concatenate([[False], mask[:, first:last].T.ravel(), [False]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + first * height
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def area(rle: Rle) -> int:
    """The number of the object's pixels."""
    return int(coco_mask.area(rle))


def decode(rles: Sequence[Rle], size: tuple[int, int]) -> np.ndarray:
    """Masks of run lengths.

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
        ends = ends[: len(ends) // 2 * 2]  # from the first of the object's pixels on to the last
        if len(ends):
            # As in `encode`: the columns of the object alone are turned.
            first, last = ends[0] // height, -(-ends[-1] // height)
            runs = np.diff(ends, prepend=first * height, append=last * height)
            mask[:, first:last] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(-1, height).T
    return masks


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """The smallest xyxy box (pixels, exclusive right and bottom) around an (H, W) bool mask; None for an empty mask."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def rle_from_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
    """Run lengths of the union of polygons.

    The pixels are those of pycocotools, unless a polygon reaches further beyond the image than the image's longer side:
    then it is cut there first, so that the memory depends on the image and not on the coordinates.

    Args:
        polygons: each x1, y1, x2, y2 ... in pixels, three points at least; parts outside the image are cut off.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: a polygon has fewer than three points, an odd count of numbers, something that is not a finite
            number, a point more than FURTHEST pixels away, or an outline longer than the image has pixels.
    """
    return coco_mask.merge(coco_mask.frPyObjects([_drawable(polygon, size) for polygon in polygons], *size))


def _drawable(polygon: object, size: tuple[int, int]) -> list[float]:
    """A polygon that can be drawn in memory of the order of the image's; the rest as in `rle_from_polygons`."""
    if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"a polygon needs at least three points as x, y pairs, but one is {short(polygon)}, not such a list"
        )
    numbers = [finite(value) for value in polygon]
    least, most, longer = min(numbers), max(numbers), max(size)
    if max(-least, most) > FURTHEST:
        furthest = max(numbers, key=abs)
        raise ValueError(f"a polygon holds {furthest:g}, which is too far away for a coordinate in pixels")
    if least < -longer or most > 2 * longer:
        numbers = _cut(numbers, -longer, 2 * longer)
    bound = max(LONGEST_OUTLINE, size[0] * size[1])
    if 1.5 * len(numbers) * longer > bound:  # no side is longer than three times the image's, so else it is shorter
        points = np.array(numbers).reshape(-1, 2)
        outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
        if outline > bound:
            raise ValueError(f"the outline of a polygon is {outline:.0f} pixels long, more than the image has pixels")
    return numbers


def _cut(polygon: list[float], low: float, high: float) -> list[float]:
    """The part of a polygon x1, y1, x2, y2 ... with all coordinates in low..high (Sutherland and Hodgman 1974).

    A polygon that lies outside wholly becomes a point there.
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
    """Run lengths of a COCO "segmentation": polygons, run lengths as a list, or compressed run lengths.

    Args:
        segmentation: the value as JSON has it.
        size: (height, width) of the image in pixels; run lengths must be of that size.

    Raises:
        ValueError: it is none of these, or does not fit the size; the message is the reason alone.
    """
    if isinstance(segmentation, list) and segmentation:
        return rle_from_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(
            f"a segmentation must be a list of polygons or {{'size': ..., 'counts': ...}}, not {short(segmentation)}"
        )
    if segmentation["size"] != list(size):
        raise ValueError(f"its run lengths are for the size {short(segmentation['size'])}, the image is {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise ValueError(
                f"its run lengths {short(counts)} must be whole numbers that add up to the {size[0] * size[1]} pixels "
                f"of the image"
            )
        return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    if not isinstance(counts, str) or not COMPRESSED.fullmatch(counts):
        raise ValueError(f"'counts' must be a list of run lengths or a text of compressed ones, not {short(counts)}")
    rle = {"size": list(size), "counts": counts.encode()}
    try:
        coco_mask.decode(rle)  # here, and not in the middle of training
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"its compressed run lengths {short(counts)} are not of this size: {error}") from None
    return rle


def polygon_area(polygon: Sequence[float]) -> float:
    """Area of one polygon x1, y1, x2, y2 ... in square units of its coordinates (shoelace formula)."""
    x, y = np.asarray(polygon[0::2], dtype=float), np.asarray(polygon[1::2], dtype=float)
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
