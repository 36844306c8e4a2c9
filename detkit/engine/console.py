"""Progress reports of a training run: progress bar, a line per epoch, metrics.csv and TensorBoard."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_fabric import Fabric
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from detkit.config import Experiment, InputOptions
from detkit.data.dataset import Dataset
from detkit.data.proposals.dataset import usable_processors
from detkit.engine.evaluate import Evaluation
from detkit.engine.profiler import Stopwatch, verdict
from detkit.engine.run_folder import RunFolder
from detkit.inference.optimization import bf16_instructions
from detkit.io.files import write_error
from detkit.io.terminal import Console
from detkit.model import Model
from detkit.tasks.base import task_of


class TrainingConsole:
    """Reports one run; silent in all processes except the first."""

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        model: Model,
        train_set: Dataset,
        val_set: Dataset,
        fabric: Fabric,
    ) -> None:
        self.folder, self.options = folder, experiment.train
        self.console = Console(quiet=not fabric.is_global_zero)
        self.active = fabric.is_global_zero
        self._figures = task_of(model.head).figures(model.head)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not fabric.is_global_zero or not self.console.is_terminal,
        )
        self._introduce(experiment, model, train_set, val_set, fabric)
        self._images_an_epoch = len(train_set)
        self._started: float | None = None
        self._image_files = 0
        self._lr = 0.0

    def __enter__(self) -> "TrainingConsole":
        self.progress.start()
        self._task = self.progress.add_task("training", total=None, status="")
        self._events = EventFile(self.folder.path) if self.active else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self._events is not None:
            self._events.close()

    def step(self, progress: Any, number: int, batches: int, losses: dict[str, float], lr: float, images: int) -> None:
        """Report a batch: loss, learning rate, images per second, time left."""
        now = time.perf_counter()
        if number == 1:
            self._started, self._image_files = now, 0
        else:
            self._image_files += images
        self._lr = lr
        seconds = now - (self._started or now)
        rate = f"{self._image_files / seconds:.1f} images/s" if self._image_files else ""
        total = sum(losses.values())
        self.progress.update(
            self._task,
            total=batches * self.options.epochs,
            completed=batches * progress.epoch + number,
            description=f"epoch {progress.epoch + 1}/{self.options.epochs}",
            status=f"loss {total:.3f}  lr {lr:.2g}  {rate}",
        )
        if self._events is not None:
            for name, value in losses.items():
                self._events.add(f"train/{name}", value, progress.step)
            self._events.add("train/lr", lr, progress.step)

    @contextmanager
    def validation(self, images: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar for an evaluation; yields a function to call with the number of images done."""
        task = self.progress.add_task("validation", total=images, status="")
        try:
            yield lambda count: self.progress.update(task, advance=count)
        finally:
            self.progress.remove_task(task)

    def epoch(
        self, progress: Any, losses: dict[str, float], evaluation: Evaluation | None, seconds: float, waited: float
    ) -> None:
        """Report an epoch: a line on the console, a row of metrics.csv, and scalars for TensorBoard.

        Args:
            seconds: duration of the training.
            waited: part of it spent waiting for images, in seconds.
        """
        row: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "lr": self._lr, "seconds": seconds}
        row["seconds_waiting"] = waited
        row |= {f"train_{name}": value for name, value in losses.items()}
        line = f"epoch {progress.epoch}/{self.options.epochs}  loss {sum(losses.values()):.3f}  {seconds:.1f} s"
        line += f"  {self._images_an_epoch / seconds:.1f} images/s"
        row |= dict.fromkeys((f"val_{name}" for name in losses), "") | dict.fromkeys(self._figures, "")
        if evaluation is not None:
            row |= {f"val_{name}": value for name, value in evaluation.losses.items()}
            figures = evaluation.scores.as_dict()
            row |= {name: figures[name] for name in self._figures}
            best = "  best" if progress.evaluations_since_best == 0 else ""
            line += f"  val loss {sum(evaluation.losses.values()):.3f}" if evaluation.losses else ""
            shown = (name for name in self._figures if name != "mAP75")
            line += "".join(f"  {name.replace('_', ' ')} {figures[name]:.3f}" for name in shown) + best
            if evaluation.scores.remark:
                line += f"  ({evaluation.scores.remark})"
        self.folder.add_metrics(row)
        self.console.print(line)
        if self._events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step", "lr") and value != "":
                    self._events.add(f"epoch/{name}", value, progress.epoch)
            self._events.flush()

    def limits(self, watch: Stopwatch) -> None:
        """Report after the last epoch which stage limits the run."""
        if watch.seconds:
            self.console.print(f"time       {verdict(watch, self.options, usable_processors())}")

    def _introduce(
        self, experiment: Experiment, model: Model, train_set: Dataset, val_set: Dataset, fabric: Fabric
    ) -> None:
        options = experiment.train
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        per_device = options.batch_size // (options.accumulate * fabric.world_size)
        native = bf16_instructions(fabric.device) if options.precision == "bf16-mixed" else ""
        self.console.print(
            f"run        {self.folder.path}\n"
            f"classes    {train_set.classes}\n"
            f"training   {len(train_set)} images; {train_set.problems.summary()}\n"
            f"validation {len(val_set)} images; {val_set.problems.summary()}\n"
            f"model      {experiment.backbone['name']} + {experiment.head['name']}, {parameters / 1e6:.2f} M parameters"
            f", {trained / 1e6:.2f} M of them trained, {_input(experiment.input)}\n"
            f"batch      {options.batch_size} images a step: {fabric.world_size} x {per_device} on "
            f"{fabric.device.type}, accumulated over {options.accumulate}\n"
            f"precision  {options.precision}{f' ({native})' if native else ''}"
        )


class EventFile:
    """An event file of scalars for TensorBoard, in a folder.

    Unlike TensorBoard's writer it does not use a thread, in which errors such as a full disk would be lost.

    Raises:
        WriteError: from all methods, if the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path = folder / name
        with self._naming():
            self._records = RecordWriter(self._path.open("wb"))
        self._write(file_version="brain.Event:2")

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a scalar at a step."""
        self._write(step=step, summary={"value": [{"tag": tag, "simple_value": value}]})

    def flush(self) -> None:
        """Write buffered scalars to the file."""
        with self._naming():
            self._records.flush()

    def close(self) -> None:
        with self._naming():
            self._records.close()

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

        with self._naming():
            self._records.write(Event(wall_time=time.time(), **event).SerializeToString())

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self._path, error) from error


def _input(options: InputOptions) -> str:
    first, second = options.size
    if options.resize == "short_side":
        return f"input short side {first}, at most {second}"
    return f"input {first} x {second} ({options.resize})"
