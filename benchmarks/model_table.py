"""`python -m benchmarks model_table`: size, cost and time of runs and of configs, and the scores of the runs."""

import csv
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Budget, Candidate, Case, compare, cpu_threads
from benchmarks.models import photos
from benchmarks.options import ModelTableOptions
from benchmarks.report import conditions, console, hardware, output_path, write_report
from detkit.config import Experiment, load_experiment
from detkit.errors import CheckpointError, DetkitError
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model, load_model
from detkit.structures import ClassList

COLUMNS = ("model", "input", "parameters", "GFLOPs", "ms an image", "mAP50", "mAP50-95", "minutes of training")


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        name: of the config.
        model: with the run's best weights, or random ones.
        parameters: how many it is trained with; a predictor folds batch norms away.
        reached: what metrics.csv says, see `scores_of`; empty for a config without a run.
    """

    name: str
    model: Model
    parameters: int
    reached: dict[str, float | int | None]


def bench_model_table(options: ModelTableOptions, command: str = "") -> dict[str, Any]:
    """Measure, print the table in Markdown, write the JSON; returns what the JSON holds.

    FLOPs are those of one image, with all that the network computes for it, a multiplication and an addition counted
    as two; only convolutions and products of matrices count. Time is from a uint8 image to boxes of a score above
    0.25, one at a time, in float32, the models in turns.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: a model is neither a run nor a config, or the images cannot be read.
    """
    machine, out = hardware(), console()
    output_path("model_table", machine, options)  # an error now, not after minutes
    entries = [_entry(path, options.classes) for path in _paths(options.models or "")]
    source, images = photos(options.source)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cases: list[Case] = []
    with cpu_threads(options.threads):
        for device in options.devices():
            cases += _measure(entries, images[0], device, options)
    for device in options.devices():
        out.print(f"\non {device}: {conditions(machine, options)}; the first of: {source}\n")
        out.print(markdown([case for case in cases if case.device == device]))
    path, report = write_report(
        "model_table", cases, options, machine, command, images=source, load_average_before=load
    )
    out.print(f"\nresults -> {path}")
    return report


def scores_of(metrics: Path) -> dict[str, float | int | None]:
    """The best scores of a run, its epochs, and the minutes that they took, evaluation not counted.

    Raises:
        CheckpointError: the file is missing, or no epoch of it was evaluated.
    """
    rows = list(csv.DictReader(metrics.open(newline="", encoding="utf-8"))) if metrics.is_file() else []
    evaluated = [row for row in rows if row.get("mAP")]
    if not evaluated:
        raise CheckpointError(f"There are no scores in '{metrics}'. Give the folder of a run that was evaluated.")
    best = max(evaluated, key=lambda row: float(row["mAP"]))
    return {
        "mAP50": float(best["mAP50"]),
        "mAP": float(best["mAP"]),
        "epochs": len(rows),
        "training_minutes": sum(float(row["seconds"]) for row in rows) / 60,
    }


def markdown(cases: Sequence[Case]) -> str:
    """The table, a line for each case."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for case in cases:
        facts = case.facts
        cells = [
            f"`{case.kind}`",
            case.size,
            f"{facts['parameters'] / 1e6:.1f} M",
            f"{facts['flops'] / 1e9:.1f}",
            f"{(case.rows[0].median_us or 0) / 1e3:.0f}",
            *(f"{facts[key]:.3f}" if key in facts else "" for key in ("mAP50", "mAP")),
            f"{facts['training_minutes']:.0f}" if "training_minutes" in facts else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paths(models: str) -> list[Path]:
    """Runs' folders and configs out of names and globs with commas between."""
    found: list[Path] = []
    for name in (part.strip() for part in models.split(",")):
        matches = sorted(glob.glob(name))
        if not matches:
            raise DetkitError(
                f"--models holds '{name}', which is no run's folder and no config. Give for example "
                f"--models 'runs/detect/quickstart,configs/*_bccd.yaml'."
            )
        found += map(Path, matches)
    return found


def _entry(path: Path, classes: int) -> Entry:
    if path.is_dir():
        model = load_model(path)
        return Entry(model.experiment.name, model, _parameters(model), scores_of(path / "metrics.csv"))
    experiment = load_experiment([str(path)])
    names = tuple(experiment.data.get("class_names") or map(str, range(classes)))
    model = build_model(experiment, ClassList.from_names(names), load_weights=False)
    return Entry(experiment.name, model, _parameters(model), {})


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _measure(entries: Sequence[Entry], image: np.ndarray, device: str, options: ModelTableOptions) -> list[Case]:
    predictors = [Predictor(entry.model, device) for entry in entries]
    calls = [partial(predictor.predict, image) for predictor in predictors]
    candidates = [Candidate(str(index), call, compiles=True) for index, call in enumerate(calls)]
    rows = compare(candidates, lambda name, result: None, 1, Budget(options.round_count, options.sample_seconds))
    cases = []
    for entry, call, row in zip(entries, calls, rows):
        with FlopCounterMode(display=False) as counter:
            found = call()
        row.name = "detkit"
        facts = {
            "weights": "of the run" if entry.reached else "random",
            "parameters": entry.parameters,
            "flops": counter.get_total_flops(),
            "detections": len(found),
            **entry.reached,
        }
        cases.append(Case(entry.name, device, _size(entry.model.experiment), 1, [row], facts))
    return cases


def _size(experiment: Experiment) -> str:
    first, second = experiment.input.size
    return f"{first} to {second}" if experiment.input.resize == "short_side" else f"{first} x {second}"
