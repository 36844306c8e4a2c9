"""Pictures from files: always (H, W, 3) uint8 RGB, upright by their Exif rotation, or a DataError naming the file."""

from __future__ import annotations

import glob
import os
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detkit.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Files with these endings, in either case, count as pictures when a folder is searched."""

_EXIF_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8\xff"  # the first bytes
_SIDEWAYS = frozenset({5, 6, 7, 8})  # the orientations that exchange width and height
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, struct.error)


def read_image(path: str | Path, reduction: int = 1) -> np.ndarray:
    """The pixels of a picture.

    Grey, palette and CMYK pictures become RGB; transparency is dropped, not blended; of 16-bit values the upper
    8 bits are kept; of an animation, the first frame is taken.

    Args:
        path: any format that Pillow reads.
        reduction: 1, 2, 4 or 8: a JPEG is decoded at so small a fraction of its sides, which are rounded up, in a part
            of the time; each pixel is about the mean of those that it stands for. Other formats keep their size.

    Returns:
        (H, W, 3) uint8 RGB, upright: the Exif rotation is applied.

    Raises:
        DataError: the file is missing, empty, cut off, not a picture, too big, or has pixels of a kind with no
            fixed range (32-bit, floating point).
    """
    with _open(path) as image:
        if reduction > 1:
            image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
        return rgb_uint8(image, str(path))


def rgb_uint8(image: Image.Image, name: str = "in memory") -> np.ndarray:
    """The pixels of a Pillow image, as `read_image` gives them.

    Args:
        image: of any mode; it is left as it is.
        name: the file, for messages.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the file behind it is damaged, or its pixels have no fixed range.
    """
    try:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return _eight_bit(image, name)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except DataError:
        raise
    except _PILLOW_ERRORS as error:
        raise _undecodable(name, error) from error


def resized(image: np.ndarray, longer_side: int) -> np.ndarray:
    """(H, W, 3) uint8 with the longer side brought to so many pixels, the aspect ratio kept; Lanczos."""
    factor = longer_side / max(image.shape[:2])
    width, height = (max(1, round(factor * side)) for side in (image.shape[1], image.shape[0]))
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels of a picture as `read_image` gives it, from the head of the file alone.

    Raises:
        DataError: the file is missing, empty, not a picture, or too big.
    """
    with _open(path) as image:
        try:
            width, height = image.size
            return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)
        except _PILLOW_ERRORS as error:
            raise _undecodable(path, error) from error


def exchanges_sides(path: str | Path) -> bool:
    """Whether the Exif rotation of an image exchanges its width and height.

    Raises:
        DataError: as `image_size`.
    """
    with _open(path) as image:
        return _orientation(image) in _SIDEWAYS


def is_jpeg(path: str | Path) -> bool:
    """Whether a file starts as a JPEG does, whatever its name.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_JPEG)) == _JPEG
    except OSError as error:
        raise DataError(f"The picture '{path}' cannot be read ({error.strerror}).") from error


def check_image(path: str | Path, decode: bool) -> tuple[int, int]:
    """(height, width) in pixels of a picture that is whole.

    Args:
        path: a picture.
        decode: decode all of it. Otherwise only where its last bytes look cut off, which costs one look at the
            end of a JPEG or PNG and does not find damage in the middle. (Of a JPEG even a decode finds only what
            libjpeg does not paint over in grey.)

    Raises:
        DataError: as `read_image`.
    """
    size = image_size(path)
    if decode or _looks_cut_off(Path(path)):
        read_image(path)
    return size


def find_images(source: str | Path) -> list[Path]:
    """The pictures that a source names, in natural order (2.jpg before 10.jpg).

    Args:
        source: a file, a folder (searched with its subfolders for the endings in IMAGE_SUFFIXES; hidden files
            are passed over) or a glob pattern such as "shots/**/*.png".

    Raises:
        DataError: nothing found.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    else:
        candidates = [Path(name) for name in glob.glob(str(source), recursive=True)]
    found = [item for item in candidates if is_image(item) and item.is_file()]
    if not found:
        what = "The folder" if path.is_dir() else "There is no file or folder, and no match for the pattern,"
        raise DataError(
            f"{what} '{source}'{' holds no pictures' if path.is_dir() else ''}. Give a picture, a folder or a pattern; "
            f"files count as pictures by their endings: {' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return sorted(found, key=lambda item: natural_key(item.as_posix()))


def is_image(path: Path) -> bool:
    """Whether a file name is that of a picture: a known ending, and not hidden (macOS leaves '._a.jpg' about)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts digits in a text by their value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _open(path: str | Path) -> Image.Image:
    """The picture with only its head read."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"The picture '{path}' does not exist. Give the path of a file that does.")
    if path.stat().st_size == 0:
        raise DataError(f"The picture '{path}' is empty (0 bytes). Get a whole copy of the file, or remove it.")
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise DataError(
            f"The picture '{path}' has more than {limit} million pixels, Pillow's guard against files made to exhaust "
            f"the memory ({error}). Cut it into tiles, or set PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"The file '{path}' is not a picture that Pillow can read. Convert it to JPEG or PNG, or remove it."
        ) from error
    except _PILLOW_ERRORS as error:
        raise _undecodable(path, error) from error


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a whole PNG to look for Exif data behind its pixels; no camera writes them there, and a scan
    # of many headers could not afford it.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _eight_bit(image: Image.Image, name: str) -> np.ndarray:
    """A grey picture of more than 8 bits as (H, W, 3) uint8."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"The picture '{name}' has {values.dtype} pixels from {values.min()} to {values.max()}, which have no "
            f"fixed range that could be brought to 8 bits. Convert it to 8 or 16 bits with the range that you want."
        )
    grey = (values.astype(np.uint16) >> 8).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _looks_cut_off(path: Path) -> bool:
    """Whether a JPEG or PNG lacks its end marker."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 4096))
        end = file.read()
    if start.startswith(_JPEG):
        return not end.rstrip(b"\0").endswith(b"\xff\xd9")  # some cameras pad their files with zeros
    if start == b"\x89PNG":
        return b"IEND" not in end[-64:]
    return False


def _undecodable(path: str | Path, error: Exception) -> DataError:
    return DataError(
        f"The picture '{path}' cannot be decoded: it is cut off or damaged ({error}). Get a whole copy of the file, "
        f"or remove it."
    )
