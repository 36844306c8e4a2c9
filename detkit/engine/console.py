"""What a person sees of a run while it goes on: progress, a line for each epoch, metrics.csv and TensorBoard."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lightning_fabric import Fabric
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from detkit.config import Experiment, InputOptions
from detkit.data.dataset import Dataset
from detkit.engine.evaluate import Evaluation
from detkit.engine.run_folder import RunFolder
from detkit.engine.stages import Stopwatch, verdict
from detkit.model import Model
from detkit.optimize import bf16_instructions
from detkit.proposals.dataset import usable_processors
from detkit.tasks.base import task_of
from detkit.terminal import Console


class TrainingConsole:
    """Reports one run; silent on all processes but the first."""

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
        self._pictures_an_epoch = len(train_set)
        self._started: float | None = None
        self._pictures = 0
        self._lr = 0.0

    def __enter__(self) -> "TrainingConsole":
        from torch.utils.tensorboard import SummaryWriter

        self.progress.start()
        self._task = self.progress.add_task("training", total=None, status="")
        self._events = SummaryWriter(str(self.folder.path)) if self.active else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self._events is not None:
            self._events.close()

    def step(
        self, progress: Any, number: int, batches: int, losses: dict[str, float], lr: float, pictures: int
    ) -> None:
        """After each batch: loss, learning rate, pictures a second, time left."""
        now = time.perf_counter()
        if number == 1:
            self._started, self._pictures = now, 0
        else:
            self._pictures += pictures
        self._lr = lr
        seconds = now - (self._started or now)
        rate = f"{self._pictures / seconds:.1f} pictures/s" if self._pictures else ""
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
                self._events.add_scalar(f"train/{name}", value, progress.step)
            self._events.add_scalar("train/lr", lr, progress.step)

    @contextmanager
    def validation(self, pictures: int) -> Iterator[Callable[[int], None]]:
        """A bar for one evaluation; yields what to call with the number of pictures done."""
        task = self.progress.add_task("validation", total=pictures, status="")
        try:
            yield lambda count: self.progress.update(task, advance=count)
        finally:
            self.progress.remove_task(task)

    def epoch(
        self, progress: Any, losses: dict[str, float], evaluation: Evaluation | None, seconds: float, waited: float
    ) -> None:
        """After each epoch: a line here, a row in metrics.csv, TensorBoard's scalars.

        Args:
            seconds: of training.
            waited: seconds of them in which there was no picture to train on.
        """
        row: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "lr": self._lr, "seconds": seconds}
        row["seconds_waiting"] = waited
        row |= {f"train_{name}": value for name, value in losses.items()}
        line = f"epoch {progress.epoch}/{self.options.epochs}  loss {sum(losses.values()):.3f}  {seconds:.1f} s"
        line += f"  {self._pictures_an_epoch / seconds:.1f} pictures/s"
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
        self.folder.append_metrics(row)
        self.console.print(line)
        if self._events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step", "lr") and value != "":
                    self._events.add_scalar(f"epoch/{name}", value, progress.epoch)

    def limits(self, watch: Stopwatch) -> None:
        """After the last epoch: where the time went, and what limits the run."""
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
            f"training   {len(train_set)} pictures; {train_set.problems.summary()}\n"
            f"validation {len(val_set)} pictures; {val_set.problems.summary()}\n"
            f"model      {experiment.backbone['name']} + {experiment.head['name']}, {parameters / 1e6:.2f} M parameters"
            f", {trained / 1e6:.2f} M of them trained, {_input(experiment.input)}\n"
            f"batch      {options.batch_size} pictures a step: {fabric.world_size} x {per_device} on "
            f"{fabric.device.type}, accumulated over {options.accumulate}\n"
            f"precision  {options.precision}{f' ({native})' if native else ''}"
        )


def _input(options: InputOptions) -> str:
    first, second = options.size
    if options.resize == "short_side":
        return f"input short side {first}, at most {second}"
    return f"input {first} x {second} ({options.resize})"
