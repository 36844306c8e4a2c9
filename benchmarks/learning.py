"""`python -m benchmarks learning`: whether detkit's networks learn as torchvision's do, in their training precision.

Both sides take the same steps of SGD from the same weights on the same made-up objects; sampling is left to chance, so
that the loss differs from seed to seed. What counts is whether the sides differ by more than the seeds do.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table

from benchmarks.harness import Case, cpu_threads
from benchmarks.models import detkit_model, model_names, photos, plausible_model
from benchmarks.options import LAST_STEPS, LearningOptions
from benchmarks.report import conditions, console, hardware, output_path, write_report
from benchmarks.train_step import (
    CONDITIONS,
    batch_label,
    learner,
    step_precision,
    step_shape,
    take_step,
    training_batch,
)
from detkit.errors import DetkitError

SEEDS = (0, 1, 2)
BATCHES = 4
"""That the steps go round, each with objects of its own."""


def bench_learning(options: LearningOptions, command: str = "") -> dict[str, Any]:
    """Train on both sides, print a table of the losses, write the JSON; returns what the JSON holds.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or a loss that is no longer finite.
    """
    devices, names, machine, out = options.devices(), model_names(options.models), hardware(), console()
    output_path("learning", machine, options)  # an error now, not after minutes
    source, images = photos(options.source)
    stated = CONDITIONS.format(precision=options.precision)
    out.print(f"{conditions(machine, options)}; {source}\n{stated}; learning rate {options.lr}, {BATCHES} batches")
    with cpu_threads(options.threads):
        cases = [_learn(name, images, device, options) for device in devices for name in names]
    out.print()
    out.print(_table(cases, options), soft_wrap=False)
    path, report = write_report("learning", cases, options, machine, command, images=source, conditions=stated)
    out.print(f"\nresults -> {path}")
    return report


def _learn(name: str, images: Sequence[np.ndarray], device: str, options: LearningOptions) -> Case:
    """The losses of all steps, for each side and seed."""
    size, count = step_shape(name, options)
    curves: dict[str, list[list[float]]] = {"torchvision": [], "detkit": []}
    for seed in SEEDS:
        reference = plausible_model(name, size, images[0], seed)
        state = {key: value.clone() for key, value in reference.state_dict().items()}
        learned = [
            training_batch(images[number % len(images) :], size, count, 1000 * seed + number).to(device)
            for number in range(BATCHES)
        ]
        for side, losses in curves.items():
            model = reference if side == "torchvision" else detkit_model(name, state, size)
            optimizer, loss_of = learner(side, model, device, options.precision, options.lr)
            torch.manual_seed(seed)
            losses.append(
                [
                    take_step(optimizer, partial(loss_of, learned[step % len(learned)]))
                    for step in track(range(options.step_count), f"{name} {side}, seed {seed}", transient=True)
                ]
            )
            if not math.isfinite(losses[-1][-1]):
                raise DetkitError(f"The loss of {name} on the side of {side} is {losses[-1][-1]}. Give a lower --lr.")
    ends = {side: [statistics.fmean(curve[-LAST_STEPS:]) for curve in losses] for side, losses in curves.items()}
    precision = step_precision(options.precision, device)
    facts = {"losses": curves, "ends": ends, "seeds": SEEDS, "precision": precision}
    return Case(name, device, batch_label(count, size), count, [], facts)


def _table(cases: Sequence[Case], options: LearningOptions) -> Table:
    """The mean loss of the last steps of each seed, and by how much the seeds and the sides differ."""
    title = f"loss after {options.step_count} steps, the mean of the last {LAST_STEPS}; detkit in {options.precision}"
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "side", *(f"seed {seed}" for seed in SEEDS), "mean", "range of the seeds"):
        out.add_column(heading, justify="left" if heading in ("model", "side") else "right", no_wrap=True)
    for case in cases:
        first = statistics.fmean(curve[0] for curve in case.facts["losses"]["torchvision"])
        for side, ends in case.facts["ends"].items():
            spread = max(ends) - min(ends)
            cells = [f"{value:.4f}" for value in (*ends, statistics.fmean(ends), spread)]
            out.add_row(case.kind if side == "torchvision" else f"  (first step {first:.4f})", side, *cells)
    return out
