"""Films, frame by frame: read as (H, W, 3) uint8 RGB in the rotation in which they are shown, written as H.264."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from detkit.errors import DataError, DetkitError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
"""Files with these endings, in either case, count as films."""


def is_video(source: str | Path) -> bool:
    """Whether `source` names a film and not a picture, by its ending alone."""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES


class VideoReader:
    """The frames of a film, one after the other; at no time more than a few of them are in memory.

    What cannot be decoded is passed over and counted, since films are often cut off, and the rest of them is good.

    Attributes:
        rate: frames a second; of a film with a variable rate the mean.
        expected: how many frames the file says it has; 0 where it does not say.
        read: how many have been read so far.
        broken: how many parts of the file could not be decoded so far.

    Args:
        path: a film of any format that FFmpeg reads.

    Raises:
        DataError: the file is missing, empty, no film, or so broken that it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"The video '{path}' does not exist. Give the path of a file that does.")
        try:
            self._container = av.open(str(path))
        except av.error.FFmpegError as error:
            raise DataError(
                f"The video '{path}' cannot be opened ({error.strerror}): it is no video, or was cut off before its "
                "index was written. Get a whole copy of the file."
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(
                f"The file '{path}' has no pictures, only {self._container.format.long_name}. Give a video."
            )
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate: Fraction = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.expected = int(self._stream.frames)
        self.read = self.broken = 0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each frame, (H, W, 3) uint8 RGB.

        Raises:
            DataError: there is not one that can be decoded.
        """
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                self.broken += 1  # the file ends in the middle of something
                packet = None
            if packet is None:
                break
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self.broken += 1
                continue
            for frame in frames:
                self.read += 1
                yield _upright(frame)
        if not self.read:
            raise DataError(f"The video '{self.path}' has no frame that can be decoded. Get a whole copy of the file.")

    @property
    def problem(self) -> str:
        """What of the film could not be read, for a report at the end; empty where all is well."""
        missing = self.expected - self.read
        parts = [f"{self.broken} parts cannot be decoded"] if self.broken else []
        parts += [f"{missing} of {self.expected} frames are missing"] if missing > 0 else []
        return f"{self.path} is broken: {', '.join(parts)}" if parts else ""


class VideoWriter:
    """Writes frames of one size to an H.264 film (.mp4), in which each is shown for the same time.

    H.264 wants even sides: of an odd one the last row or column is repeated.

    Args:
        path: its folder is made, and a file that is there is replaced.
        rate: frames a second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        self._container: Any = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, also after an error: what was written until then can be watched."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()

    def write(self, image: np.ndarray) -> None:
        """Add (H, W, 3) uint8 RGB.

        Raises:
            DataError: it has another size than the frames before it.
            DetkitError: the file cannot be written.
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
        try:
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            self._container.mux(self._stream.encode(frame))
        except av.error.FFmpegError as error:
            raise DetkitError(f"The video can't be written to {self.path}: {error.strerror}.") from error

    def _open(self, shape: tuple[int, ...]) -> None:
        import av

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self.path), "w")
            # Near to what the eye can tell from the original, at a size that can be sent. Of photographs that is the
            # quality and the size of x264's default preset at 20, in less than half its time.
            options = {"crf": "18", "preset": "veryfast"}
            self._stream = self._container.add_stream("libx264", rate=self.rate, options=options)
        except (OSError, ValueError) as error:
            raise DetkitError(f"The video can't be written to {self.path}: {error}.") from error
        self._shape = shape
        self._stream.height, self._stream.width = (side + side % 2 for side in shape[:2])
        self._stream.pix_fmt = "yuv420p"


def _upright(frame: Any) -> np.ndarray:
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))) if frame.rotation else image
