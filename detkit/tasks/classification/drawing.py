"""Images of classifications: the best guesses below the image, and what was taken for what in a whole data set."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from detkit.structures import Classification
from detkit.tasks.drawing import BACKGROUND, check_image, readable, text_size

SHOWN_GUESSES = 3
SMALLEST_TEXT = 13
PLAIN, RIGHT, WRONG = (255, 255, 255), (120, 230, 120), (255, 130, 120)
BAR = (80, 88, 104)
MOST_COUNTS = 20
"""The most classes for which a confusion matrix shows its counts."""

Row = tuple[str, float, tuple[int, int, int]]
"""A line of text, the length of the bar behind it as a part of the width, and the colour of the text."""


def draw_classification(
    image: np.ndarray, prediction: Classification, target: Collection[int] | None = None, title: str = ""
) -> np.ndarray:
    """The image with the best guesses below it, each with a bar as long as its score.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: without class names, the label's number is shown.
        target: the labels of the classes that it has; guesses are then green or red.
        title: a line above the guesses.

    Returns:
        A new uint8 RGB image, higher than the image, and wider where that is narrow.

    Raises:
        ValueError: `image` has another shape or type.
    """
    rows: list[Row] = [(title, 0.0, PLAIN)] if title else []
    for label, name, score in best_guesses(prediction):
        color = PLAIN if target is None else RIGHT if label in target else WRONG
        rows.append((f"{name} {score:.2f}", score, color))
    return _with_rows(image, rows)


def draw_classes(image: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The image with the names of its classes below it; the arguments and the result as in `draw_classification`."""
    return _with_rows(image, [(", ".join(names) or "none", 0.0, PLAIN)])


def best_guesses(prediction: Classification) -> list[tuple[int, str, float]]:
    """Label, name and score of the best, best first; those below 0.005 only where there is no better one."""
    scores, labels = prediction.scores.sort(descending=True, stable=True)
    names = prediction.class_names
    guesses = [
        (label, names[label] if names else str(label), score)
        for label, score in zip(labels.tolist()[:SHOWN_GUESSES], scores.tolist())
    ]
    return [guess for rank, guess in enumerate(guesses) if not rank or guess[2] >= 0.005]


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """A confusion matrix, each row coloured by its parts; with the counts, where there are not too many classes.

    Args:
        confusion: (C, C) images by true class (row) and guess (column).
        class_names: C names.

    Returns:
        An (H, W, 3) uint8 RGB image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(class_names)
    side = 2.5 + min(12.0, max(2.0, 0.55 * count))
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    parts = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shown = axis.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axis, label="part of the true class", shrink=0.8)
    axis.set_xlabel("guess")
    axis.set_ylabel("true class")
    if count <= 3 * MOST_COUNTS:
        axis.set_xticks(range(count), class_names, rotation=90 if count > 6 else 0)
        axis.set_yticks(range(count), class_names)
    if count <= MOST_COUNTS:
        for row, column in np.argwhere(confusion):
            color = "white" if parts[row, column] > 0.5 else "black"
            axis.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _with_rows(image: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """`image` above rows of text."""
    from PIL import Image, ImageDraw, ImageFont

    check_image(image)
    size = max(SMALLEST_TEXT, text_size(image.shape, 1))
    font_path, texts = readable([text for text, _, _ in rows], np.arange(len(rows)))
    font = ImageFont.truetype(font_path, size)
    height = round(size * 1.5)
    width = max(image.shape[1], *(round(font.getlength(text)) + size for text in texts))
    strip = Image.new("RGB", (width, height * len(rows)), (BACKGROUND,) * 3)
    drawing = ImageDraw.Draw(strip)
    for number, (text, (_, part, color)) in enumerate(zip(texts, rows)):
        top = number * height
        if part > 0:
            drawing.rectangle((0, top + 1, round(part * (width - 1)), top + height - 2), fill=BAR)
        drawing.text((size // 2, top + height // 2), text, fill=color, font=font, anchor="lm")
    left = (width - image.shape[1]) // 2
    sides = ((0, 0), (left, width - image.shape[1] - left), (0, 0))
    return np.concatenate([np.pad(image, sides, constant_values=BACKGROUND), np.asarray(strip)])
