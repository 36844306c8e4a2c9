"""Trains runs and kills them at chosen moments, for test_kills.py: python kill_driver.py CONFIG FOLDER STEP LIMIT.

Each run is trained in a fork of this process, which has imported everything but never trained (torch cannot train in a
fork of a process that has). A fork kills itself, as `kill -9` does, before or after the nth call that changes what is
on the disk: opening a file to write, fsync, renaming, making a folder. Then the run is resumed, and compared with one
that nobody broke. One JSON line for each kill goes to standard output.
"""

import builtins
import csv
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detkit.config import Experiment, load_experiment
from detkit.engine.train import train
from detkit.model import read_checkpoint

SLOW_IMPORTS = ("albumentations", "faster_coco_eval", "numba", "supervision", "tensorboard.compat.proto.event_pb2")
WATCHED = ("os.fsync", "os.replace", "os.rename", "os.mkdir", "io.open", "builtins.open")
MODULES = {"os": os, "io": io, "builtins": builtins}
EPOCHS = 3


class Killer:
    """Counts the calls that change the disk below a folder, and kills the process at one of the moments around them."""

    def __init__(self, folder: Path, moment: int | None) -> None:
        self.folder, self.moment, self.count = str(folder), moment, 0
        for name in WATCHED:
            module, _, function = name.partition(".")
            setattr(MODULES[module], function, self._watched(name, getattr(MODULES[module], function)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if not self._changes_the_disk(name, *arguments):
                return call(*arguments, **options)
            self._tick()
            result = call(*arguments, **options)
            self._tick()
            return result

        return watched

    def _changes_the_disk(self, name: str, target: Any, mode: Any = "r", *_: Any) -> bool:
        if name == "os.fsync":
            return True
        writes = not name.endswith("open") or any(letter in str(mode) for letter in "wax")
        return writes and not isinstance(target, int) and str(target).startswith(self.folder)

    def _tick(self) -> None:
        if self.count == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def in_fork(action: Callable[[], Any]) -> int:
    """Run in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def experiment(config: str, runs: Path, epochs: int = EPOCHS) -> Experiment:
    return load_experiment([config], ["--runs", str(runs), "--train.epochs", str(epochs)])


def run_of(runs: Path) -> Path | None:
    """The one run in a folder of runs; None where it was killed before it was there."""
    found = list(runs.glob("detect/[!.]*"))
    assert len(found) <= 1, found
    return found[0] if found else None


def outcome(run: Path) -> dict[str, Any]:
    """What a run left that must not depend on kills."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]
    weights = {name: read_checkpoint(run / "checkpoints" / f"{name}.safetensors")[0] for name in ("last", "best")}
    return {"metrics": metrics, "weights": weights}


def same(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two outcomes differ, empty for nothing."""
    if one["metrics"] != other["metrics"]:
        return f"metrics.csv: {[row['epoch'] for row in other['metrics']]}"
    for name, tensors in one["weights"].items():
        found = other["weights"][name]
        if tensors.keys() != found.keys() or not all(torch.equal(tensors[key], found[key]) for key in tensors):
            return f"weights of {name}"
    return ""


def train_and_count(config: str, runs: Path, moment: int | None, resume: bool, report: Path | None = None) -> None:
    run = run_of(runs)
    killer = Killer(runs, moment)
    train(experiment(config, runs), str(run) if resume else None)
    if report is not None:
        report.write_text(str(killer.count))


def moments_of(config: str, runs: Path, resume: bool) -> int:
    report = runs.with_suffix(".count")
    assert in_fork(partial(train_and_count, config, runs, None, resume, report)) == 0
    return int(report.read_text())


def main(config: str, folder: Path, step: int, limit: int) -> None:
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    whole = folder / "whole"
    moments = moments_of(config, whole, resume=False)
    run = run_of(whole)
    assert run is not None
    expected = outcome(run)

    def begun(runs: Path) -> None:
        """A run that was stopped after its first epoch."""
        assert in_fork(partial(train_and_count, config, runs, moments * 2 // 5, False)) == -signal.SIGKILL

    resumed = folder / "resumed"
    begun(resumed)
    resume_moments = moments_of(config, resumed, resume=True)
    planned = [("train", moment) for moment in range(0, moments, step)]
    planned += [("resume", moment) for moment in range(0, resume_moments, step)]
    for number, (kind, moment) in enumerate(planned[:limit] if limit else planned):
        runs = folder / f"killed{number}"
        if kind == "resume":
            begun(runs)
        killed = in_fork(partial(train_and_count, config, runs, moment, kind == "resume"))
        run = run_of(runs)
        status = in_fork(partial(train, experiment(config, runs), None if run is None else str(run)))
        run = run_of(runs)
        difference = same(expected, outcome(run)) if run is not None and status == 0 else f"exit status {status}"
        print(json.dumps({"kind": kind, "moment": moment, "killed": killed == -9, "problem": difference}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
