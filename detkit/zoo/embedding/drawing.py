"""Drawing of embeddings: the vector as a colour strip below the image, with the identity found in a gallery."""

import numpy as np

from detkit.tasks.classification.drawing import draw_classes
from detkit.tasks.drawing import check_image
from detkit.zoo.embedding.structures import Embedding


def draw_embedding(image: np.ndarray, prediction: Embedding, title: str = "") -> np.ndarray:
    """Draw the image above its vector and a line of text.

    In the strip blue is negative, red is positive, and saturation shows the magnitude; images of the same object have
    similar strips.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: with an identity, where a gallery gave one.
        title: the text; default the result of the gallery.

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
    """Draw a strip (height, width, 3) uint8 with a cell for each number of the vector."""
    vector = prediction.vector.numpy()
    # The typical magnitude of a number in a unit vector is 1 / sqrt(D).
    strength = np.clip(vector * np.sqrt(len(vector)) / 2, -1, 1)[:, None]
    red, blue = np.array([214, 39, 40]), np.array([31, 119, 180])
    colors = 255 + np.abs(strength) * (np.where(strength > 0, red, blue) - 255)
    cells = np.arange(width) * len(vector) // width
    return np.repeat(colors[cells].round().astype(np.uint8)[None], height, axis=0)
