"""Files that were damaged, or made to do harm: each ends in a DataError that names it, within bounds of memory."""

import io
import os
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data import image as module
from detkit.data.image import check_image, image_size, open_image, read_image
from detkit.errors import ConfigError, DataError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
FOREIGN = {
    "eps": EPS,
    "dos_eps": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
    "emf": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "mpeg": b"\0\0\1\xb3" + b"\x10" * 100,
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "grib": b"GRIB\0\0\0\1" + bytes(100),
    "dds": b"DDS \x7c\0\0\0" + bytes(120),
    "icns": b"icns\0\0\0\x20" + bytes(24),
    "ico": b"\0\0\1\0\1\0" + bytes(16),
    "psd": b"8BPS\0\1" + bytes(100),
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "xpm": b"/* XPM */\nstatic char *a[] = {}",
    "html": b"<html></html>",
    "zero": bytes(1000),
}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def zeros(count):
    """`count` zeros, compressed."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(min(10**6, count - done))) for done in range(0, count, 10**6))
    return packed + packer.flush()


def png(width, height, bits, colour, packed, *extra):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *extra, chunk(b"IDAT", packed), chunk(b"IEND", b"")])


def encoded(kind, size=(48, 32), **options):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tga", ".eps", ""])
@pytest.mark.parametrize("kind", FOREIGN)
def test_formats_that_are_not_on_the_list_start_nothing(tmp_path, monkeypatch, kind, suffix):
    canary = tmp_path / "started"
    for program in ("gs", "gswin64c", "gswin32c", "xv", "display", "convert"):
        script = tmp_path / "bin" / program
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\ntouch '{canary}'\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    if (kind, suffix) == ("mpeg", ".tga"):
        pytest.skip("these bytes happen to be those of a TGA")
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(FOREIGN[kind])
    for read in (read_image, image_size, lambda path: check_image(path, True)):
        with pytest.raises(DataError, match=f"photo{suffix}' (is not an image|cannot be decoded)"):
            read(path)
    assert not canary.exists()


def test_a_zip_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jpg", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(DataError, match=r"a\.jpg' is not an image"):
        read_image(tmp_path / "a.jpg")


def test_the_content_decides_and_not_the_ending(tmp_path):
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM"):
        (tmp_path / "a.jpg").write_bytes(encoded(kind))
        assert read_image(tmp_path / "a.jpg").shape == (32, 48, 3), kind
    for suffix in ("tga", "VST"):
        (tmp_path / f"a.{suffix}").write_bytes(encoded("TGA"))
        assert read_image(tmp_path / f"a.{suffix}").shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (6, 4), (shade, shade, shade)) for shade in (40, 200, 90)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    assert abs(int(read_image(tmp_path / "a")[0, 0, 0]) - 40) < 3


def bmp(width, height, runs):
    """A BMP of run lengths."""
    head = b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(1024) + runs


def tiff(width, height, packed, **tags):
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    entries |= {int(tag.removeprefix("tag_")): value for tag, value in tags.items()}
    tiled = 322 in entries
    entries |= {325 if tiled else 279: len(packed), 324 if tiled else 273: 8 + 2 + 12 * (len(entries) + 2) + 4}
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4) + packed


def huge_gif():
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def huge_jpeg():
    content = bytearray(encoded("JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 65535, 65535)
    return bytes(content)


def huge_webp():
    content = bytearray(encoded("WEBP"))
    start = content.index(b"VP8 ") + 14
    content[start : start + 4] = struct.pack("<HH", 16383, 16383)
    return bytes(content)


def many_scans():
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 500 + b"\xff\xd9"


# 13376 x 13376 pixels stay below Pillow's own limit.
TOO_LARGE = {
    "grey of 1 bit": lambda: png(13376, 13376, 1, 0, zeros(13376 * 1673)),
    "header of a PNG": lambda: png(2**31 - 1, 2**31 - 1, 8, 2, zeros(100)),
    "one row": lambda: png(2**31 - 1, 1, 1, 0, zeros(100)),
    "GIF": huge_gif,
    "JPEG": huge_jpeg,
    "WebP": huge_webp,
    "PPM": lambda: b"P6 99999 99999 255\n" + bytes(100),
    "tile of a TIFF": lambda: tiff(16, 16, zeros(10**6), tag_322=60000, tag_323=60000),
    "TIFF": lambda: tiff(2**31, 2**31, zeros(1000), tag_278=2**31),
    "run lengths that skip rows": lambda: bmp(100_000_000, 1, b"\0\2\0\xff" * 4),
}
HARMFUL = {
    "scans": many_scans,
    "text": lambda: png(4, 4, 8, 0, zeros(20), *[chunk(b"zTXt", b"%d\0\0" % i + zeros(10**6 - 9)) for i in range(80)]),
    "long text": lambda: png(4, 4, 8, 0, zeros(20), chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(10**8))),
    "profile": lambda: png(4, 4, 8, 0, zeros(20), chunk(b"iCCP", b"a\0\0" + zeros(10**8))),
}
MEASURED = """
import re, sys
sys.path.insert(0, {root!r})
from detkit.data.image import check_image, image_size, read_image
from detkit.errors import DataError
readers = (image_size, read_image, lambda path: check_image(path, False), lambda path: check_image(path, True))
for read in readers[: int(sys.argv[2])]:
    try:
        print(read(sys.argv[1]) is not None)
    except DataError as error:
        print(error)
# Not ru_maxrss, which a process inherits from the one that started it.
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def measured(path, readers=4):
    """The answers of up to four readers of a file in a process of their own, and megabytes at its peak."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    code = MEASURED.format(root=str(Path(module.__file__).parents[2]))
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), str(readers)], capture_output=True, text=True, check=True
    )
    assert not result.stderr
    *said, peak = result.stdout.splitlines()
    return said, int(peak) / 1000


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_what_would_take_too_much_memory_is_refused_from_its_header(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(TOO_LARGE[kind]())
    said, peak = measured(tmp_path / "a.png")
    assert peak < 150
    for message in said:
        assert "a.png" in message
        assert "DETKIT_IMAGE_GB" in message or "cannot be decoded" in message
    if kind == "grey of 1 bit":
        assert "has 179 megapixels (13376 x 13376) and takes about 1.3 GB" in said[0]
        assert "the limit of 0.8 GB" in said[0]


@pytest.mark.parametrize("kind", HARMFUL)
def test_harmful_content_is_refused(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(HARMFUL[kind]())
    said, peak = measured(tmp_path / "a.png")
    assert peak < 200
    assert "a.png" in said[1]
    assert "a.png" in said[3]


def test_the_largest_image_within_the_limit_is_read_in_under_a_gigabyte(tmp_path):
    (tmp_path / "a.png").write_bytes(png(11000, 10200, 8, 0, zeros(11001 * 10200)))
    said, peak = measured(tmp_path / "a.png", readers=2)
    assert said == ["True"] * 2
    assert peak < 1000


def test_the_limit_is_raised_and_lowered_by_its_variable(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG", size=(500, 400)))
    monkeypatch.setenv("DETKIT_IMAGE_GB", "0.001")
    with pytest.raises(DataError, match=r"500 x 400.*limit of 0\.001 GB.*variable DETKIT_IMAGE_GB=0\.2\."):
        read_image(tmp_path / "a.png")
    monkeypatch.setenv("DETKIT_IMAGE_GB", "0.2")
    assert read_image(tmp_path / "a.png").shape == (400, 500, 3)
    for wrong in ("", "many", "0", "-1", "nan"):
        monkeypatch.setenv("DETKIT_IMAGE_GB", wrong)
        with pytest.raises(ConfigError, match="DETKIT_IMAGE_GB must be a number of gigabytes above 0"):
            image_size(tmp_path / "a.png")


def test_a_raised_limit_goes_beyond_that_of_pillow(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(module, "PLAIN_BYTES", 70_000)
    monkeypatch.setenv("DETKIT_IMAGE_GB", "20")
    for kind in ("PNG", "TIFF", "GIF", "WEBP"):
        (tmp_path / "a").write_bytes(encoded(kind, size=(500, 400)))
        assert read_image(tmp_path / "a").shape == (400, 500, 3)
    assert not recwarn.list


def test_threads_decode_together_what_fits_into_the_limit(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG", size=(1000, 1000)))  # 0.007 GB
    at_work, most, lock = 0, 0, threading.Lock()
    inner = module.read_image

    def counting(*arguments, **options):
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        try:
            return inner(*arguments, **options)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(module, "read_image", counting)
    monkeypatch.setenv("DETKIT_IMAGE_GB", "0.015")
    threads = [threading.Thread(target=check_image, args=(tmp_path / "a.png", True)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 2
    with pytest.raises(DataError):  # an error gives its part back
        check_image(tmp_path / "none.png", True)
    assert module._DECODING._taken == []


SUFFIXES = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "BMP": "bmp", "GIF": "gif", "WEBP": "webp", "JPEG2000": "jp2"}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", [*SUFFIXES, "PPM", "TGA"])
def test_damage_anywhere_ends_in_pixels_or_an_error_that_names_the_file(tmp_path, kind):
    whole = encoded(kind, size=(24, 16))
    path = tmp_path / f"a.{SUFFIXES.get(kind, kind.lower())}"
    random = np.random.default_rng(0)
    for trial in range(300):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            content[random.integers(0, len(content) if trial % 2 else 60)] = random.integers(0, 256)
        if trial % 5 == 0:
            del content[random.integers(0, len(content)) :]
        path.write_bytes(content)
        try:
            size, message = image_size(path), path.name
            assert read_image(path).shape == (*size, 3)
        except DataError as error:
            message = str(error)
        assert path.name in message


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("damage", ["start", "cut"])
def test_a_file_cut_short_or_damaged_at_its_start_is_named(tmp_path, kind, damage):
    content = encoded(kind)
    path = tmp_path / f"a.{SUFFIXES[kind]}"
    path.write_bytes(content[: len(content) // 3] if damage == "cut" else b"\xff" * 20 + content[20:])
    with pytest.raises(DataError, match=rf"a\.{SUFFIXES[kind]}'"):
        read_image(path)


@pytest.mark.parametrize(
    "error", [SyntaxError, KeyError, AssertionError, MemoryError, RecursionError, zlib.error, AttributeError]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, error):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    with pytest.raises(DataError, match=r"a\.png' cannot be decoded"), open_image(tmp_path / "a.png"):
        raise error("reason")


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300 + ".png", "folder", "pipe", "gone"])
def test_paths_that_are_not_files_are_errors(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="does not exist"):
            read(f"{tmp_path}/{name}")


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xe9.png")
    path.write_bytes(encoded("PNG"))
    assert read_image(path).shape == (32, 48, 3)
    path.write_bytes(encoded("PNG")[:100])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(path)
