"""Semantic maps over images, with a legend of their classes; and palette PNGs as Pascal VOC has them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detkit.errors import DetkitError
from detkit.structures import IGNORED_PIXEL
from detkit.tasks.drawing import BACKGROUND, MASK_OPACITY, check_image, font, label_colors, text_size

BACKGROUND_NAME = "background"
"""A class of this name is not coloured: the image shows through."""
IGNORED_COLOR = (255, 255, 255)
IGNORED_NAME = "not counted"
MOST_IN_LEGEND = 12


def draw_semantic(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Paint the classes of pixels over an image, with a legend of those that occur, the largest first.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 classes; pixels of IGNORED_PIXEL become white.
        class_names: names by label; empty for the labels' numbers.

    Returns:
        A new (H, W, 3) uint8 RGB image.

    Raises:
        ValueError: `image` has another shape or type, or the labels another size.
    """
    check_image(image)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"the labels are {labels.shape}, but the image is {image.shape[:2]}")
    counts = np.bincount(labels.ravel(), minlength=256)
    table = np.zeros((256, 3), dtype=np.uint8)
    opacity = np.zeros((256, 1), dtype=np.float32)
    entries = []
    for label in np.argsort(-counts, kind="stable")[: int((counts > 0).sum())].tolist():
        name = _name(label, class_names)
        if name != BACKGROUND_NAME:
            table[label] = IGNORED_COLOR if label == IGNORED_PIXEL else label_colors(label + 1)[label]
            opacity[label] = MASK_OPACITY
            entries.append((name, tuple(table[label].tolist()), counts[label] / labels.size))
    mixed = image * (1 - opacity[labels]) + table[labels] * opacity[labels]
    edges = _edges(labels)[..., None] & (opacity[labels] > 0)
    painted = np.where(edges, table[labels], mixed.round().astype(np.uint8))
    return _with_legend(painted, entries)


def write_palette_png(path: Path, labels: np.ndarray) -> None:
    """Write (H, W) uint8 labels as a PNG whose pixels are the labels, with VOC's colours as its palette.

    Raises:
        DetkitError: the file can't be written.
    """
    from PIL import Image

    image = Image.fromarray(labels)
    image.putpalette(voc_palette().ravel().tolist())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise DetkitError(f"The labels can't be written to {path}: {error.strerror or error}.") from error


def voc_palette() -> np.ndarray:
    """(256, 3) uint8 RGB, VOC's colour of each label: the label's bits 0, 3 and 6 are the highest bits of red, bits 1,
    4 and 7 of green, bits 2 and 5 of blue (the development kit's VOClabelcolormap)."""
    labels = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for channel in range(3):
        for place in range(3):
            bit = labels >> (3 * place + channel) & 1
            colors[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colors


def _name(label: int, class_names: Sequence[str]) -> str:
    if label == IGNORED_PIXEL:
        return IGNORED_NAME
    return class_names[label] if class_names else str(label)


def _edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels with a neighbour of another class."""
    edges = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, :-1] != labels[:, 1:], labels[:-1] != labels[1:]
    edges[:, :-1] |= across
    edges[:, 1:] |= across
    edges[:-1] |= down
    edges[1:] |= down
    return edges


def _with_legend(image: np.ndarray, entries: Sequence[tuple[str, tuple[int, ...], float]]) -> np.ndarray:
    """The image with a coloured square, a name and a share for each class, at the bottom left."""
    from PIL import Image, ImageDraw

    if not entries:
        return image
    lines = [f"{name} {100 * share:.1f} %" for name, _, share in entries[:MOST_IN_LEGEND]]
    if len(entries) > MOST_IN_LEGEND:
        lines.append(f"and {len(entries) - MOST_IN_LEGEND} more")
    size = text_size(image.shape, len(lines))
    face = font(size)
    line = round(size * 1.5)
    width = round(max(face.getlength(text) for text in lines)) + 3 * size
    top = max(0, image.shape[0] - line * len(lines) - size)
    photo = Image.fromarray(image)
    panel = Image.new("RGB", (width, image.shape[0] - top), (BACKGROUND,) * 3)
    photo.paste(Image.blend(photo.crop((0, top, width, image.shape[0])), panel, 0.75), (0, top))
    pen = ImageDraw.Draw(photo)
    for number, text in enumerate(lines):
        middle = top + size // 2 + number * line + line // 2
        if number < len(entries) and number < MOST_IN_LEGEND:
            box = (size // 2, middle - size // 2, size // 2 + size, middle - size // 2 + size)
            pen.rectangle(box, fill=entries[number][1])
        pen.text((2 * size, middle), text, fill="white", font=face, anchor="lm")
    return np.asarray(photo).copy()
