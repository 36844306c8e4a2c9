"""Parsing of COCO keypoints: their names in the categories, and x, y, v in the annotations."""

from typing import Any

import numpy as np

from detkit.data.parsing.json_values import finite_list, short
from detkit.errors import DataError

OVERSHOOT = 2.0
"""Pixels by which a point may be outside its image due to rounding."""


def keypoint_names(categories: list[dict[str, Any]], where: str) -> tuple[str, ...]:
    """Return the names of the points, which all categories with points share.

    Raises:
        DataError: no category has points, or they differ, or are not a list of text.
    """
    lists = [category["keypoints"] for category in categories if category.get("keypoints")]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"'keypoints' of a category in '{where}' must be a list of names, but is {short(names)}.")
    found = set(map(tuple, lists))
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
    """Parse (count, 3) float32 x, y and whether the point is annotated (v above 0); also count annotated points
    outside.

    Points outside the image, and all points of an object without keypoints, are treated as not annotated.

    Args:
        entry: the annotation.
        size: (height, width) of the image.

    Raises:
        ValueError: the entry does not have three finite numbers for each point.
    """
    values = entry.get("keypoints")
    if values is None:
        return np.zeros((count, 3), dtype=np.float32), 0
    form = f"'keypoints' must be x, y, v of each of {count} points, {3 * count} numbers"
    points = np.array(finite_list(values, 3 * count, form)).reshape(count, 3)
    return inside_image(points, size)


def inside_image(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Clip (K, 3) float32 points to the image; points far outside become not annotated and are counted.

    Args:
        points: (K, 3) x and y in pixels, and whether the point is annotated (above 0); finite.
        size: (height, width) of the image.
    """
    annotated = points[:, 2] > 0
    height, width = size
    inside = ((points[:, :2] >= -OVERSHOOT) & (points[:, :2] <= [width + OVERSHOOT, height + OVERSHOOT])).all(1)
    points = points.copy()
    points[:, :2] = points[:, :2].clip(0, [width, height])
    points[:, 2] = annotated & inside
    return points.astype(np.float32), int((annotated & ~inside).sum())
