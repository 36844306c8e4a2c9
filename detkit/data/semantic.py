"""Semantic maps from object masks, with "background" for the remaining pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detkit.data.masks import Rle, area, decode
from detkit.errors import DataError
from detkit.structures import IGNORED_PIXEL, ClassList

BACKGROUND = "background"


def with_background(classes: ClassList) -> ClassList:
    """Add "background" as label 0, unless one of the classes has this name.

    Raises:
        DataError: there are more classes than a uint8 map can represent.
    """
    if BACKGROUND not in classes.names:
        # A raw id that no other class has: 0 if they count from 1, as in COCO.
        raw_id = min(0, min(classes.raw_ids, default=1) - 1)
        classes = ClassList((BACKGROUND, *classes.names), (raw_id, *classes.raw_ids))
    if len(classes) > IGNORED_PIXEL:
        raise DataError(
            f"A semantic map supports at most {IGNORED_PIXEL} classes, including background, but the data has "
            f"{len(classes)}. Choose some by data.class_names."
        )
    return classes


def names_with_background(names: Sequence[str]) -> tuple[str, ...]:
    """Add "background" as the first name, unless it is one of them."""
    return tuple(names) if BACKGROUND in names else (BACKGROUND, *names)


def painted(
    rles: Sequence[Rle], labels: Sequence[int], crowd: Sequence[bool], size: tuple[int, int], background: int
) -> np.ndarray:
    """(H, W) uint8: the class of each pixel, with smaller objects drawn over larger ones.

    Crowd regions become IGNORED_PIXEL, below all objects, so that objects with their own mask in a crowd are kept.

    Args:
        rles: run lengths of N objects of one image.
        labels, crowd: label and crowd flag of each object.
        size: (height, width) of the image in pixels.
        background: the class of pixels without an object.
    """
    semantic = np.full(size, background, dtype=np.uint8)
    order = sorted(range(len(rles)), key=lambda index: (not crowd[index], -area(rles[index])))
    for index in order:
        # One at a time: the masks of a hundred objects in a large image would need too much memory.
        semantic[decode([rles[index]], size)[0]] = IGNORED_PIXEL if crowd[index] else labels[index]
    return semantic
