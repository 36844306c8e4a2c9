import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from detkit.data.image import check_image, image_size, read_image, rgb_uint8
from detkit.errors import DataError

EXIF_ORIENTATION = 0x0112


def gradient(height=24, width=40):
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width)
    values[..., 1] = np.linspace(0, 255, height)[:, None]
    return values


def save_rotated(path, values, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(values).save(path, exif=exif, quality=95)


def test_colours_are_rgb(tmp_path):
    values = gradient()
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), values)
    assert image_size(str(tmp_path / "a.png")) == (24, 40)


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""By Exif orientation: the stored pixels to the upright ones."""
SAVED = {
    "jpeg": ("jpg", {"quality": 100, "subsampling": 0}),
    "png": ("png", {}),
    "tiff": ("tif", {}),
    "tiff_lzw": ("tif", {"compression": "tiff_lzw"}),
    "tiff_jpeg": ("tif", {"compression": "jpeg", "quality": 100}),
    "webp": ("webp", {"lossless": True}),
    "avif": ("avif", {"quality": 100, "subsampling": "4:4:4"}),
}


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("kind", SAVED)
def test_every_orientation_is_applied_once(tmp_path, kind, mode):
    suffix, options = SAVED[kind]
    if mode == "I;16" and kind not in {"png", "tiff", "tiff_lzw"}:
        pytest.skip("the format has no 16 bits")
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    values = np.array(Image.fromarray(gradient()).convert("L" if mode == "I;16" else mode))
    stored = values.astype(np.uint16) * 257 if mode == "I;16" else values
    for orientation, turn in TURNED.items():
        path = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.fromarray(stored).save(path, exif=exif, **options)
        expected = np.array(Image.fromarray(np.ascontiguousarray(turn(values))).convert("RGB")).astype(int)
        pixels = read_image(path)
        assert np.abs(pixels.astype(int) - expected).max() <= (0 if suffix in {"png", "webp"} else 8), orientation
        assert image_size(path) == check_image(path, False) == check_image(path, True) == pixels.shape[:2]


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_unknown_orientation_turns_nothing(tmp_path, orientation):
    save_rotated(tmp_path / "a.jpg", gradient(), orientation)
    assert read_image(tmp_path / "a.jpg").shape[:2] == image_size(tmp_path / "a.jpg") == (24, 40)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, rows, *extra, late=()):
    """A PNG with chunks before and behind its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    chunks = [header, *extra, png_chunk(b"IDAT", zlib.compress(rows)), *late, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_exif_data_behind_the_pixels_of_a_png_count(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    rows = b"\0\x10\x20\x30"
    for name, content in [
        ("late", png(3, 1, 8, 0, rows, late=[chunk])),
        ("text behind it", png(3, 1, 8, 0, rows, late=[chunk, png_chunk(b"tEXt", b"a\0" + b"eXIf" * 1000)])),
    ]:
        (tmp_path / f"{name}.png").write_bytes(content)
        image = read_image(tmp_path / f"{name}.png")
        expected = (3, 1) if name == "late" else image.shape[:2]  # a false mark hides it; sizes must agree all the same
        assert image.shape[:2] == image_size(tmp_path / f"{name}.png") == expected


BROKEN_EXIF = [b"", b"MM", b"garbage" * 9, b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", BROKEN_EXIF, ids=range(len(BROKEN_EXIF)))
def test_broken_exif_data_are_ignored_where_the_pixels_are_whole(tmp_path, exif):
    (tmp_path / "before.png").write_bytes(png(3, 2, 8, 0, b"\0\1\2\3" * 2, png_chunk(b"eXIf", exif)))
    (tmp_path / "behind.png").write_bytes(png(3, 2, 8, 0, b"\0\1\2\3" * 2, late=[png_chunk(b"eXIf", exif)]))
    raw = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 9\nzzzz"))
    (tmp_path / "raw.png").write_bytes(png(3, 2, 8, 0, b"\0\1\2\3" * 2, raw))
    for name in ("before", "behind", "raw"):
        assert read_image(tmp_path / f"{name}.png")[..., 0].tolist() == [[1, 2, 3]] * 2
        assert check_image(tmp_path / f"{name}.png", True) == (2, 3)
    for suffix in ("jpg", "webp"):
        Image.fromarray(gradient()).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + exif)
        assert read_image(tmp_path / f"a.{suffix}").shape == (24, 40, 3)
        assert image_size(tmp_path / f"a.{suffix}") == (24, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in {"CMYK", "YCbCr"} else "a.png")
    Image.fromarray(np.full((8, 9, 3), 255, dtype=np.uint8)).convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.shape == (8, 9, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() > 250


def test_alpha_is_dropped_not_blended(tmp_path):
    values = np.full((4, 4, 4), 200, dtype=np.uint8)
    values[..., 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 200).all()


DARK = r"^its 16-bit samples use only {} bits, .*divided by 256.*multiply its samples \(by at most {}\)"


@pytest.mark.parametrize(
    ("bits", "noted"), [(8, (8, 256)), (10, (10, 64)), (12, (12, 16)), (14, (14, 4)), (15, None), (16, None)]
)
def test_unused_bits_of_sixteen_are_noted_and_never_scaled_by_the_image(tmp_path, bits, noted):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values).save(tmp_path / "grey.tif")
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in values)
    (tmp_path / "rgb.png").write_bytes(png(8, 8, 16, 2, rows))
    for name in ("grey.png", "grey.tif", "rgb.png"):
        notes: list[str] = []
        assert np.array_equal(read_image(tmp_path / name, notes=notes)[..., 0], values >> 8), name
        scanned: list[str] = []
        check_image(tmp_path / name, decode=False, notes=scanned)
        assert notes == scanned
        assert len(notes) == (noted is not None)
        assert all(re.match(DARK.format(*noted), note) for note in notes)


def test_a_black_image_and_eight_bits_are_not_noted(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "black.png")
    Image.fromarray(np.full((4, 4), 3, dtype=np.uint8)).save(tmp_path / "dark.png")
    notes: list[str] = []
    for name in ("black", "dark"):
        read_image(tmp_path / f"{name}.png", notes=notes)
    assert notes == []


def tiff(width, height, bits, samples, **tags):
    """A TIFF of one grey strip, uncompressed."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(samples)}
    entries |= {int(tag.removeprefix("tag_")): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4) + samples


def test_twelve_bits_that_a_tiff_declares_have_their_full_range(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(2, 1, 12, bytes([0xFF, 0xF8, 0x00])))  # 4095, 2048
    notes: list[str] = []
    assert read_image(tmp_path / "a.tif", notes=notes)[0, :, 0].tolist() == [255, 128]
    assert notes == []


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif' has floating point samples from 0\.5 .*to 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16])
@pytest.mark.parametrize("values", [(0, 255), (0, 65535), (7, 7), (0, 2_000_000)])
def test_integers_without_a_fixed_range_are_refused_whatever_their_values(tmp_path, dtype, values):
    pixels = np.array([values] * 2).clip(0, np.iinfo(dtype).max).astype(dtype)
    extra = {} if dtype is np.uint32 else {"tag_339": 2}
    (tmp_path / "a.tif").write_bytes(tiff(2, 2, 8 * pixels.itemsize, pixels.tobytes(), **extra))
    for read in (read_image, lambda path: check_image(path, True)):
        with pytest.raises(
            DataError, match=r"a\.tif' .*(no fixed range .*Convert it to 8 or 16 bits|cannot be decoded)"
        ):
            read(tmp_path / "a.tif")
    if dtype is np.int32:
        with pytest.raises(DataError, match="in memory' has signed or 32-bit integer samples"):
            rgb_uint8(Image.fromarray(pixels))


def test_a_pillow_image_is_converted_too():
    image = Image.fromarray(gradient()).convert("L")
    assert rgb_uint8(image).shape == (24, 40, 3)
    assert image.mode == "L"


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    for name, message in [
        ("none.jpg", r"none\.jpg' does not exist\. Give the path"),
        ("empty.jpg", r"empty\.jpg' is empty \(0 bytes\)\. Get a complete copy"),
        ("text.jpg", r"text\.jpg' is not an image .* Convert it"),
    ]:
        for read in (read_image, image_size):
            with pytest.raises(DataError, match=message):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_truncated_images_are_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}' .*(truncated|not an image).*(complete copy|Convert)"):
        check_image(path, decode=True)
    if suffix in {"jpg", "png"}:  # found without a decode of every file
        with pytest.raises(DataError, match="truncated"):
            check_image(path, decode=False)


def test_zeros_after_the_end_of_a_jpeg_are_harmless(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient()).save(path)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert check_image(path, decode=False) == (24, 40)
