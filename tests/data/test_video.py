"""Videos, read and written: against OpenCV, turned, cut off, broken, of odd size."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from detkit.data.video import VideoReader, VideoWriter, is_video
from detkit.errors import DataError, WriteError

RATE = Fraction(30000, 1001)


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves over a gradient."""
    images = []
    for number in range(count):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[..., 0] = np.linspace(0, 200, width).astype(np.uint8)
        image[..., 2] = np.linspace(200, 0, height).astype(np.uint8)[:, None]
        image[8:24, 2 + number % 30 : 18 + number % 30] = (40, 220, 60)
        images.append(image)
    return images


def write(path: Path, images: list[np.ndarray]) -> Path:
    with VideoWriter(path, RATE) as writer:
        for image in images:
            writer.write(image)
    return path


def opencv_frames(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    found = []
    while (frame := capture.read())[0]:
        found.append(frame[1][..., ::-1])
    capture.release()
    return found


def test_what_is_written_is_read_with_its_rate_and_size(tmp_path: Path) -> None:
    images = frames(40)
    path = write(tmp_path / "new" / "video.mp4", images)
    with VideoReader(path) as reader:
        found = list(reader)
    assert reader.rate == RATE
    assert reader.expected == reader.read == len(found) == 40
    assert reader.problem == ""
    for mine, original in zip(found, images):
        assert mine.dtype == np.uint8
        assert np.abs(mine.astype(int) - original).mean() < 8


def test_frames_are_those_of_opencv(tmp_path: Path) -> None:
    path = write(tmp_path / "video.mp4", frames(12))
    with VideoReader(path) as reader:
        found = list(reader)
    theirs = opencv_frames(path)
    assert len(found) == len(theirs) == 12
    for mine, other in zip(found, theirs):
        assert np.abs(mine.astype(int) - other).max() <= 6  # two conversions from YUV round differently


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_video_that_is_shown_turned_is_read_turned(tmp_path: Path, turn: int) -> None:
    """Telephones write the matrix of the track header; OpenCV applies it, too."""
    path = write(tmp_path / "video.mp4", frames(5))
    content = bytearray(path.read_bytes())
    one, zero, minus = (1 << 16).to_bytes(4), bytes(4), (-(1 << 16)).to_bytes(4, signed=True)
    last = (1 << 30).to_bytes(4)
    identity = one + zero * 3 + one + zero * 3 + last
    a, b, c, d = {90: (zero, one, minus, zero), 180: (minus, zero, zero, minus), 270: (zero, minus, one, zero)}[turn]
    start = content.index(identity, content.index(b"tkhd"))
    content[start : start + len(identity)] = a + b + zero + c + d + zero * 3 + last
    path.write_bytes(content)
    with VideoReader(path) as reader:
        found = list(reader)
    theirs = opencv_frames(path)
    assert found[0].shape == theirs[0].shape == ((48, 64, 3) if turn == 180 else (64, 48, 3))
    assert all(np.abs(mine.astype(int) - other).max() <= 6 for mine, other in zip(found, theirs, strict=True))


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (33, 51)])
def test_odd_sides_get_their_last_pixels_twice(tmp_path: Path, height: int, width: int) -> None:
    images = frames(5, height, width)
    with VideoReader(write(tmp_path / "video.mp4", images)) as reader:
        found = list(reader)
    assert found[0].shape == (height + height % 2, width + width % 2, 3)
    for mine, original in zip(found, images):
        assert np.abs(mine[:height, :width].astype(int) - original).mean() < 8


def test_a_video_with_damage_inside_is_read_on_and_the_damage_is_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(30)]
    path = write(tmp_path / "video.mp4", noise)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 2
    content[middle : middle + 4000] = bytes([255]) * 4000
    path.write_bytes(content)
    with VideoReader(path) as reader:
        found = list(reader)
    assert 0 < len(found) <= 30
    assert reader.broken > 0 or len(found) < 30
    assert str(path) in reader.problem


def test_a_video_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    """With its index in front, as on web pages; without, the file cannot be opened at all."""
    import av

    path = tmp_path / "video.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in frames(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with VideoReader(path) as reader:
        found = list(reader)
    assert 5 < len(found) < 40
    assert reader.expected == 40
    assert f"{40 - len(found)} of 40 frames are missing" in reader.problem


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"video\.mp4"):
        VideoReader(path)


def test_a_sound_has_no_images(tmp_path: Path) -> None:
    import wave

    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    with pytest.raises(DataError, match="has no images"):
        VideoReader(path)


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "video.mp4", RATE) as writer:
        writer.write(frames(1)[0])
        with pytest.raises(DataError, match="change their size from 64 x 48 to 60 x 48"):
            writer.write(frames(1, 48, 60)[0])
    assert len(opencv_frames(tmp_path / "video.mp4")) == 1


def test_endings_tell_videos_from_images() -> None:
    assert is_video("a/B.MP4")
    assert is_video(Path("c.webm"))
    assert not is_video("shots/*.jpg")
    assert not is_video("frames.mp4.png")


def replace_box(path: Path, box: bytes, change: object) -> None:
    """Rewrite the content of the first `box` of an MP4 file, its size kept."""
    content = bytearray(path.read_bytes())
    start = content.index(box) + len(box)
    end = start - 8 + int.from_bytes(content[start - 8 : start - 4], "big")
    content[start:end] = change(bytes(content[start:end]))  # type: ignore[operator]
    path.write_bytes(content)


@pytest.mark.parametrize("shown", [1, 20, 39])
def test_frames_hidden_by_an_edit_list_are_not_missing(tmp_path: Path, shown: int) -> None:
    path = write(tmp_path / "a.mp4", frames(60))
    # Version, number of edits, then the duration of the edit in milliseconds.
    duration = round(1000 * shown / RATE).to_bytes(4, "big")
    replace_box(path, b"elst", lambda edit: edit[:8] + duration + edit[12:])
    with VideoReader(path) as reader:
        found = list(reader)
    assert 0 < len(found) < 60
    assert abs(reader.expected - len(found)) <= 1
    assert "missing" not in reader.problem or reader.expected - len(found) == 1


def test_colours_are_written_as_bt709_and_read_by_their_tags(tmp_path: Path) -> None:
    import av

    color = (200, 40, 60)
    path = write(tmp_path / "a.mp4", [np.full((48, 64, 3), color, dtype=np.uint8)] * 3)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
        # Y of BT.709 in 16..235, computed from the standard.
        luma = 16 + 219 * (0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]) / 255
        assert abs(frame.to_ndarray()[10, 10] - luma) <= 2
    with VideoReader(path) as reader:
        assert np.abs(next(iter(reader)).astype(int) - color).max() <= 3


@pytest.mark.parametrize("space", [1, 5])
def test_the_matrix_of_the_source_is_used(tmp_path: Path, space: int) -> None:
    import av

    color, path = (200, 40, 60), tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = space
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), color, dtype=np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=space)
        frame.colorspace, frame.pts = space, 0
        container.mux([*stream.encode(frame), *stream.encode()])
    with VideoReader(path) as reader:
        read = list(reader)
    again = write(tmp_path / "b.mp4", read)
    with VideoReader(again) as reader:
        assert np.abs(next(iter(reader)).astype(int) - color).max() <= 5


ONE, ZERO, MINUS = (1 << 16).to_bytes(4, "big"), bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((MINUS, ZERO, ZERO, ONE), lambda image: image[:, ::-1]),
        ((ONE, ZERO, ZERO, MINUS), lambda image: image[::-1]),
        ((ZERO, ONE, ONE, ZERO), lambda image: image.swapaxes(0, 1)),
        ((ZERO, MINUS, MINUS, ZERO), lambda image: image[::-1, ::-1].swapaxes(0, 1)),
        ((ZERO, ONE, MINUS, ZERO), lambda image: np.rot90(image, -1)),
    ],
)
def test_a_mirrored_video_is_read_as_it_is_shown(tmp_path: Path, matrix: tuple[bytes, ...], expected: object) -> None:
    with VideoWriter(tmp_path / "a.mp4", RATE, Fraction(2)) as writer:
        for image in frames(3):
            writer.write(image)
    with VideoReader(tmp_path / "a.mp4") as reader:
        plain = list(reader)
        assert reader.aspect == 2
    a, b, c, d = matrix
    last = (1 << 30).to_bytes(4, "big")
    replace_box(tmp_path / "a.mp4", b"tkhd", lambda box: box[:40] + a + b + ZERO + c + d + ZERO * 3 + last + box[76:])
    with VideoReader(tmp_path / "a.mp4") as reader:
        found = list(reader)
        assert reader.aspect == (Fraction(1, 2) if a == ZERO else 2)
    for image, upright in zip(plain, found, strict=True):
        np.testing.assert_array_equal(upright, expected(image))  # type: ignore[operator]


def test_metadata_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "XXXXXXXX"
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames(1)[0], format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"XXXXXXXX", b"\xff\xfe\xe9\x80XXXX"))
    with VideoReader(path) as reader:
        assert len(list(reader)) == 1


@pytest.mark.parametrize("name", ["a\0b.mp4", "x" * 300 + ".mp4", "missing.mp4", "."])
def test_a_path_without_a_video_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        VideoReader(tmp_path / name)


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    with pytest.raises(WriteError, match=r"a\.mp4' cannot be written: No space left on device"):
        write(tmp_path / "a.mp4", [noise] * 50)
