"""Semantic maps over images, and palette PNGs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.errors import DetkitError
from detkit.structures import IGNORED_PIXEL
from detkit.tasks.segmentation.drawing import draw_semantic, voc_palette, write_palette_png

NAMES = ["background", "cat", "dog"]


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def test_classes_are_coloured_and_the_background_shows_through() -> None:
    labels = np.zeros((120, 160), dtype=np.uint8)
    labels[:30, :40], labels[:30, 100:] = 1, 2
    image = grey()
    drawn = draw_semantic(image, labels, NAMES)
    assert drawn.shape == image.shape
    assert (image == 100).all()
    assert (drawn[40:60, 100:] == 100).all()
    cat, dog = drawn[10, 10], drawn[10, 150]
    assert (cat != 100).any()
    assert (cat != dog).any()
    # The outline has the full colour, one pixel wide and inside.
    assert (drawn[29, 10] != cat).any()
    assert (drawn[30, 10] == 100).all()


def test_the_legend_names_the_classes_found() -> None:
    labels = np.zeros((120, 160), dtype=np.uint8)
    assert (draw_semantic(grey(), labels, NAMES) == 100).all()  # nothing to name but the background
    labels[0, 0] = 1
    one = draw_semantic(grey(), labels, NAMES)
    labels[0, 159] = IGNORED_PIXEL
    two = draw_semantic(grey(), labels, NAMES)
    changed = [(drawn[60:] != 100).any(axis=(1, 2)).sum() for drawn in (one, two)]
    assert 0 < changed[0] < changed[1]
    assert (two[0, 159] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (300, 9)])
def test_any_size_and_many_classes_are_drawn(size: tuple[int, int]) -> None:
    labels = np.arange(size[0] * size[1], dtype=np.int64).reshape(size) % 254
    drawn = draw_semantic(np.zeros((*size, 3), dtype=np.uint8), labels.astype(np.uint8), ())
    assert drawn.shape == (*size, 3)
    assert drawn.dtype == np.uint8


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the labels are \(2, 3\), but the image is \(120, 160\)"):
        draw_semantic(grey(), np.zeros((2, 3), dtype=np.uint8), NAMES)


def test_the_palette_is_vocs() -> None:
    """By the loop of the development kit's VOClabelcolormap.m."""
    expected = []
    for label in range(256):
        red = green = blue = 0
        for bit in range(8):
            red |= (label >> 0 & 1) << 7 - bit
            green |= (label >> 1 & 1) << 7 - bit
            blue |= (label >> 2 & 1) << 7 - bit
            label >>= 3
        expected.append((red, green, blue))
    palette = voc_palette()
    assert [tuple(row) for row in palette.tolist()] == expected
    assert palette[15].tolist() == [192, 128, 128]  # VOC's person
    assert palette[255].tolist() == [224, 224, 192]  # VOC's border


def test_palette_images_hold_the_labels(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_palette_png(tmp_path / "a" / "b.png", labels)
    image = Image.open(tmp_path / "a" / "b.png")
    assert image.mode == "P"
    assert (np.asarray(image) == labels).all()
    assert (np.asarray(image.convert("RGB")) == voc_palette()[labels]).all()
    (tmp_path / "file").write_text("")
    with pytest.raises(DetkitError, match="labels can't be written"):
        write_palette_png(tmp_path / "file" / "b.png", labels)
