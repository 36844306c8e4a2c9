"""`detkit bench inference`: from a picture to boxes and masks, detkit's networks beside torchvision's own."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from detkit.bench.harness import Budget, Candidate, Case, compare, cpu_threads, run_python
from detkit.bench.models import (
    as_tensor,
    detkit_model,
    load_side,
    memory,
    model_names,
    pictures,
    plausible_model,
    speed_table,
)
from detkit.bench.options import InferenceOptions
from detkit.bench.report import conditions, console, hardware, output_path, write_report
from detkit.data.loader import collate
from detkit.errors import DetkitError
from detkit.predict import Predictor
from detkit.tasks.base import task_of
from detkit.types import Detections, Inputs, Meta, Sample, Target

BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3
"""Pixels, and parts of 1: what 50 layers may make of rounding."""
MASK_OVERLAP = 0.98
SAME_SHARE = 0.98
"""Of the detections; two boxes whose overlap is next to the threshold may be suppressed here and stay there."""
STAGES = ("resize, normalise", "backbone, neck", "head", "decode", "undo")
STAGE_ROUNDS = 5


def bench_inference(options: InferenceOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print tables, write the JSON; returns what the JSON holds.

    Both start from a uint8 picture, one at a time, in float32. Networks have random weights that behave like trained
    ones; see detkit.bench.models.plausible_model.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's detections are not torchvision's.
    """
    devices, names, machine, out = options.devices(), model_names(options.models), hardware(), console()
    output_path("inference", machine, options)  # an error now, not after minutes
    source, images = pictures(options.source)
    out.print(f"{conditions(machine, options)}; {len(images)} pictures: {source}")
    cases: list[Case] = []
    with cpu_threads(options.threads):
        for name in names:
            reference = plausible_model(name, options.input_size, images[0], options.seed)
            cases += [_measure(name, reference, images, device, options) for device in devices]
    for device in devices:
        of_device = [case for case in cases if case.device == device]
        out.print()
        out.print(speed_table(f"a picture on {device}", of_device), soft_wrap=False)
        out.print()
        out.print(_stage_table(of_device), soft_wrap=False)
    path, report = write_report("inference", cases, options, machine, command, pictures=source)
    out.print(f"\nresults -> {path}")
    return report


def peaks(side: str, name: str, size: int, file: str, device: str, threads: int, source: str | None) -> dict[str, Any]:
    """The memory that one side takes in a process of its own; see detkit.bench.models.memory."""
    torch.set_num_threads(threads)
    images = pictures(source)[1]
    load = partial(load_side, side, name, size, file)
    return memory(lambda: partial(_each_twice, _call(side, load(), device), images), device)


def _measure(
    name: str, reference: nn.Module, images: Sequence[np.ndarray], device: str, options: InferenceOptions
) -> Case:
    state = reference.state_dict()
    model = detkit_model(name, state, options.input_size)
    calls = {"torchvision": _call("torchvision", reference, device), "detkit": _call("detkit", model, device)}
    expected = [calls["torchvision"](image) for image in images]
    check = partial(_check, expected, f"{name} on {device}, seed {options.seed}")
    candidates = [Candidate(side, partial(_each, call, images), compiles=True) for side, call in calls.items()]
    rows = compare(candidates, check, len(images), Budget(options.round_count, options.sample_seconds))
    facts: dict[str, Any] = {
        "detections": [len(found["scores"]) for found in expected],
        "stages_ms": stages(Predictor(model, device), images),
    }
    found = _memory(name, state, device, options)
    for row in rows:
        row.peak_bytes = found[row.name]["peak"]
    return Case(name, device, _size(name, options), len(images), rows, {**facts, "memory": found})


def _size(name: str, options: InferenceOptions) -> str:
    return "300 px" if name.startswith("ssd300") else f"{options.input_size} px"


def _memory(name: str, state: dict[str, Tensor], device: str, options: InferenceOptions) -> dict[str, Any]:
    """`peaks` of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.pth")
        torch.save(state, file)
        arguments = f"{name!r}, {options.input_size}, {file!r}, {device!r}, {options.threads}, {options.source!r}"
        code = "import json; from detkit.bench.inference import peaks; print(json.dumps(peaks({!r}, {})))"
        return {side: run_python(code.format(side, arguments)) for side in ("torchvision", "detkit")}


def _call(side: str, model: Any, device: str) -> Callable[[np.ndarray], Any]:
    """From a picture to detections on the CPU, as each library's own users write it."""
    if side == "detkit":
        predictor = Predictor(model, device)
        return partial(predictor.predict, conf=predictor.model.head.postprocess.score_threshold)
    return partial(_torchvision, model.to(device), device)


@torch.inference_mode()
def _torchvision(model: nn.Module, device: str, image: np.ndarray) -> dict[str, Tensor]:
    found = model([as_tensor(image).to(device)])[0]
    return {key: values.cpu() for key, values in found.items()}


def _each(call: Callable[[np.ndarray], Any], images: Sequence[np.ndarray]) -> list[Any]:
    return [call(image) for image in images]


def _each_twice(call: Callable[[np.ndarray], Any], images: Sequence[np.ndarray]) -> None:
    for image in [*images, *images]:
        call(image)


@torch.inference_mode()
def stages(predictor: Predictor, images: Sequence[np.ndarray]) -> dict[str, float]:
    """Milliseconds a picture of each part of `Predictor.predict`: the median over rounds of the mean over pictures."""
    model, device = predictor.model, predictor.device
    samples: list[list[float]] = []
    for _ in range(STAGE_ROUNDS + 1):  # the first warms up
        spent = [0.0] * len(STAGES)
        for image in images:
            clocks = [_now(device)]
            meta = Meta("", "the picture", (image.shape[0], image.shape[1]))
            batch = collate([model.fit(Sample(image, Target.empty(), meta))], model.fit).to(device)
            normalised = (batch.images - model.mean) / model.std
            clocks.append(_now(device))
            features = model.backbone(normalised)
            features = features if model.neck is None else model.neck(features)
            clocks.append(_now(device))
            outputs = model.head(features, Inputs((normalised.shape[2], normalised.shape[3]), batch.sizes))
            clocks.append(_now(device))
            found = model.head.decode(outputs)[0]
            clocks.append(_now(device))
            task_of(model.head).undo(found.to("cpu"), batch.metas[0], model.classes.names)
            clocks.append(_now(device))
            spent = [total + after - before for total, before, after in zip(spent, clocks, clocks[1:])]
        samples.append([1e3 * seconds / len(images) for seconds in spent])
    return {name: statistics.median(values) for name, values in zip(STAGES, zip(*samples[1:]))}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _check(expected: Sequence[dict[str, Tensor]], label: str, side: str, results: Sequence[Any]) -> int | None:
    """Detections that only one side has; of detkit's there may be few."""
    if side != "detkit":
        return None
    alone = sum(unmatched(found, wanted) for found, wanted in zip(results, expected))
    total = sum(len(found) + len(wanted["scores"]) for found, wanted in zip(results, expected))
    if alone > (1 - SAME_SHARE) * total:
        raise DetkitError(
            f"detkit's detections are not torchvision's: {alone} of {total} have no counterpart of the same class, "
            f"score and place ({label}). This is a fault of detkit; please report it with this line."
        )
    return alone


def unmatched(found: Detections, expected: dict[str, Tensor]) -> int:
    """How many of both have no counterpart: the same class, and box, score and mask within the tolerances."""
    if not len(found) or not len(expected["scores"]):
        return len(found) + len(expected["scores"])
    same = (found.labels[:, None] + 1 == expected["labels"]) & (
        (found.scores[:, None] - expected["scores"]).abs() < SCORE_TOLERANCE
    )
    same &= (found.boxes[:, None] - expected["boxes"]).abs().amax(-1) < BOX_TOLERANCE
    if found.masks is not None:
        for mine, theirs in same.nonzero().tolist():
            mask, other = found.masks[mine], expected["masks"][theirs, 0] > 0.5
            # Of a mask of few pixels one on the threshold is much.
            same[mine, theirs] = (mask & other).sum() >= MASK_OVERLAP * (mask | other).sum() - 2
    return int((~same.any(1)).sum() + (~same.any(0)).sum())


def _stage_table(cases: Sequence[Case]) -> Table:
    """Where detkit's time goes: a column for each part, milliseconds a picture."""
    out = Table(
        title="detkit's parts, ms a picture", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    out.add_column("model", no_wrap=True)
    for stage in STAGES:
        out.add_column(stage, justify="right", no_wrap=True)
    for case in cases:
        out.add_row(case.kind, *(f"{case.facts['stages_ms'][stage]:.1f}" for stage in STAGES))
    return out
