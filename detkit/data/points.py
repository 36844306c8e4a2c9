"""Landmarks in augmentation: removal of points outside the image, and swapping of left and right when mirrored.

Coordinates are those of boxes: x runs from 0 at the left edge of the image to its width at the right edge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from detkit.data.dataset import Dataset
from detkit.errors import ConfigError, DataError
from detkit.structures import Target

Pairs = tuple[tuple[int, int], ...]
FAR = -1e6
"""Pixels; coordinate of points that have left the image, so that later padding does not bring them back."""


@dataclass(frozen=True)
class PointRule:
    """Properties of a data set's points for augmentation.

    Args:
        flip_pairs: pairs of points that are swapped when an image is mirrored, such as left and right eye; None if
            unknown, in which case mirroring is not allowed.
    """

    flip_pairs: Pairs | None


def point_rule(dataset: Dataset) -> PointRule | None:
    """Return the rule of a data set; None without points."""
    return PointRule(dataset.flip_pairs) if "points" in dataset.fields else None


def check_parts(mixes: Sequence[Any], parts: Sequence[Any], rule: PointRule) -> None:
    """Check that augmentations support points.

    Raises:
        ConfigError: naming the augmentation that does not.
    """
    import albumentations as A

    if mixes:
        raise ConfigError(
            "Augmentations that mix images (mosaic, mixup) do not support points, which this head needs. Remove them."
        )
    mirrors = (A.HorizontalFlip, A.VerticalFlip, A.Transpose, A.D4, A.SquareSymmetry)
    for part in single_transforms(parts):
        name = type(part).__name__.lstrip("_")
        if rule.flip_pairs is None and isinstance(part, mirrors) and part.p > 0:
            raise ConfigError(
                f"The augmentation {name} mirrors images, but the data do not say which points are left and right, and "
                f"must be swapped. Remove it, or use data that do (COCO's categories: 'keypoints' with names such as "
                f"left_eye and right_eye; YOLO's data.yaml: flip_idx)."
            )
        moves = isinstance(part, A.DualTransform)
        if moves and type(part).apply_to_keypoints is A.DualTransform.apply_to_keypoints:
            raise ConfigError(f"The augmentation {name} does not support points, which this head needs. Remove it.")


def with_point_removal(parts: Sequence[Any]) -> list[Any]:
    """Insert after each of `parts` a transform that removes the points outside the image."""
    from detkit.data.augment.single_image import DropOutsidePoints

    return [step for part in parts for step in (part, DropOutsidePoints(p=1.0))]


def drop_outside(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Move the points of `as_keypoints` outside an image of (height, width) to FAR; the frame is kept."""
    points = keypoints.copy()
    inner = points[:-3]
    inner[~_inside(inner[:, :2], size), :2] = FAR
    return points


def as_keypoints(target: Target, size: tuple[int, int]) -> np.ndarray:
    """(N * K + 3, 2) float32 for albumentations: all points, and the frame, three corners of the image."""
    assert target.points is not None
    height, width = size
    frame = np.array([[0, 0], [width, 0], [0, height]], dtype=np.float32)
    return np.concatenate([target.points.reshape(-1, 2).numpy(), frame])


def with_points(
    augmented: Target, before: Target, kept: torch.Tensor, keypoints: np.ndarray, size: tuple[int, int], rule: PointRule
) -> Target:
    """Add the points to an augmented target.

    Args:
        augmented: the augmented target without points.
        before: the target before the augmentation.
        kept: (M,) indices of the objects that are kept.
        keypoints: (N * K + 3, 2) the augmented result of `as_keypoints`.
        size: (height, width) of the augmented image.
        rule: the rule of the data set.

    Raises:
        DataError: the image was mirrored, and the rule does not say which points are swapped.
    """
    assert before.points is not None
    assert before.visible is not None
    points = torch.from_numpy(np.asarray(keypoints, dtype=np.float32)[:-3, :2].copy()).reshape(before.points.shape)
    visible = before.visible & torch.from_numpy(_inside(points.numpy(), size))
    if _is_mirrored(keypoints[-3:, :2]):
        if rule.flip_pairs is None:
            raise DataError(
                "An augmentation mirrored an image, but the data do not say which points must be swapped. Remove "
                "mirroring augmentations."
            )
        order = list(range(points.shape[1]))
        for one, other in rule.flip_pairs:
            order[one], order[other] = other, one
        points, visible = points[:, order], visible[:, order]
    return replace(augmented, points=points[kept], visible=visible[kept])


def flip_pairs_of(names: Sequence[str]) -> Pairs | None:
    """Find the pairs among names such as left_eye and right_eye; None if there are none."""
    pairs = []
    for index, name in enumerate(names):
        if "left" in name and (other := name.replace("left", "right")) in names:
            pairs.append((index, list(names).index(other)))
    return tuple(pairs) or None


def _inside(points: np.ndarray, size: tuple[int, int]) -> Any:
    """(...) bool: whether (..., 2) points are inside an image of (height, width)."""
    return ((points >= 0) & (points <= [size[1], size[0]])).all(-1)


def _is_mirrored(frame: np.ndarray) -> bool:
    across, down = frame[1] - frame[0], frame[2] - frame[0]
    return bool(across[0] * down[1] - across[1] * down[0] < 0)


def single_transforms(parts: Sequence[Any]) -> Iterator[Any]:
    """Iterate over the albumentations transforms in `parts`, including those within compositions."""
    from albumentations import BaseCompose

    for part in parts:
        if isinstance(part, BaseCompose):
            yield from single_transforms(part.transforms)
        else:
            yield part
