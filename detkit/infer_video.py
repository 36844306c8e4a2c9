"""What `detkit infer` writes of a film: the film with what was found on it, and predictions.json by frame."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detkit.data.video import VideoReader, VideoWriter
from detkit.errors import DetkitError
from detkit.predict import Predictor
from detkit.types import Meta


def infer_video(
    predictor: Predictor,
    source: str,
    output: Path,
    *,
    batch: int,
    save_images: bool,
    save_json: bool,
    choices: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> int:
    """Predict on every frame of a film, holding `batch` of them in memory.

    The film is written to `output` under its own name as .mp4, in its own size and rate. In predictions.json `image_id`
    is the number of the frame, from 0.

    Args:
        batch: frames that go through the network together.
        save_images, save_json: write the film; write predictions.json.
        choices: all options of the model's task.
        limits: those that `Predictor.predict_all` takes.

    Returns:
        How many parts of the film could not be decoded; they are passed over, and said so at the end.

    Raises:
        DataError: there is no such film, or none of its frames can be read.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    task, stem = predictor.task, Path(source).stem
    film = output / f"{stem}.mp4"
    with (
        VideoReader(source) as reader,
        VideoWriter(film, reader.rate) as writer,
        _Records(output / "predictions.json" if save_json else None) as records,
        _bar(console) as bar,
    ):
        shown = bar.add_task("predicting", total=reader.expected or None)
        number = 0
        for frames in _chunks(iter(reader), batch):
            for image, found in zip(frames, predictor.predict_all(frames, batch_size=batch, **limits)):
                meta = Meta(number, f"{source}, frame {number}", (image.shape[0], image.shape[1]))
                records.add(task.records(found, meta, predictor.model.classes))
                if save_images:
                    writer.write(task.draw(image, found))
                task.write(output, f"{stem}_{number:06d}", image, found, meta, choices)
                number += 1
            bar.update(shown, completed=number)
    if reader.problem:
        console.print(reader.problem)
    console.print(f"{number} frames, {records.count} {task.noun} -> {film if save_images else output}")
    return reader.broken


class _Records:
    """Writes a JSON list record by record: those of a long film would fill the memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = 0

    def __enter__(self) -> "_Records":
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w", encoding="utf-8")
            except OSError as error:
                raise DetkitError(f"The results can't be written to {self.path}: {error.strerror}.") from error
            self._file.write("[")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None:
            self._file.write("]")
            self._file.close()

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            if self.path is not None:
                self._file.write(f"{', ' if self.count else ''}{json.dumps(record)}")
            self.count += 1


def _chunks(frames: Iterator[np.ndarray], count: int) -> Iterator[list[np.ndarray]]:
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
