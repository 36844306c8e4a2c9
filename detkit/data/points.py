"""Landmarks through augmentation: which stay in the image, and which change places when it is mirrored.

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
"""Pixels; where a point is put that has left the image, so that no later padding takes it in again."""


@dataclass(frozen=True)
class PointRule:
    """What augmentation must know of a data set's points.

    Args:
        flip_pairs: the points that change places when an image is mirrored, left eye and right eye; None where that is
            not known, and then nothing may be mirrored.
    """

    flip_pairs: Pairs | None


def point_rule(dataset: Dataset) -> PointRule | None:
    """The rule for a data set; None for one without points."""
    return PointRule(dataset.flip_pairs) if "points" in dataset.fields else None


def check_parts(mixes: Sequence[Any], parts: Sequence[Any], rule: PointRule) -> None:
    """Refuse augmentations that cannot carry points, or would make them wrong.

    Raises:
        ConfigError: naming the augmentation.
    """
    import albumentations as A

    if mixes:
        raise ConfigError(
            "Augmentations that mix images (mosaic, mixup) cannot carry points, which this head needs. Leave them out."
        )
    mirrors = (A.HorizontalFlip, A.VerticalFlip, A.Transpose, A.D4, A.SquareSymmetry)
    for part in single_transforms(parts):
        name = type(part).__name__.lstrip("_")
        if rule.flip_pairs is None and isinstance(part, mirrors) and part.p > 0:
            raise ConfigError(
                f"The augmentation {name} mirrors images, but the data do not say which points are left and right "
                f"ones, and would change places. Leave it out, or use data that do (COCO's categories: 'keypoints' "
                f"with names such as left_eye and right_eye; YOLO's data.yaml: flip_idx)."
            )
        moves = isinstance(part, A.DualTransform)
        if moves and type(part).apply_to_keypoints is A.DualTransform.apply_to_keypoints:
            raise ConfigError(f"The augmentation {name} cannot move points, which this head needs. Leave it out.")


def watched(parts: Sequence[Any]) -> list[Any]:
    """`parts`, behind each of them one that puts the points outside of the image far away."""
    from detkit.data.augment.single_image import ForgetPoints

    return [step for part in parts for step in (part, ForgetPoints(p=1.0))]


def forget_outside(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Those of `as_keypoints`, with the points outside of an image of (height, width) far away; the frame stays."""
    points = keypoints.copy()
    inner = points[:-3]
    inner[~_inside(inner[:, :2], size), :2] = FAR
    return points


def as_keypoints(target: Target, size: tuple[int, int]) -> np.ndarray:
    """(N * K + 3, 2) float32 for albumentations: all points, and the frame: three corners of the image."""
    assert target.points is not None
    height, width = size
    frame = np.array([[0, 0], [width, 0], [0, height]], dtype=np.float32)
    return np.concatenate([target.points.reshape(-1, 2).numpy(), frame])


def with_points(
    augmented: Target, before: Target, kept: torch.Tensor, keypoints: np.ndarray, size: tuple[int, int], rule: PointRule
) -> Target:
    """The augmented target with its points.

    Args:
        augmented: without points.
        before: the target before the augmentation.
        kept: (M,) which objects of it are left.
        keypoints: (N * K + 3, 2) where those of `as_keypoints` are now.
        size: (height, width) of the augmented image.

    Raises:
        DataError: the image was mirrored, and the rule does not say which points change places.
    """
    assert before.points is not None
    assert before.visible is not None
    points = torch.from_numpy(np.asarray(keypoints, dtype=np.float32)[:-3, :2].copy()).reshape(before.points.shape)
    visible = before.visible & torch.from_numpy(_inside(points.numpy(), size))
    if _is_mirrored(keypoints[-3:, :2]):
        if rule.flip_pairs is None:
            raise DataError(
                "An augmentation mirrored an image, but the data do not say which points change places then. Leave "
                "mirroring augmentations out."
            )
        order = list(range(points.shape[1]))
        for one, other in rule.flip_pairs:
            order[one], order[other] = other, one
        points, visible = points[:, order], visible[:, order]
    return replace(augmented, points=points[kept], visible=visible[kept])


def flip_pairs_of(names: Sequence[str]) -> Pairs | None:
    """The pairs among names such as left_eye and right_eye; None where no name says left or right."""
    pairs = []
    for index, name in enumerate(names):
        if "left" in name and (other := name.replace("left", "right")) in names:
            pairs.append((index, list(names).index(other)))
    return tuple(pairs) or None


def _inside(points: np.ndarray, size: tuple[int, int]) -> Any:
    """(...) bool: whether (..., 2) points lie in an image of (height, width)."""
    return ((points >= 0) & (points <= [size[1], size[0]])).all(-1)


def _is_mirrored(frame: np.ndarray) -> bool:
    across, down = frame[1] - frame[0], frame[2] - frame[0]
    return bool(across[0] * down[1] - across[1] * down[0] < 0)


def single_transforms(parts: Sequence[Any]) -> Iterator[Any]:
    """The transforms of albumentations in `parts`, those within compositions too."""
    from albumentations import BaseCompose

    for part in parts:
        if isinstance(part, BaseCompose):
            yield from single_transforms(part.transforms)
        else:
            yield part
