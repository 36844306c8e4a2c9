"""Drawing of detections and targets: boxes with labels, masks, side-by-side views, contact sheets and image files.

Images are (H, W, 3) uint8 RGB throughout, and no function modifies its input image. Lines and text scale with the
image. A class has the same colour in every image; objects with masks are coloured individually instead, so that
neighbouring objects of one class can be distinguished.
"""

from __future__ import annotations

import colorsys
import importlib.util
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detkit.errors import DetkitError
from detkit.io.files import write_bytes
from detkit.structures import Detections, Target

if TYPE_CHECKING:
    import supervision
    from PIL import ImageFont

logger = logging.getLogger(__name__)

# Colours of the first twenty labels; the others are computed. Consecutive ones differ in hue and brightness, and none
# is close to grey or to BACKGROUND.
FIRST_COLORS = (
    *("#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#911eb4", "#42d4f4", "#f58231", "#f032e6", "#bfef45", "#9a6324"),
    *("#469990", "#fabed4", "#800000", "#aaffc3", "#000075", "#ffd8b1", "#808000", "#dcbeff", "#00a8ff", "#ff7f50"),
)
BACKGROUND = 32
"""Grey value, 0..255, of captions and sheet padding."""
MASK_OPACITY = 0.45
MOVED_LABELS = 100
"""Maximum number of objects whose labels are moved apart, which takes quadratic time. With more objects there would be
no room to move labels anyway, so they stay at their boxes."""


def draw_detections(image: np.ndarray, detections: Detections, *, show_scores: bool = True) -> np.ndarray:
    """Draw detections with class name, score and mask; higher scores are drawn on top.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: boxes in pixels of `image`, masks of its size; without class names, label numbers are shown.
        show_scores: "cat 0.93" instead of "cat".

    Returns:
        A new (H, W, 3) uint8 RGB image.

    Raises:
        ValueError: `image` has another shape or type, or the masks another size.
    """
    texts = [f"{name} {score:.2f}" if show_scores else str(name) for _, score, name in detections]
    order = detections.scores.argsort(stable=True).cpu().numpy()
    return _annotate(image, detections.to("cpu"), texts, order, np.zeros(len(texts), dtype=bool))


def draw_targets(image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
    """Draw the ground truth; crowd regions and difficult objects get only corners and outlines, and are labelled so.

    Args:
        image: (H, W, 3) uint8 RGB.
        target: boxes in pixels of `image`, masks of its size.
        class_names: names by label.

    Returns:
        A new (H, W, 3) uint8 RGB image.

    Raises:
        ValueError: `image` has another shape or type, or the masks another size.
    """
    target = target.to("cpu")
    texts = []
    for label, crowd, difficult in zip(target.labels.tolist(), target.crowd.tolist(), target.difficult.tolist()):
        texts.append(class_names[label] + (" (crowd)" if crowd else " (difficult)" if difficult else ""))
    return _annotate(image, target, texts, np.arange(len(texts)), target.ignored.numpy())


def compare(image: np.ndarray, detections: Detections, target: Target, class_names: Sequence[str]) -> np.ndarray:
    """Draw ground truth (left) and detections (right) side by side, captioned with their numbers.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: boxes in pixels of `image`.
        target: the ground truth, in the same pixels.
        class_names: names by label.

    Returns:
        A new uint8 RGB image, slightly more than twice as wide and slightly higher.

    Raises:
        ValueError: `image` has another shape or type.
    """
    named = replace(detections, class_names=tuple(class_names))
    ground_truth, found = draw_targets(image, target, class_names), draw_detections(image, named)
    return side_by_side(ground_truth, found, f"ground truth: {len(target)}", f"detected: {len(detections)}")


def side_by_side(left: np.ndarray, right: np.ndarray, left_caption: str, right_caption: str) -> np.ndarray:
    """Join two (H, W, 3) uint8 RGB images of the same size horizontally, each below its caption."""
    gap = _line_width(left.shape) * 2
    left, right = _captioned(left, left_caption), _captioned(right, right_caption)
    return np.concatenate([left, np.full((len(left), gap, 3), BACKGROUND, dtype=np.uint8), right], axis=1)


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images in a grid, row by row; smaller images are centred in their cell, not scaled.

    Args:
        images: each (H, W, 3) uint8 RGB, of any size.
        columns: number of images per row.

    Returns:
        A new uint8 RGB image of ceil(number / columns) rows.

    Raises:
        ValueError: there are no images, an image has another shape or type, or `columns` is below 1.
    """
    if not images or columns < 1:
        raise ValueError(f"a sheet needs images and at least one column, but got {len(images)} and {columns}")
    for image in images:
        check_image(image)
    gap = 4
    height = max(image.shape[0] for image in images) + gap
    width = max(image.shape[1] for image in images) + gap
    columns = min(columns, len(images))
    sheet = np.full((math.ceil(len(images) / columns) * height, columns * width, 3), BACKGROUND, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top = row * height + (height - image.shape[0]) // 2
        left = column * width + (width - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an image in the format that the suffix names: .jpg, .png, .webp, .bmp, .tiff ...

    Args:
        path: the file to write; its folder is created, and an existing file is replaced.
        image: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: `image` has another shape or type.
        DetkitError: the suffix names no format, or the file can't be written.
    """
    from PIL import Image

    check_image(image)
    path = Path(path)
    format_name = Image.registered_extensions().get(path.suffix.lower())
    if format_name not in Image.SAVE:
        raise DetkitError(
            f"The image cannot be written to {path}: the suffix '{path.suffix}' is not a supported image format. "
            f"Use .jpg, .png, .webp, .bmp or .tiff."
        )
    encoded = BytesIO()
    try:
        # JPEG's default quality and subsampling blur thin coloured lines. Other formats ignore these options.
        Image.fromarray(image).save(encoded, format=format_name, quality=95, subsampling=0)
    # Pillow raises any of these for sides that a format does not support, such as more than 65,500 pixels for JPEG.
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        height, width = image.shape[:2]
        raise DetkitError(
            f"The image of {width} x {height} pixels cannot be written to '{path}' as {format_name}: {error}. Use .png."
        ) from error
    write_bytes(path, encoded.getvalue(), durable=False)


def _annotate(
    image: np.ndarray, objects: Detections | Target, texts: list[str], order: np.ndarray, corners_only: np.ndarray
) -> np.ndarray:
    """Draw objects with their texts on a copy of `image`.

    Args:
        order: (N,) indices in drawing order; the last is on top.
        corners_only: (N,) bool, whether to draw only the corners of the box and the outline of the mask.
    """
    import cv2
    import supervision

    check_image(image)
    if not len(objects):
        return image.copy()
    height, width = image.shape[:2]
    labels = objects.labels.numpy()
    # With masks, colours follow the drawing order: the object on top gets the first one.
    colors = labels if objects.masks is None else len(order) - 1 - order.argsort()
    palette = _palette(int(colors.max()) + 1)
    boxes = _inside(objects.boxes.numpy(), height, width)
    thickness = _line_width(image.shape)

    def chosen(indices: np.ndarray) -> supervision.Detections:
        return supervision.Detections(xyxy=boxes[indices], class_id=colors[indices])

    # supervision expects BGR.
    scene = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    if objects.masks is not None:
        scene = _paint_masks(scene, boxes, objects.masks.numpy(), palette, colors, corners_only)
    scene = supervision.BoxAnnotator(palette, thickness).annotate(scene, chosen(order[~corners_only[order]]))
    corner = max(4, min(height, width) // 30)
    corners = supervision.BoxCornerAnnotator(palette, thickness, corner)
    scene = corners.annotate(scene, chosen(order[corners_only[order]]))

    size = text_size(image.shape, len(texts))
    font_path, texts = readable(texts, labels)
    annotator = supervision.RichLabelAnnotator(
        palette,
        text_color=_text_colors(palette),
        font_path=font_path,
        font_size=size,
        text_padding=max(1, size // 6),
        smart_position=len(texts) <= MOVED_LABELS,
    )
    scene = annotator.annotate(scene, chosen(order), labels=[texts[index] for index in order])
    photo: np.ndarray = cv2.cvtColor(scene, cv2.COLOR_BGR2RGB)
    if objects.points is None:
        return photo
    from detkit.tasks.points_drawing import draw_points

    return draw_points(photo, objects.points, getattr(objects, "visible", None), numbers=False)


def _paint_masks(
    scene: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray,
    palette: supervision.ColorPalette,
    colors: np.ndarray,
    outlines_only: np.ndarray,
) -> np.ndarray:
    """Draw masks (N, H, W) with their outlines, smaller ones on top; some as outlines only."""
    import supervision

    if masks.shape[1:] != scene.shape[:2]:
        raise ValueError(f"the masks are {masks.shape[1:]}, but the image is {scene.shape[:2]}")
    everything = supervision.Detections(xyxy=boxes, class_id=colors, mask=masks)
    filled = everything
    # Only if needed, since copying masks takes longer than drawing them.
    if outlines_only.any():
        inside = ~outlines_only
        filled = supervision.Detections(xyxy=boxes[inside], class_id=colors[inside], mask=masks[inside])
    scene = supervision.MaskAnnotator(palette, MASK_OPACITY).annotate(scene, filled)
    # Thinner than boxes: a thick outline would cover the masks of small objects.
    return supervision.PolygonAnnotator(palette, max(1, _line_width(scene.shape) // 2)).annotate(scene, everything)


def _captioned(image: np.ndarray, text: str) -> np.ndarray:
    """Add a strip with `text` above `image`."""
    from PIL import Image, ImageDraw

    size = text_size(image.shape, 1)
    strip = Image.new("RGB", (image.shape[1], size * 2), (BACKGROUND,) * 3)
    ImageDraw.Draw(strip).text((size // 2, size), text, fill="white", font=font(size), anchor="lm")
    return np.concatenate([np.asarray(strip), image])


def _inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes to the last pixel, so that the right and bottom edges of a box at the border are visible."""
    return boxes.clip(0, [width - 1, height - 1, width - 1, height - 1])


def _line_width(shape: tuple[int, ...]) -> int:
    return max(1, round(min(shape[:2]) / 280))


def text_size(shape: tuple[int, ...], count: int) -> int:
    """Return the font height in pixels: 12 for an image of 640 x 480, 10 if it has many objects."""
    share = 0.025 if count <= 30 else 0.021
    return max(9, round(min(shape[:2]) * share))


def _palette(count: int) -> supervision.ColorPalette:
    """Return the colours of all labels below `count`; the colour of a label does not depend on `count`."""
    import supervision

    colors = [supervision.Color.from_hex(color) for color in FIRST_COLORS[:count]]
    for label in range(len(colors), count):
        # Golden-ratio steps around the hue circle keep hues well separated.
        hue, saturation, value = label * 0.618034 % 1, (0.9, 0.55, 0.75)[label % 3], (0.95, 1.0, 0.6)[label % 3]
        colors.append(supervision.Color(*(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))))
    return supervision.ColorPalette(colors)


def label_colors(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB, the box colours of all labels below `count`."""
    return np.array([color.as_rgb() for color in _palette(count).colors], dtype=np.uint8).reshape(-1, 3)


def _text_colors(palette: supervision.ColorPalette) -> supervision.ColorPalette:
    """Choose black text for the light colours of `palette` and white for the dark ones."""
    import supervision

    luminance = [0.299 * color.r + 0.587 * color.g + 0.114 * color.b for color in palette.colors]
    black, white = supervision.Color.BLACK, supervision.Color.WHITE
    return supervision.ColorPalette([black if value > 140 else white for value in luminance])


def _default_font_path() -> str:
    # The built-in fonts of Pillow and OpenCV are ASCII only; matplotlib, a dependency of supervision, includes DejaVu
    # Sans. Importing matplotlib takes longer than drawing an image, so its usual font path is tried first.
    font = Path("fonts", "ttf", "DejaVuSans.ttf")
    package = importlib.util.find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    usual = Path(package.origin).with_name("mpl-data") / font
    if usual.is_file():
        return str(usual)
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / font)


def font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font of captions and legends, `size` pixels high."""
    from PIL import ImageFont

    return ImageFont.truetype(_default_font_path(), size)


def readable(texts: list[str], labels: np.ndarray) -> tuple[str, list[str]]:
    """Find a font with every character of `texts`; if there is none, replace unprintable names by label numbers."""
    default = _default_font_path()
    together = "".join(texts)
    missing = set() if together.isascii() and together.isprintable() else _missing(default, together)
    if not missing:
        return default, texts

    from matplotlib import font_manager

    for entry in font_manager.fontManager.ttflist:
        # The Last Resort font claims to have every character, but draws all of them as boxes.
        if not entry.name.startswith("Last Resort") and not _missing(entry.fname, "".join(texts)):
            return entry.fname, texts
    logger.warning(
        "No font on this system can draw %r, so images show the class number instead. Install a font that can, such "
        "as Noto Sans CJK.",
        "".join(sorted(missing)),
    )
    remaining = ["".join(character for character in text if character not in missing).strip() for text in texts]
    return default, [
        text if text == whole else f"{label}: {text}" for whole, text, label in zip(texts, remaining, labels)
    ]


def _missing(font_path: str, text: str) -> set[str]:
    """Return the characters of `text` that are missing from a font."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(font_path)
    return {character for character in text if not font.get_char_index(ord(character))}


def check_image(image: np.ndarray) -> None:
    """Raise ValueError if an array is not (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) uint8, but is {image.shape} {image.dtype}")
