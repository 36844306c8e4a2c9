"""Videos, frame by frame: read as (H, W, 3) uint8 RGB in the orientation in which they are shown, written as H.264."""

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
"""Files with these endings, in either case, count as videos."""
TIME_BASE = Fraction(1, 90_000)
"""The unit in which the times of written frames are rounded, as in MPEG."""
BT709, VIDEO_RANGE = 1, 1
"""The codes of H.273 for the colours that every player takes HD video to have."""


def is_video(source: str | Path) -> bool:
    """Whether `source` names a video and not images, by its ending alone; a folder is never one."""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(source)


class VideoReader:
    """The frames of a video, one after the other; at no time more than a few of them are in memory.

    Parts that cannot be decoded are skipped and counted, since videos are often cut off, and the rest of them is good.

    Attributes:
        rate: frames per second; of a video with a variable rate the mean.
        aspect: width of a pixel divided by its height, as the upright frames have it.
        expected: how many frames the file says are shown; 0 where it does not say.
        read: how many have been read so far.
        broken: how many parts of the file could not be decoded so far.

    Args:
        path: a video of any format that FFmpeg reads.

    Raises:
        DataError: the file is missing, empty, not a video, or so broken that it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = Path(path)
        try:
            exists = self.path.is_file()
        except (OSError, ValueError):
            exists = False
        if not exists:
            raise DataError(f"The video {str(path)!r} does not exist. Give the path of a file that does.")
        try:
            self._container = av.open(str(path), metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise DataError(
                f"The video '{path}' cannot be opened ({error.strerror}): it is not a video, or was cut off before "
                "its index was written. Get a whole copy of the file."
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
        """Each frame, (H, W, 3) uint8 RGB; the errors are those of `timed`."""
        return (image for image, _ in self.timed())

    def timed(self) -> Iterator[tuple[np.ndarray, Fraction]]:
        """Each frame, (H, W, 3) uint8 RGB, with the time in seconds at which it is shown, counted from the first.

        Raises:
            DataError: not a single frame can be decoded.
        """
        first: Fraction | None = None
        latest = Fraction(-1)
        for frame in self._frames():
            image, turned = _upright(frame)
            if turned and not self.read:
                self.aspect = 1 / self.aspect
            time = self.read / self.rate if frame.pts is None else frame.pts * frame.time_base
            first = time if first is None else first
            # A damaged file may repeat a time, or go back; a frame is shown after the one before it.
            latest = time - first if time - first > latest else latest + TIME_BASE
            self.read += 1
            yield image, latest
        if not self.read:
            raise DataError(f"The video '{self.path}' has no frame that can be decoded. Get a whole copy of the file.")

    def _frames(self) -> Iterator[Any]:
        """Each frame that can be decoded; the parts that cannot are counted."""
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
        """What could not be read of the video, for a report at the end; empty where all is well."""
        missing = self.expected - self.read
        parts = [f"{self.broken} parts cannot be decoded"] if self.broken else []
        parts += [f"{missing} of {self.expected} frames are missing"] if missing > 0 else []
        return f"{self.path} is broken: {', '.join(parts)}" if parts else ""


class VideoWriter:
    """Writes frames of one size to an H.264 video (.mp4), in the colours of BT.709, and says so in the file.

    H.264 needs even sides: of an odd one the last row or column is repeated.

    Args:
        path: its folder is made, and a file that is there is replaced.
        rate: frames per second, for frames that are written without a time.
        aspect: width of a pixel divided by its height.
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
        """Finish the file, also after an error: what was written until then can be watched."""
        if self._container is None:
            return
        self._container.mux(self._stream.encode())
        self._container.close()
        self._file.close()
        if error is None:  # else an error of the file is the one that ended the writing
            self._file.check()

    def write(self, image: np.ndarray, time: Fraction | None = None) -> None:
        """Add a frame.

        Args:
            image: (H, W, 3) uint8 RGB.
            time: the second at which it is shown, after that of the frame before; None for the next at `rate`.

        Raises:
            DataError: it has another size than the frames before it.
            WriteError: the file cannot be written.
        """
        import av

        if self._container is None:
            self._open(image.shape)
        if image.shape != self._shape:
            raise DataError(
                f"The frames of '{self.path}' change their size from {self._shape[1]} x {self._shape[0]} to "
                f"{image.shape[1]} x {image.shape[0]} pixels, which a video cannot. Cut the source where they do."
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
        # Close to what the eye can tell from the original, at a size that can be sent. Of photographs that is the
        # quality and the size of x264's default preset at 20, in less than half its time.
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
    """A file that FFmpeg writes to, which keeps its errors for `check`: after a write that failed on a full disk,
    FFmpeg's muxer ends the process with a segmentation fault."""

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
    """How many frames of a stream are shown: an edit list, which trims a video without cutting it, hides some."""
    frames = int(stream.frames)
    if stream.duration is None or stream.average_rate is None:
        return frames
    return min(frames, round(stream.duration * stream.time_base * stream.average_rate))


def _upright(frame: Any) -> tuple[np.ndarray, bool]:
    """The frame (H, W, 3) as its display matrix says to show it, turned and mirrored; also whether its sides have
    changed places.

    The matrix [[a, b], [c, d]] (ISO/IEC 14496-12, 6.2.2) sends the pixel (x, y) to (a x + c y, b x + d y).
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
