"""Drawing of landmarks as numbered dots."""

import numpy as np
from torch import Tensor

from detkit.tasks.drawing import check_image, font, label_colors, text_size


def draw_points(image: np.ndarray, points: Tensor, visible: Tensor | None, numbers: bool = True) -> np.ndarray:
    """Draw landmarks as dots; a point has the same colour in every image.

    Args:
        image: (H, W, 3) uint8 RGB.
        points: (N, K, 2) x and y in pixels of `image`, for N objects.
        visible: (N, K) bool, the points to draw; None for all.
        numbers: whether to write the index of each point beside it.

    Returns:
        A new (H, W, 3) uint8 RGB image.

    Raises:
        ValueError: `image` has another shape or type.
    """
    from PIL import Image, ImageDraw

    check_image(image)
    photo = Image.fromarray(image)
    drawing = ImageDraw.Draw(photo)
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
    return np.asarray(photo).copy()
