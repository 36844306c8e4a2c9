"""Random homographies of images, masks, boxes and points.

Coordinates are those of boxes: the first pixel extends from 0 to 1, its centre is (0.5, 0.5).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.errors import ConfigError, check_range

Size = tuple[int, int]


@dataclass(frozen=True)
class RandomWarp:
    """A distribution of random homographies, with independent uniform parameters.

    Args:
        part: the augmentation's name, for messages.
        rotation: maximum angle in degrees, in both directions.
        translation: maximum shift of the centre, as a fraction of each side of the result, in both directions.
        scale: smallest and largest factor; 1 keeps the size of objects in pixels.
        shear: maximum angle in degrees, along each axis.
        perspective: maximum relative difference of distance between the edge and the centre of an image along each
            axis; 0 for none, below 0.5.
    """

    part: str
    rotation: float
    translation: float
    scale: tuple[float, float]
    shear: float
    perspective: float

    def __post_init__(self) -> None:
        check_range(self.part, 0, 180, rotation=self.rotation)
        check_range(self.part, 0, 1, translation=self.translation)
        check_scale(self.part, self.scale)
        check_range(self.part, 0, 45, shear=self.shear)
        # At 0.5 a corner of the image would lie at infinity.
        check_range(self.part, 0, 0.49, perspective=self.perspective)

    def draw(self, random: np.random.Generator, source: Size, result: Size) -> np.ndarray:
        """Draw a (3, 3) float64 matrix from pixels of an image of size `source` to pixels of one of size `result`,
        which maps centre to centre apart from the translation."""
        angle = np.deg2rad(random.uniform(-self.rotation, self.rotation))
        scale = random.uniform(*self.scale)
        shear = np.tan(np.deg2rad(random.uniform(-self.shear, self.shear, 2)))
        depth = random.uniform(-self.perspective, self.perspective, 2)
        shift = 0.5 + random.uniform(-self.translation, self.translation, 2)
        perspective = np.eye(3)
        perspective[2, :2] = depth / [source[1] / 2, source[0] / 2]
        cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
        turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        shearing = np.array([[1, shear[0], 0], [shear[1], 1, 0], [0, 0, 1]])
        to_centre = translation_matrix(-source[1] / 2, -source[0] / 2)
        return (
            translation_matrix(shift[0] * result[1], shift[1] * result[0]) @ shearing @ turn @ perspective @ to_centre
        )

    def largest_zoom(self, size: Size) -> float:
        """Return a bound of the magnification in an image of (height, width) `size`."""
        nearest = 1 - 2 * self.perspective
        aspects = size[0] / size[1] + size[1] / size[0]
        slanted = (nearest + self.perspective * aspects) / nearest**2
        return max(1.0, self.scale[1]) * (1 + math.tan(math.radians(self.shear))) * slanted


def check_scale(part: str, scale: tuple[float, float]) -> None:
    """Check a smallest and largest factor.

    Raises:
        ConfigError: they are not greater than 0, or in the wrong order.
    """
    if not 0 < scale[0] <= scale[1] < np.inf:
        raise ConfigError(
            f"'{part}.scale' is the smallest and the largest factor, both greater than 0, but is {list(scale)}."
        )


def translation_matrix(x: float, y: float) -> np.ndarray:
    """Create a (3, 3) float64 translation by x and y pixels."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Compute the (N, 4) float64 xyxy boxes that enclose (N, 4) boxes transformed by `matrix` (3, 3)."""
    moved = warp_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), matrix).reshape(-1, 4, 2)
    return np.concatenate([moved.min(1), moved.max(1)], axis=1)


def warp_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Transform (N, 2) points by `matrix` (3, 3) to float64."""
    moved = np.column_stack([points.astype(np.float64), np.ones(len(points))]) @ matrix.T
    return moved[:, :2] / moved[:, 2:]


def warp_image(image: np.ndarray, matrix: np.ndarray, size: Size, fill: float) -> np.ndarray:
    """Warp an image (H, W, 3) uint8 by `matrix` to (*size, 3), bilinearly, with `fill` outside the image."""
    import cv2

    return _warp(image, matrix, size, cv2.INTER_LINEAR, fill)


def warp_mask(mask: np.ndarray, matrix: np.ndarray, size: Size) -> np.ndarray:
    """Warp a mask (H, W) uint8 by `matrix` to `size`, by nearest neighbour, with 0 outside the mask."""
    import cv2

    return _warp(mask, matrix, size, cv2.INTER_NEAREST, 0)


def _warp(image: np.ndarray, matrix: np.ndarray, size: Size, interpolation: int, fill: float) -> np.ndarray:
    import cv2

    # OpenCV's origin is the centre of the first pixel.
    centred = translation_matrix(-0.5, -0.5) @ matrix @ translation_matrix(0.5, 0.5)
    options: dict[str, Any] = {"dsize": size[::-1], "flags": interpolation, "borderValue": (fill, fill, fill)}
    if (centred[2] == [0, 0, 1]).all():
        return cv2.warpAffine(image, centred[:2], **options)
    return cv2.warpPerspective(image, centred, **options)
