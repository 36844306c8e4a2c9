"""Reading images: the only module that opens an image file.

Pixels are always (H, W, 3) uint8 RGB, turned upright by the orientation that the file states. Every failure is a
DataError that names the file. A file is opened by its content and only by the decoders of FORMATS: Pillow knows some
that start other programs (EPS starts Ghostscript) and some that were never meant for files of strangers.
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
"""Pillow's names of the formats that are read. All are decoded within the process by libraries or plain loops."""
TGA_SUFFIXES = frozenset({".icb", ".tga", ".vda", ".vst"})
"""TGA has no magic number, so that almost anything could pass for it: only files with these endings are tried."""
IMAGE_SUFFIXES = TGA_SUFFIXES | {
    ".apng", ".avif", ".avifs", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg",
    ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Files with these endings, in either case, count as images when a folder is searched."""

MEMORY_LIMIT = 0.8
"""Gigabytes that decoding one image may take, and all that a scan decodes at the same time; see MEMORY_VARIABLE."""
MEMORY_VARIABLE = "DETKIT_IMAGE_GB"
"""The environment variable that replaces MEMORY_LIMIT."""
PLAIN_BYTES = 7
"""Bytes that a pixel takes at the peak of decoding to RGB: Pillow's 4 and the result's 3."""
FORMAT_BYTES = {"TIFF": 10, "WEBP": 19, "AVIF": 13, "JPEG2000": 20}
"""Likewise, measured, of formats that are decoded by way of buffers of their own."""
PROGRESSIVE_BYTES = 11
"""Likewise of a progressive JPEG, whose coefficients are kept until the last scan."""
LARGEST_SCAN_COUNT = 40
"""Scans of a progressive JPEG, each of which goes over all pixels. Encoders write about 10."""
DARK_BITS = 14
"""An image of 16-bit samples that uses no more bits than these comes out at a quarter of the brightness or less."""

_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 258, 322, 323
_JPEG = b"\xff\xd8\xff"  # the first bytes
_SIDEWAYS = frozenset({5, 6, 7, 8})  # the orientations that exchange width and height
_STRIP_PIXELS = 2_000_000  # converted at a time
_TAIL_BYTES = 65536
for _module in ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    with suppress(ImportError):  # AVIF came with Pillow 11.3
        import_module(f"PIL.{_module}ImagePlugin")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, with only its header read, for the length of a `with` block.

    The block should only hold what decodes the image: any exception in it counts as damage of the file. The first
    frame of an animation is what Pillow then decodes.

    Raises:
        DataError: the file is missing, empty, cut off, damaged, not an image of FORMATS, or would take more memory
            than MEMORY_LIMIT.
        ConfigError: the environment variable MEMORY_VARIABLE is not a positive number.
    """
    if not os.path.isfile(path):
        raise DataError(f"The image '{path}' does not exist. Give the path of a file that does.")
    # For files that were damaged or made to do harm Pillow's decoders raise nearly every exception there is.
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
    """The pixels of an image.

    Grey, palette and CMYK images become RGB; transparency is dropped, not blended; of an animation, the first frame
    is taken. Of 16-bit samples the upper 8 bits are kept, whatever their values, so that images stay comparable:
    files that use only 12 of the 16 bits come out nearly black, which `notes` tells. (Neither PNG's sBIT nor TIFF's
    MaxSampleValue say otherwise: by their specifications samples are scaled to all bits, and the latter is for
    statistics only.) A TIFF that stores 12 bits a sample has its full range.

    Args:
        path: any format of FORMATS, whatever its ending.
        reduction: 1, 2, 4 or 8: a JPEG is decoded at so small a fraction of its sides, which are rounded up, in a part
            of the time; each pixel is about the mean of those that it stands for. Other formats keep their size.
        notes: a list that remarks are added to, on an image that can be read but is hardly what is wanted.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: as `open_image`; or the pixels are of a kind with no fixed range (32-bit, signed, floating point).
    """
    with open_image(path) as image:
        if image.info.get("progressive"):
            _check_scans(image, path)
        if reduction > 1:
            image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
        return _pixels(image, str(path), notes)


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
        image.load()
        return _pixels(image, name)
    except DetkitError:
        raise
    except Exception as error:
        raise _undecodable(name, error) from error


def stored_values(image: Image.Image) -> np.ndarray:
    """The samples of an open image as its file has them, upright: of a palette the indices."""
    orientation = _orientation_after_decoding(image)
    return _upright(np.array(image), orientation)


def resized(image: np.ndarray, longer_side: int) -> np.ndarray:
    """(H, W, 3) uint8 with the longer side brought to so many pixels, the aspect ratio kept; Lanczos."""
    factor = longer_side / max(image.shape[:2])
    width, height = (max(1, round(factor * side)) for side in (image.shape[1], image.shape[0]))
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels of an image as `read_image` gives it, from the header of the file alone.

    Raises:
        DataError: as `open_image`.
    """
    with open_image(path) as image:
        return _upright_size(image)


def exchanges_sides(path: str | Path) -> bool:
    """Whether the Exif rotation of an image exchanges its width and height.

    Raises:
        DataError: as `image_size`.
    """
    with open_image(path) as image:
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
        raise DataError(f"The image '{path}' cannot be read ({error.strerror}). Check its permissions.") from error


def check_image(path: str | Path, decode: bool, notes: list[str] | None = None) -> tuple[int, int]:
    """(height, width) in pixels of an image that is whole.

    Several threads may check images at once: together they decode no more than fits into MEMORY_LIMIT.

    Args:
        path: an image.
        decode: decode all of it. Otherwise only where its last bytes look cut off, which costs one look at the
            end of a JPEG or PNG and does not find damage in the middle. (Of a JPEG even a decode finds only what
            libjpeg does not paint over in grey.)
        notes: as for `read_image`; where it is given, images of 16-bit samples are decoded, too.

    Raises:
        DataError: as `read_image`.
    """
    with open_image(path) as image:
        size, memory = _upright_size(image), _memory(image)
        decode = decode or (notes is not None and _sample_bits(image) > 8)
    if decode or _looks_cut_off(Path(path)):
        with _DECODING.taking(memory):
            read_image(path, notes=notes)
    return size


class _Budget:
    """Gigabytes that threads share: each waits until its part is free, or until nobody else has any."""

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
    """MEMORY_LIMIT, or what the environment variable MEMORY_VARIABLE puts in its place.

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
    """The image in a file, with only its header read, by the first decoder of FORMATS that knows its first bytes.

    Image.open would do the same, but warns and refuses by a limit on pixels that belongs to the whole process.
    """
    start = file.read(16)
    if not start:
        raise DataError(f"The image '{path}' is empty (0 bytes). Get a whole copy of the file, or remove it.")
    may_be_tga = Path(path).suffix.lower() in TGA_SUFFIXES
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        # A decoder that Pillow was built without answers with a text.
        if opener is not None and (may_be_tga if accepts is None else accepts(start) is True):
            file.seek(0)
            # Without the name Pillow maps no file into memory, which goes wrong for turned TIFFs and shrinking files.
            image = opener(file, "")
            if name == "PNG" and "exif" not in image.info:
                image.info.update(_late_exif(file))
            return image
    raise DataError(
        f"The file '{path}' is not an image of a format that is read ({', '.join(FORMATS)}). Convert it to JPEG or "
        f"PNG, or remove it."
    )


def _lift_guard() -> None:
    """Let Pillow's guard against large images, which some decoders ask on their own, allow what MEMORY_LIMIT does."""
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
        f"Cut it into tiles or make it smaller; or, if you trust the file and have the memory, set the environment "
        f"variable {MEMORY_VARIABLE}={math.ceil(10 * gigabytes) / 10 + 0.1:.1f}."
    )


def _memory(image: Image.Image) -> float:
    """Gigabytes that decoding an image takes at its peak, from its header."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        # A tile is decoded whole, however little of it lies in the image.
        tags = image.tag_v2  # type: ignore[attr-defined]
        pixels = max(pixels, tags.get(_TIFF_TILE_WIDTH, 0) * tags.get(_TIFF_TILE_HEIGHT, 0))
    elif image.format == "BMP":
        pixels = max(pixels, 256 * image.width)  # run lengths may skip as many rows at once, also beyond the last
    plain = PROGRESSIVE_BYTES if image.info.get("progressive") else PLAIN_BYTES
    return pixels * FORMAT_BYTES.get(str(image.format), plain) / 1e9


def _check_scans(image: Image.Image, path: str | Path) -> None:
    file = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    if scans > LARGEST_SCAN_COUNT:
        raise DataError(
            f"The image '{path}' is a progressive JPEG with {scans:,} scans, of which each takes as long as an image; "
            f"at most {LARGEST_SCAN_COUNT} are decoded. Save it again as an ordinary JPEG, or remove it."
        )


def _late_exif(file: IO[bytes]) -> dict[str, bytes]:
    """Exif data behind the pixels of a PNG, where some tools put them and Pillow finds them only by decoding."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = file.read()
    file.seek(position)
    start = tail.rfind(b"eXIf")
    end = start + 4 + int.from_bytes(tail[max(0, start - 4) : max(0, start)])
    whole = start >= 4 and zlib.crc32(tail[start:end]).to_bytes(4) == tail[end : end + 4]
    return {"exif": b"Exif\0\0" + tail[start + 4 : end]} if whole else {}


def _orientation(image: Image.Image) -> int:
    """The orientation 1..8 that the file states; 1 where it states none, or its Exif data are damaged."""
    try:
        # PNG's own method decodes the image to look for Exif data behind its pixels.
        orientation = int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    except Exception:  # the pixels may be whole
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _orientation_after_decoding(image: Image.Image) -> int:
    """The orientation in which the decoded pixels are: of a TIFF Pillow turns them itself."""
    return 1 if image.format == "TIFF" else _orientation(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image that is not decoded yet."""
    width, height = image.size
    if image.format == "TIFF":  # whose `size` is that of the stored pixels or the upright one, by Pillow's version
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) turned and mirrored as an Exif orientation 1..8 asks for."""
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
            f"its 16-bit samples use only {used_bits} bits, so that it comes out dark: 16 bits are always divided by "
            f"256. If its range is smaller, multiply its samples ({1 << (16 - used_bits)} times at most) and save it"
        )
    return _upright(pixels, orientation)


def _sample_bits(image: Image.Image) -> int:
    """Bits of a sample in the file: 8 for all up to 8, too."""
    if image.format == "TIFF":
        return max(8, *image.tag_v2.get(_TIFF_BITS, (1,)))  # type: ignore[attr-defined]
    tiles = getattr(image, "tile", None)
    stored_as = str(tiles[0][3]) if tiles else ""
    return 16 if image.mode.startswith("I") or (";16" in stored_as and "BGR" not in stored_as) else 8


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; a large image is converted in strips, to need no second copy of it."""
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
    """A grey image of more than 8 bits as (H, W, 3) uint8, and how many bits its largest value uses."""
    values = np.asarray(image)
    # Where PNG and PPM come as 32-bit integers, they are 16-bit ones of the file.
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        raise DataError(
            f"The image '{name}' has {'floating point' if image.mode == 'F' else 'signed or 32-bit integer'} samples "
            f"from {values.min()} to {values.max()}, which have no fixed range that could be brought to 8 bits. "
            f"Convert it to 8 or 16 bits (unsigned) with the range that you want."
        )
    grey = (values >> (stored_bits - 8)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), int(values.max()).bit_length()


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
        f"The image '{path}' cannot be decoded: it is cut off or damaged ({error or type(error).__name__}). Get a "
        f"whole copy of the file, or remove it."
    )
