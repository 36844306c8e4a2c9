"""Videos, frame by frame: read as (H, W, 3) uint8 RGB in display orientation, written as H.264."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from detkit.errors import DataError, WriteError
from detkit.io.files import make_folder, write_error

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
"""Files with these suffixes, in either case, count as videos."""
TIME_BASE = Fraction(1, 90_000)
"""The unit to which the times of written frames are rounded, as in MPEG."""
BT709, VIDEO_RANGE = 1, 1
"""H.273 codes of the colour space and range that players assume for HD video."""


def is_video(source: str | Path) -> bool:
    """Return whether `source` is a video rather than images, by its suffix; a folder never is."""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(source)


class VideoReader:
    """Reader of the frames of a video, with only a few of them in memory at a time.

    Parts that cannot be decoded are skipped and counted, since videos are often truncated and otherwise valid.

    Attributes:
        rate: frames per second; the mean for a variable rate.
        aspect: pixel aspect ratio (width / height) of the upright frames.
        expected: number of displayed frames according to the file; 0 if unknown.
        read: number of frames read so far.
        broken: number of parts that could not be decoded so far.

    Args:
        path: a video of any format that FFmpeg supports.

    Raises:
        DataError: the file is missing, empty, not a video, or cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = Path(path)
        try:
            exists = self.path.is_file()
        except (OSError, ValueError):
            exists = False
        if not exists:
            raise DataError(f"The video {str(path)!r} does not exist. Give the path of an existing file.")
        try:
            self._container = av.open(str(path), metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise DataError(
                f"The video '{path}' cannot be opened ({error.strerror}): it is not a video, or was truncated before "
                "its index was written. Get a complete copy of the file."
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"The file '{path}' has no images, only {self._container.format.long_name}. Give a video.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate: Fraction = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.aspect: Fraction = self._stream.sample_aspect_ratio or Fraction(1)
        self.expected = _shown_frames(self._stream)
        self.read = self.broken = 0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the frames, (H, W, 3) uint8 RGB; errors as for `timed`."""
        return (image for image, _ in self.timed())

    def timed(self) -> Iterator[tuple[np.ndarray, Fraction]]:
        """Iterate over the frames, (H, W, 3) uint8 RGB, with their display times in seconds from the first.

        Raises:
            DataError: no frame can be decoded.
        """
        first: Fraction | None = None
        latest = Fraction(-1)
        for frame in self._frames():
            image, turned = _upright(frame)
            if turned and not self.read:
                self.aspect = 1 / self.aspect
            time = self.read / self.rate if frame.pts is None else frame.pts * frame.time_base
            first = time if first is None else first
            # Times in damaged files may repeat or decrease; make them increasing.
            latest = time - first if time - first > latest else latest + TIME_BASE
            self.read += 1
            yield image, latest
        if not self.read:
            raise DataError(
                f"The video '{self.path}' has no frame that can be decoded. Get a complete copy of the file."
            )

    def _frames(self) -> Iterator[Any]:
        """Iterate over the frames that can be decoded, counting the parts that cannot."""
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                self.broken += 1  # the file ends in the middle of something
                packet = None
            if packet is None:
                return
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                self.broken += 1

    @property
    def problem(self) -> str:
        """Description of the parts that could not be read, for a final report; empty if there are none."""
        missing = self.expected - self.read
        parts = [f"{self.broken} parts cannot be decoded"] if self.broken else []
        parts += [f"{missing} of {self.expected} frames are missing"] if missing > 0 else []
        return f"{self.path} is broken: {', '.join(parts)}" if parts else ""


class VideoWriter:
    """Writer of an H.264 video (.mp4) with frames of one size, tagged with BT.709 colours.

    H.264 needs even sides: the last row or column of an odd side is repeated.

    Args:
        path: the file, which is replaced if it exists; its folder is created.
        rate: frames per second, for frames written without a time.
        aspect: pixel aspect ratio (width / height).
    """

    def __init__(self, path: Path, rate: Fraction, aspect: Fraction = Fraction(1)) -> None:
        self.path, self.rate, self.aspect = path, rate, aspect
        self._container: Any = None
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, also after an error, so that the frames written so far can be played."""
        if self._container is None:
            return
        self._container.mux(self._stream.encode())
        self._container.close()
        self._file.close()
        if error is None:  # otherwise this error is already being raised
            self._file.check()

    def write(self, image: np.ndarray, time: Fraction | None = None) -> None:
        """Add a frame.

        Args:
            image: (H, W, 3) uint8 RGB.
            time: its display time in seconds, after that of the previous frame; None for the next one at `rate`.

        Raises:
            DataError: its size differs from that of the previous frames.
            WriteError: the file cannot be written.
        """
        import av

        if self._container is None:
            self._open(image.shape)
        if image.shape != self._shape:
            raise DataError(
                f"The frames of '{self.path}' change their size from {self._shape[1]} x {self._shape[0]} to "
                f"{image.shape[1]} x {image.shape[0]} pixels, which a video does not support. Split the source there."
            )
        even = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p", dst_colorspace=BT709)
        frame.colorspace, frame.color_range = BT709, VIDEO_RANGE
        frame.time_base = TIME_BASE
        frame.pts = round((self._count / self.rate if time is None else time) / TIME_BASE)
        self._count += 1
        self._container.mux(self._stream.encode(frame))
        self._file.check()

    def _open(self, shape: tuple[int, ...]) -> None:
        import av

        self._file = _OutputFile(self.path)
        self._container = av.open(self._file, "w", format="mp4")
        # Almost visually lossless at a moderate size: for photographs the quality and size of x264's default preset at
        # 20, in less than half the time.
        options = {"crf": "18", "preset": "veryfast"}
        self._stream = self._container.add_stream("libx264", rate=self.rate, options=options)
        self._shape = shape
        self._stream.height, self._stream.width = (side + side % 2 for side in shape[:2])
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = TIME_BASE
        codec.sample_aspect_ratio = self.aspect
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = VIDEO_RANGE


class _OutputFile:
    """A file for FFmpeg's output that stores errors for `check`, since FFmpeg's muxer crashes after a failed write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: WriteError | None = None
        make_folder(path.parent)
        try:
            self._file = path.open("wb", buffering=0)
        except (OSError, ValueError) as error:
            raise write_error(path, error) from error

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = write_error(self.path, error)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence) if self._file.seekable() else 0

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def check(self) -> None:
        """Raise the error of an earlier write."""
        if self.error is not None:
            raise self.error


def _shown_frames(stream: Any) -> int:
    """Return the number of displayed frames of a stream, some of which an edit list may hide."""
    frames = int(stream.frames)
    if stream.duration is None or stream.average_rate is None:
        return frames
    return min(frames, round(stream.duration * stream.time_base * stream.average_rate))


def _upright(frame: Any) -> tuple[np.ndarray, bool]:
    """Rotate and mirror a frame by its display matrix to (H, W, 3); also return whether its sides are swapped.

    The matrix [[a, b], [c, d]] (ISO/IEC 14496-12, 6.2.2) maps the pixel (x, y) to (a x + c y, b x + d y).
    """
    from av.sidedata.sidedata import Type

    image: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return image, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32)
    turned = abs(b) > abs(a)
    if turned:
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]), bool(turned)
