"""Semantic maps from the masks of objects, with "background" for what no object covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detkit.data.masks import Rle, area, decode
from detkit.errors import DataError
from detkit.structures import IGNORED_PIXEL, ClassList

BACKGROUND = "background"


def with_background(classes: ClassList) -> ClassList:
    """The classes with "background" in front, as label 0, unless one of them has this name already.

    Raises:
        DataError: there are more classes than a map of bytes can tell apart.
    """
    if BACKGROUND not in classes.names:
        # Its raw id must be no other's: 0 where, as in COCO, these count from 1.
        raw_id = min(0, min(classes.raw_ids, default=1) - 1)
        classes = ClassList((BACKGROUND, *classes.names), (raw_id, *classes.raw_ids))
    if len(classes) > IGNORED_PIXEL:
        raise DataError(
            f"A semantic map tells at most {IGNORED_PIXEL} classes apart, background among them, but the data has "
            f"{len(classes)}. Choose some with data.class_names."
        )
    return classes


def names_with_background(names: Sequence[str]) -> tuple[str, ...]:
    """`names` with "background" in front, unless it is one of them."""
    return tuple(names) if BACKGROUND in names else (BACKGROUND, *names)


def painted(
    rles: Sequence[Rle], labels: Sequence[int], crowd: Sequence[bool], size: tuple[int, int], background: int
) -> np.ndarray:
    """(H, W) uint8: the class of each pixel, the smaller objects painted over the larger ones.

    Crowd regions become IGNORED_PIXEL, below all objects: an object in a crowd that has a mask of its own counts.

    Args:
        rles: run lengths of N objects of one image.
        labels, crowd: of each.
        size: (height, width) of that image in pixels.
        background: the class of the pixels of no object.
    """
    semantic = np.full(size, background, dtype=np.uint8)
    order = sorted(range(len(rles)), key=lambda index: (not crowd[index], -area(rles[index])))
    for index in order:
        # One at a time: the masks of a hundred objects of a large image would fill the memory.
        semantic[decode([rles[index]], size)[0]] = IGNORED_PIXEL if crowd[index] else labels[index]
    return semantic
