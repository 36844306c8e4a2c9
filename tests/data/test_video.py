"""Films, read and written: against OpenCV, turned, cut off, broken, of odd size."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from detkit.data.video import VideoReader, VideoWriter, is_video
from detkit.errors import DataError

RATE = Fraction(30000, 1001)


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves over a gradient."""
    pictures = []
    for number in range(count):
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        picture[..., 0] = np.linspace(0, 200, width).astype(np.uint8)
        picture[..., 2] = np.linspace(200, 0, height).astype(np.uint8)[:, None]
        picture[8:24, 2 + number % 30 : 18 + number % 30] = (40, 220, 60)
        pictures.append(picture)
    return pictures


def write(path: Path, pictures: list[np.ndarray]) -> Path:
    with VideoWriter(path, RATE) as writer:
        for picture in pictures:
            writer.write(picture)
    return path


def opencv_frames(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    found = []
    while (frame := capture.read())[0]:
        found.append(frame[1][..., ::-1])
    capture.release()
    return found


def test_what_is_written_is_read_with_its_rate_and_size(tmp_path: Path) -> None:
    pictures = frames(40)
    path = write(tmp_path / "new" / "film.mp4", pictures)
    with VideoReader(path) as reader:
        found = list(reader)
    assert reader.rate == RATE
    assert reader.expected == reader.read == len(found) == 40
    assert reader.problem == ""
    for mine, original in zip(found, pictures):
        assert mine.dtype == np.uint8
        assert np.abs(mine.astype(int) - original).mean() < 8


def test_frames_are_those_of_opencv(tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", frames(12))
    with VideoReader(path) as reader:
        found = list(reader)
    theirs = opencv_frames(path)
    assert len(found) == len(theirs) == 12
    for mine, other in zip(found, theirs):
        assert np.abs(mine.astype(int) - other).max() <= 6  # two conversions from YUV round differently


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_film_that_is_shown_turned_is_read_turned(tmp_path: Path, turn: int) -> None:
    """Telephones write the matrix of the track header; OpenCV applies it, too."""
    path = write(tmp_path / "film.mp4", frames(5))
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
    pictures = frames(5, height, width)
    with VideoReader(write(tmp_path / "film.mp4", pictures)) as reader:
        found = list(reader)
    assert found[0].shape == (height + height % 2, width + width % 2, 3)
    for mine, original in zip(found, pictures):
        assert np.abs(mine[:height, :width].astype(int) - original).mean() < 8


def test_a_film_with_damage_inside_is_read_on_and_the_damage_is_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(30)]
    path = write(tmp_path / "film.mp4", noise)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 2
    content[middle : middle + 4000] = bytes([255]) * 4000
    path.write_bytes(content)
    with VideoReader(path) as reader:
        found = list(reader)
    assert 0 < len(found) <= 30
    assert reader.broken > 0 or len(found) < 30
    assert str(path) in reader.problem


def test_a_film_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    """With its index in front, as on web pages; without, the file cannot be opened at all."""
    import av

    path = tmp_path / "film.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in frames(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with VideoReader(path) as reader:
        found = list(reader)
    assert 5 < len(found) < 40
    assert reader.expected == 40
    assert f"{40 - len(found)} of 40 frames are missing" in reader.problem


@pytest.mark.parametrize("content", [b"", b"no film at all", None])
def test_what_is_no_film_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "film.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"film\.mp4"):
        VideoReader(path)


def test_a_sound_has_no_pictures(tmp_path: Path) -> None:
    import wave

    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    with pytest.raises(DataError, match="has no pictures"):
        VideoReader(path)


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "film.mp4", RATE) as writer:
        writer.write(frames(1)[0])
        with pytest.raises(DataError, match="change their size from 64 x 48 to 60 x 48"):
            writer.write(frames(1, 48, 60)[0])
    assert len(opencv_frames(tmp_path / "film.mp4")) == 1


def test_endings_tell_films_from_pictures() -> None:
    assert is_video("a/B.MP4")
    assert is_video(Path("c.webm"))
    assert not is_video("shots/*.jpg")
    assert not is_video("frames.mp4.png")
