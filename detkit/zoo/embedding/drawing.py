"""Images of embeddings: the vector as a strip of colours below the image, and what a gallery says it shows."""

import numpy as np

from detkit.tasks.classification.drawing import draw_classes
from detkit.tasks.drawing import check_image
from detkit.zoo.embedding.structures import Embedding


def draw_embedding(image: np.ndarray, prediction: Embedding, title: str = "") -> np.ndarray:
    """The image, below it its vector, and below that a line of text.

    In the strip blue stands for negative numbers, red for positive ones, and the deeper the larger: images of the
    same thing have strips that look alike.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: with an identity, where a gallery gave one.
        title: the text; default what the gallery says.

    Returns:
        A new uint8 RGB image, higher than the image.

    Raises:
        ValueError: `image` has another shape or type.
    """
    check_image(image)
    text = title or caption(prediction)
    photo = np.concatenate([image, _strip(prediction, image.shape[1], max(8, image.shape[0] // 16))])
    return draw_classes(photo, [text]) if text else photo


def caption(prediction: Embedding) -> str:
    """ "Ada 0.31", "unknown 0.93", or nothing without a gallery."""
    if prediction.distance is None:
        return ""
    return f"{prediction.identity or 'unknown'} {prediction.distance:.2f}"


def _strip(prediction: Embedding, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a cell for each number of the vector."""
    vector = prediction.vector.numpy()
    # The usual size of a number in a vector of length 1 is 1 / sqrt(D).
    strength = np.clip(vector * np.sqrt(len(vector)) / 2, -1, 1)[:, None]
    red, blue = np.array([214, 39, 40]), np.array([31, 119, 180])
    colors = 255 + np.abs(strength) * (np.where(strength > 0, red, blue) - 255)
    cells = np.arange(width) * len(vector) // width
    return np.repeat(colors[cells].round().astype(np.uint8)[None], height, axis=0)
