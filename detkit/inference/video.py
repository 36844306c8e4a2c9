"""Writes the results of `detkit infer` for a video: the annotated video, and predictions.json by frame."""

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
from detkit.inference.background_io import BackgroundWriter, items_ahead
from detkit.inference.predictor import Predictor
from detkit.io.files import make_folder, replacing
from detkit.io.terminal import Console
from detkit.structures import Meta
from detkit.tasks.options import PredictOptions

Frame = tuple[np.ndarray, Fraction]
"""The pixels and the timestamp in seconds."""
READ_AHEAD, WRITE_BEHIND = 2, 1
"""Frames queued for prediction and for writing, in addition to one batch each. A frame can take 25 MB."""


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
    """Predict on every frame of a video, reading later frames and drawing and writing earlier ones in parallel.

    At most three batches and a few frames are in memory at any time. After an error or an interruption the results so
    far are valid: the video can be played, and predictions.json contains its frames.

    The video is written to `output` as .mp4, with the name, size and frame rate of the source. In predictions.json,
    `image_id` is the frame number, from 0.

    Args:
        batch: number of frames per batch.
        save_images, save_json: whether to write the video and predictions.json.
        options: prediction options.

    Returns:
        The number of sections of the video that could not be decoded; they are skipped and reported at the end.

    Raises:
        DataError: the video does not exist, or none of its frames can be read.
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
                writer.aspect = reader.aspect  # only known after the first frame has been read
                writer.write(task.draw(image, found), time)
            task.write(output, f"{stem}_{number:06d}", image, found, meta, options)
            records.add(task.records(found, meta, predictor.model.classes))
            bar.update(shown, completed=number + 1)

        number = 0
        with (
            closing(items_ahead(reader.timed(), batch + READ_AHEAD)) as images,
            BackgroundWriter(batch + WRITE_BEHIND) as background,
        ):
            for frames in _chunks(images, batch):
                found_all = predictor.run([image for image, _ in frames], options, batch)
                for (image, time), found in zip(frames, found_all):
                    background.submit(write, number, time, image, found)
                    number += 1
    if reader.problem:
        console.print(reader.problem)
    console.print(f"{number} frames, {records.count} {task.noun} -> {video if save_images else output}")
    return reader.broken


class _Records:
    """Writes a JSON list record by record, since the records of a long video could exhaust memory."""

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
        """Close the list, also after an error, so that the file is valid JSON."""
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
