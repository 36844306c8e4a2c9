"""COCO's keypoints: the names of the points in the categories, and x, y, v of each in the annotations."""

from typing import Any

import numpy as np

from detkit.data.dataset import number
from detkit.errors import DataError

OVERSHOOT = 2.0
"""Pixels by which a point may lie outside of its picture: a rounding error."""


def keypoint_names(categories: list[dict[str, Any]], where: str) -> tuple[str, ...]:
    """The names of the points, the same in every category that has points.

    Raises:
        DataError: no category has points, or they differ.
    """
    found = {tuple(str(name) for name in category["keypoints"]) for category in categories if category.get("keypoints")}
    if not found:
        raise DataError(
            f"The head needs points, but no category in '{where}' has 'keypoints', the list of their names. Use a file "
            "with keypoints, such as COCO's person_keypoints_train2017.json (data.annotations)."
        )
    if len(found) > 1:
        raise DataError(
            f"The categories in '{where}' have different 'keypoints' ({len(found)} lists), but all objects must have "
            "the same points. Keep one category."
        )
    return found.pop()


def parse_keypoints(entry: dict[str, Any], count: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """(count, 3) float32 x, y and whether the point is annotated (v above 0), and how many such points lay outside.

    Those are taken as not annotated, and so are all points of an object without keypoints.

    Args:
        entry: the annotation.
        size: (height, width) of the picture.

    Raises:
        ValueError: they are not three finite numbers for each point.
    """
    values = entry.get("keypoints")
    if values is None:
        return np.zeros((count, 3), dtype=np.float32), 0
    if not isinstance(values, list) or len(values) != 3 * count:
        shown = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"'keypoints' must be x, y, v of each of {count} points, {3 * count} numbers, but are {shown}")
    points = np.array([number(value) for value in values], dtype=np.float32).reshape(count, 3)
    if not np.isfinite(points).all():
        raise ValueError("'keypoints' has a number that is not finite")
    annotated = points[:, 2] > 0
    height, width = size
    inside = ((points[:, :2] >= -OVERSHOOT) & (points[:, :2] <= [width + OVERSHOOT, height + OVERSHOOT])).all(1)
    points[:, :2] = points[:, :2].clip(0, [width, height])
    points[:, 2] = annotated & inside
    return points, int((annotated & ~inside).sum())
