"""What `detkit infer` writes of a video: the video with what was found on it, and predictions.json by frame."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detkit.data.video import VideoReader, VideoWriter
from detkit.inference.background_io import Behind, items_ahead
from detkit.inference.predictor import Predictor
from detkit.io.files import make_folder, replacing
from detkit.io.terminal import Console
from detkit.structures import Meta
from detkit.tasks.options import PredictOptions

Frame = tuple[np.ndarray, Fraction]
"""The pixels and the time in seconds."""
READ_AHEAD, WRITE_BEHIND = 2, 1
"""Frames that wait to be predicted and to be written, beyond a batch of each. Those of a large video have 25 MB."""


def infer_video(
    predictor: Predictor,
    source: str,
    output: Path,
    *,
    batch: int,
    save_images: bool,
    save_json: bool,
    options: PredictOptions,
) -> int:
    """Predict on every frame of a video, while those behind it are read and those before it drawn and written.

    At no time more than three batches and a few frames are in memory. What was written before an error or an
    interruption is whole: the video can be watched, and predictions.json has its frames.

    The video is written to `output` under its own name as .mp4, in its own size and rate. In predictions.json
    `image_id` is the number of the frame, from 0.

    Args:
        batch: frames that go through the network together.
        save_images, save_json: write the video; write predictions.json.
        options: of the prediction.

    Returns:
        How many parts of the video could not be decoded; they are passed over, and said so at the end.

    Raises:
        DataError: there is no such video, or none of its frames can be read.
    """
    console = Console()
    task, stem = predictor.task, Path(source).stem
    video = output / f"{stem}.mp4"
    with (
        VideoReader(source) as reader,
        VideoWriter(video, reader.rate, reader.aspect) as writer,
        _Records(output / "predictions.json" if save_json else None) as records,
        _bar(console) as bar,
    ):
        shown = bar.add_task("predicting", total=reader.expected or None)

        def write(number: int, time: Fraction, image: np.ndarray, found: Any) -> None:
            meta = Meta(number, f"{source}, frame {number}", (image.shape[0], image.shape[1]))
            if save_images:
                writer.aspect = reader.aspect  # known once the first frame has been read
                writer.write(task.draw(image, found), time)
            task.write(output, f"{stem}_{number:06d}", image, found, meta, options)
            records.add(task.records(found, meta, predictor.model.classes))
            bar.update(shown, completed=number + 1)

        number = 0
        with closing(items_ahead(reader.timed(), batch + READ_AHEAD)) as images, Behind(batch + WRITE_BEHIND) as behind:
            for frames in _chunks(images, batch):
                found_all = predictor.run([image for image, _ in frames], options, batch)
                for (image, time), found in zip(frames, found_all):
                    behind.submit(write, number, time, image, found)
                    number += 1
    if reader.problem:
        console.print(reader.problem)
    console.print(f"{number} frames, {records.count} {task.noun} -> {video if save_images else output}")
    return reader.broken


class _Records:
    """Writes a JSON list record by record: those of a long video would fill the memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = 0

    def __enter__(self) -> "_Records":
        if self.path is not None:
            make_folder(self.path.parent)
            self._replacing = replacing(self.path, "w")
            self._file = self._replacing.__enter__()
            self._file.write("[")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the list, also after an error: what was written until then is whole."""
        if self.path is not None:
            self._file.write("]")
            self._replacing.__exit__(None, None, None)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            if self.path is not None:
                self._file.write(f"{', ' if self.count else ''}{json.dumps(record)}")
            self.count += 1


def _chunks(frames: Iterator[Frame], count: int) -> Iterator[list[Frame]]:
    while chunk := list(islice(frames, count)):
        yield chunk


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
