"""Pictures of landmarks: a dot for each point, with its number where there is room."""

import numpy as np
from torch import Tensor

from detkit.predictions import Landmarks
from detkit.tasks.drawing import check_image, font, label_colors, text_size


def draw_landmarks(image: np.ndarray, prediction: Landmarks) -> np.ndarray:
    """The picture with the points and their numbers, from 0; a point has the same colour in every picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: points in pixels of `image`.

    Returns:
        A new (H, W, 3) uint8 RGB image.

    Raises:
        ValueError: `image` has another shape or type.
    """
    return draw_points(image, prediction.points[None], None)


def draw_points(image: np.ndarray, points: Tensor, visible: Tensor | None, numbers: bool = True) -> np.ndarray:
    """The picture with the points (N, K, 2) of N objects, those of them that are visible (N, K); None for all.

    Args:
        numbers: write the number of each beside it.

    Raises:
        ValueError: `image` has another shape or type.
    """
    from PIL import Image, ImageDraw

    check_image(image)
    picture = Image.fromarray(image)
    drawing = ImageDraw.Draw(picture)
    radius = max(1.5, min(image.shape[:2]) / 150)
    size = text_size(image.shape, 1)
    colors = [tuple(color) for color in label_colors(points.shape[1]).tolist()]
    for number, places in enumerate(points):
        shown = np.ones(len(places), dtype=bool) if visible is None else visible[number].cpu().numpy()
        for index, (x, y) in enumerate(places.tolist()):
            if not shown[index]:
                continue
            drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colors[index], outline="black")
            if numbers:
                drawing.text(
                    (x + radius + 1, y - radius - 1),
                    str(index),
                    fill=colors[index],
                    font=font(size),
                    anchor="ls",
                    stroke_width=max(1, size // 8),
                    stroke_fill="black",
                )
    return np.asarray(picture).copy()
