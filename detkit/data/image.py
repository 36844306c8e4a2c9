"""Reading images: the only module that opens image files.

Pixels are always (H, W, 3) uint8 RGB, with the file's orientation applied. Every failure is a DataError that names the
file. The format is detected by content and restricted to FORMATS: some of Pillow's decoders start other programs (EPS
starts Ghostscript), and some were never meant for untrusted files.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from detkit.errors import ConfigError, DataError, DetkitError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA")
"""Pillow's names of the supported formats. All are decoded within the process."""
TGA_SUFFIXES = frozenset({".icb", ".tga", ".vda", ".vst"})
"""TGA has no magic number, so almost any file could pass for it: only files with these suffixes are tried."""
IMAGE_SUFFIXES = TGA_SUFFIXES | {
    ".apng", ".avif", ".avifs", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg",
    ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Files with these suffixes, in either case, count as images when a folder is searched."""

MEMORY_LIMIT = 0.8
"""Maximum gigabytes for decoding one image, and for all that a scan decodes at once; see MEMORY_VARIABLE."""
MEMORY_VARIABLE = "DETKIT_IMAGE_GB"
"""The environment variable that overrides MEMORY_LIMIT."""
PLAIN_BYTES = 7
"""Peak bytes per pixel of decoding to RGB: Pillow's 4 and the result's 3."""
FORMAT_BYTES = {"TIFF": 10, "WEBP": 19, "AVIF": 13, "JPEG2000": 20}
"""Measured peak bytes per pixel of formats that use further buffers."""
PROGRESSIVE_BYTES = 11
"""Peak bytes per pixel of a progressive JPEG, whose coefficients are kept until the last scan."""
LARGEST_SCAN_COUNT = 40
"""Maximum scans of a progressive JPEG, each of which processes all pixels. Encoders write about 10."""
DARK_BITS = 14
"""16-bit images that use at most this many bits have at most a quarter of the brightness."""

_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 258, 322, 323
_JPEG = b"\xff\xd8\xff"  # the first bytes
_SIDEWAYS = frozenset({5, 6, 7, 8})  # the orientations that swap width and height
_STRIP_PIXELS = 2_000_000  # converted at a time
_TAIL_BYTES = 65536
for _module in ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    with suppress(ImportError):  # AVIF needs Pillow 11.3
        import_module(f"PIL.{_module}ImagePlugin")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file in a `with` block, reading only its header.

    The block should only decode the image: any exception in it is reported as damage of the file. Pillow decodes the
    first frame of an animation.

    Raises:
        DataError: the file is missing, empty, truncated, damaged, not an image of FORMATS, or needs more memory than
            MEMORY_LIMIT.
        ConfigError: the environment variable MEMORY_VARIABLE is not a positive number.
    """
    if not os.path.isfile(path):
        raise DataError(f"The image '{path}' does not exist. Give the path of an existing file.")
    # Pillow's decoders raise almost any exception for damaged or malicious files.
    try:
        _lift_guard()
        with open(path, "rb") as file, _identify(file, path) as image:
            _check_memory(image, path)
            yield image
    except DetkitError:
        raise
    except PermissionError as error:
        raise DataError(f"The image '{path}' cannot be read ({error.strerror}). Change its permissions.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"The image '{path}' is too large to decode ({error}). {_limit_remedy(5)}") from error
    except Exception as error:
        raise _undecodable(path, error) from error


def read_image(path: str | Path, reduction: int = 1, notes: list[str] | None = None) -> np.ndarray:
    """Read the pixels of an image.

    Grey, palette and CMYK images become RGB; transparency is dropped, not blended; the first frame of an animation is
    used. The upper 8 bits of 16-bit samples are kept, whatever their values, so that images stay comparable: files that
    use only 12 of 16 bits become nearly black, which is added to `notes`. (PNG's sBIT and TIFF's MaxSampleValue do not
    change that: by their specifications samples are scaled to all bits, and the latter is for statistics only.) A TIFF
    that stores 12 bits per sample has its full range.

    Args:
        path: a file of any of FORMATS, regardless of its suffix.
        reduction: 1, 2, 4 or 8: decode a JPEG faster at this fraction of its size, rounded up; each pixel is about the
            mean of those that it replaces. Other formats keep their size.
        notes: a list to which remarks on unusual images are added.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: as `open_image`; or the samples have no fixed range (32-bit, signed, floating point).
    """
    with open_image(path) as image:
        if image.info.get("progressive"):
            _check_scans(image, path)
        if reduction > 1:
            image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
        return _pixels(image, str(path), notes)


def rgb_uint8(image: Image.Image, name: str = "in memory") -> np.ndarray:
    """Convert a Pillow image to pixels as `read_image` returns them.

    Args:
        image: an image of any mode; it is not modified.
        name: the file, for messages.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: its file is damaged, or its samples have no fixed range.
    """
    try:
        image.load()
        return _pixels(image, name)
    except DetkitError:
        raise
    except Exception as error:
        raise _undecodable(name, error) from error


def stored_values(image: Image.Image) -> np.ndarray:
    """Return the stored samples of an open image, upright; indices for a palette image."""
    orientation = _orientation_after_decoding(image)
    return _upright(np.array(image), orientation)


def resized(image: np.ndarray, longer_side: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to a length of the longer side in pixels, keeping the aspect ratio, by Lanczos."""
    factor = longer_side / max(image.shape[:2])
    width, height = (max(1, round(factor * side)) for side in (image.shape[1], image.shape[0]))
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def image_size(path: str | Path) -> tuple[int, int]:
    """Read the (height, width) in pixels that `read_image` gives, from the header only.

    Raises:
        DataError: as `open_image`.
    """
    with open_image(path) as image:
        return _upright_size(image)


def exchanges_sides(path: str | Path) -> bool:
    """Return whether the Exif rotation of an image swaps its width and height.

    Raises:
        DataError: as `image_size`.
    """
    with open_image(path) as image:
        return _orientation(image) in _SIDEWAYS


def is_jpeg(path: str | Path) -> bool:
    """Return whether a file starts like a JPEG, regardless of its name.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_JPEG)) == _JPEG
    except OSError as error:
        raise DataError(f"The image '{path}' cannot be read ({error.strerror}). Check its permissions.") from error


def check_image(path: str | Path, decode: bool, notes: list[str] | None = None) -> tuple[int, int]:
    """Check that an image is complete, and return its (height, width) in pixels.

    Several threads may check images at once: together they decode only as much as fits into MEMORY_LIMIT.

    Args:
        path: an image.
        decode: decode the image completely. Otherwise it is only decoded if its end looks truncated, which needs only
            the last bytes of a JPEG or PNG but does not find damage in the middle. (In JPEGs even decoding does not
            find damage that libjpeg fills with grey.)
        notes: as for `read_image`; if given, 16-bit images are decoded, too.

    Raises:
        DataError: as `read_image`.
    """
    with open_image(path) as image:
        size, memory = _upright_size(image), _memory(image)
        decode = decode or (notes is not None and _sample_bits(image) > 8)
    if decode or _looks_truncated(Path(path)):
        with _DECODING.taking(memory):
            read_image(path, notes=notes)
    return size


class _Budget:
    """A memory budget in gigabytes shared by threads: each waits until its part is free, or no other holds any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: list[float] = []

    @contextmanager
    def taking(self, amount: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or sum(self._taken) + amount <= memory_limit())
            self._taken.append(amount)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(amount)
                self._changed.notify_all()


_DECODING = _Budget()


def memory_limit() -> float:
    """Return MEMORY_LIMIT, or the value of the environment variable MEMORY_VARIABLE.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get(MEMORY_VARIABLE, str(MEMORY_LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise ConfigError(
            f"The environment variable {MEMORY_VARIABLE} must be a number of gigabytes above 0, but is '{text}'."
        )
    return limit


def _identify(file: IO[bytes], path: str | Path) -> Image.Image:
    """Open the image in a file by the first decoder of FORMATS that recognises its first bytes, reading the header.

    Image.open would do the same, but applies a pixel limit that is global to the process.
    """
    start = file.read(16)
    if not start:
        raise DataError(f"The image '{path}' is empty (0 bytes). Get a complete copy of the file, or remove it.")
    may_be_tga = Path(path).suffix.lower() in TGA_SUFFIXES
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        # Decoders that Pillow was built without return a text.
        if opener is not None and (may_be_tga if accepts is None else accepts(start) is True):
            file.seek(0)
            # Without a name Pillow does not map the file into memory, which fails for rotated TIFFs and shrinking
            # files.
            image = opener(file, "")
            if name == "PNG" and "exif" not in image.info:
                image.info.update(_late_exif(file))
            return image
    raise DataError(
        f"The file '{path}' is not an image of a supported format ({', '.join(FORMATS)}). Convert it to JPEG or "
        f"PNG, or remove it."
    )


def _lift_guard() -> None:
    """Raise Pillow's limit on image size, which some decoders check themselves, to what MEMORY_LIMIT allows."""
    allowed = int(memory_limit() * 1e9 / PLAIN_BYTES)
    if Image.MAX_IMAGE_PIXELS is not None and allowed > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = allowed


def _check_memory(image: Image.Image, path: str | Path) -> None:
    needed, limit = _memory(image), memory_limit()
    if needed > limit:
        width, height = image.size
        raise DataError(
            f"The image '{path}' has {width * height / 1e6:,.0f} megapixels ({width} x {height}) and takes about "
            f"{needed:,.1f} GB of memory to decode, more than the limit of {limit:g} GB. {_limit_remedy(needed)}"
        )


def _limit_remedy(gigabytes: float) -> str:
    return (
        f"Split it into tiles or resize it; or, if you trust the file and have the memory, set the environment "
        f"variable {MEMORY_VARIABLE}={math.ceil(10 * gigabytes) / 10 + 0.1:.1f}."
    )


def _memory(image: Image.Image) -> float:
    """Estimate the peak gigabytes of decoding an image from its header."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        # A tile is decoded completely, even if only a part of it is inside the image.
        tags = image.tag_v2  # type: ignore[attr-defined]
        pixels = max(pixels, tags.get(_TIFF_TILE_WIDTH, 0) * tags.get(_TIFF_TILE_HEIGHT, 0))
    elif image.format == "BMP":
        pixels = max(pixels, 256 * image.width)  # run lengths may skip that many rows, even past the end
    plain = PROGRESSIVE_BYTES if image.info.get("progressive") else PLAIN_BYTES
    return pixels * FORMAT_BYTES.get(str(image.format), plain) / 1e9


def _check_scans(image: Image.Image, path: str | Path) -> None:
    file = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    if scans > LARGEST_SCAN_COUNT:
        raise DataError(
            f"The image '{path}' is a progressive JPEG with {scans:,} scans, each of which takes as long as an image; "
            f"at most {LARGEST_SCAN_COUNT} are allowed. Save it again as a baseline JPEG, or remove it."
        )


def _late_exif(file: IO[bytes]) -> dict[str, bytes]:
    """Find Exif data after the pixels of a PNG, where some tools put it and Pillow finds it only by decoding."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = file.read()
    file.seek(position)
    start = tail.rfind(b"eXIf")
    end = start + 4 + int.from_bytes(tail[max(0, start - 4) : max(0, start)])
    whole = start >= 4 and zlib.crc32(tail[start:end]).to_bytes(4) == tail[end : end + 4]
    return {"exif": b"Exif\0\0" + tail[start + 4 : end]} if whole else {}


def _orientation(image: Image.Image) -> int:
    """Return the Exif orientation 1..8; 1 if it is missing or the Exif data is damaged."""
    try:
        # PNG's own method decodes the image to find Exif data after its pixels.
        orientation = int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    except Exception:  # the pixels may be intact
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _orientation_after_decoding(image: Image.Image) -> int:
    """Return the orientation to apply after decoding; Pillow applies it itself for TIFF."""
    return 1 if image.format == "TIFF" else _orientation(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the upright (height, width) of an image that is not decoded yet."""
    width, height = image.size
    if image.format == "TIFF":  # whether its `size` is the stored or the upright one depends on Pillow's version
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror (H, W, ...) according to an Exif orientation 1..8."""
    if orientation in {2, 7}:
        pixels = pixels[:, ::-1]
    elif orientation in {4, 5}:
        pixels = pixels[::-1]
    quarters = {3: 2, 5: 3, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # anticlockwise
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def _pixels(image: Image.Image, name: str, notes: list[str] | None = None) -> np.ndarray:
    """(H, W, 3) uint8, upright, of an open image."""
    orientation, stored_bits = _orientation_after_decoding(image), _sample_bits(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels, used_bits = _eight_bit(image, stored_bits, name)
    else:
        pixels = _rgb(image)
        used_bits = stored_bits - 8 + int(pixels.max()).bit_length() if stored_bits > 8 else 0
    if notes is not None and stored_bits == 16 and 0 < used_bits <= DARK_BITS:
        notes.append(
            f"its 16-bit samples use only {used_bits} bits, so it becomes dark: 16-bit samples are always divided by "
            f"256. If its range is smaller, multiply its samples (by at most {1 << (16 - used_bits)}) and save it"
        )
    return _upright(pixels, orientation)


def _sample_bits(image: Image.Image) -> int:
    """Return the bits per sample in the file, at least 8."""
    if image.format == "TIFF":
        return max(8, *image.tag_v2.get(_TIFF_BITS, (1,)))  # type: ignore[attr-defined]
    tiles = getattr(image, "tile", None)
    stored_as = str(tiles[0][3]) if tiles else ""
    return 16 if image.mode.startswith("I") or (";16" in stored_as and "BGR" not in stored_as) else 8


def _rgb(image: Image.Image) -> np.ndarray:
    """Convert to (H, W, 3) uint8; large images in strips, to avoid a second copy."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if height <= rows:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(strip.convert("RGB"))
    return pixels


def _eight_bit(image: Image.Image, stored_bits: int, name: str) -> tuple[np.ndarray, int]:
    """Convert a grey image of more than 8 bits to (H, W, 3) uint8; also return the bits of its largest value."""
    values = np.asarray(image)
    # 32-bit integers from PNG and PPM are 16-bit samples in the file.
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        raise DataError(
            f"The image '{name}' has {'floating point' if image.mode == 'F' else 'signed or 32-bit integer'} samples "
            f"from {values.min()} to {values.max()}, which have no fixed range that could be scaled to 8 bits. "
            f"Convert it to 8 or 16 bits (unsigned) with the desired range."
        )
    grey = (values >> (stored_bits - 8)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), int(values.max()).bit_length()


def _looks_truncated(path: Path) -> bool:
    """Return whether a JPEG or PNG lacks its end marker."""
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
        f"The image '{path}' cannot be decoded: it is truncated or damaged ({error or type(error).__name__}). Get a "
        f"complete copy of the file, or remove it."
    )
