"""`python -m benchmarks inference`: from an image to boxes and masks, detkit's networks beside torchvision's own."""

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

from benchmarks.harness import Budget, Candidate, Case, compare, cpu_threads, run_python
from benchmarks.models import (
    as_tensor,
    detkit_model,
    load_side,
    memory,
    model_names,
    photos,
    plausible_model,
    speed_table,
)
from benchmarks.options import InferenceOptions
from benchmarks.report import conditions, console, hardware, output_path, write_report
from benchmarks.yolo import SIZES as YOLO_SIZES
from benchmarks.yolo import yolo_case, yolo_table
from detkit.boxes.iou import pairwise_iou
from detkit.data.loader import collate
from detkit.errors import DetkitError
from detkit.inference.optimization import Precision
from detkit.inference.predictor import Predictor
from detkit.structures import Detections, Inputs, Meta, Sample, Target
from detkit.tasks.base import task_of

BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3
"""Pixels, and parts of 1: what 50 layers may make of rounding."""
HALF_OVERLAP, HALF_SCORE_TOLERANCE = 0.95, 0.02
MASK_OVERLAP = 0.98
SAME_SHARE = 0.98
"""Of the detections; two boxes whose overlap is next to the threshold may be suppressed here and stay there."""
STAGES = ("resize", "normalise, backbone, neck", "head", "decode", "undo")
STAGE_ROUNDS = 5


def bench_inference(options: InferenceOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print tables, write the JSON; returns what the JSON holds.

    Both start from a uint8 image, one at a time; YOLOX and its peer from a file. Torchvision computes in float32.
    Networks have random weights that behave like trained
    ones; see benchmarks.models.plausible_model.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's detections are not torchvision's.
    """
    asked = model_names(options.models, YOLO_SIZES)
    yolos = [name for name in asked if name in YOLO_SIZES]
    names = [name for name in asked if name not in YOLO_SIZES]
    devices, machine, out = options.devices(), hardware(), console()
    output_path("inference", machine, options)  # an error now, not after minutes
    source, images = photos(options.source)
    out.print(f"{conditions(machine, options)}; {len(images)} images: {source}")
    cases: list[Case] = []
    with cpu_threads(options.threads):
        for name in names:
            reference = plausible_model(name, options.input_size, images[0], options.seed)
            cases += [_measure(name, reference, images, device, options) for device in devices]
        beside = [yolo_case(name, images, options) for name in yolos]
    if beside:
        out.print()
        out.print(yolo_table(beside), soft_wrap=False)
    for device in devices if names else []:
        of_device = [case for case in cases if case.device == device]
        out.print()
        out.print(speed_table(f"an image on {device}", of_device), soft_wrap=False)
        out.print()
        out.print(_stage_table(of_device), soft_wrap=False)
    path, report = write_report("inference", cases + beside, options, machine, command, images=source)
    out.print(f"\nresults -> {path}")
    return report


def peaks(
    side: str,
    name: str,
    size: int,
    file: str,
    device: str,
    threads: int,
    source: str | None,
    precision: Precision,
    compile: bool,
) -> dict[str, Any]:
    """The memory that one side takes in a process of its own; see benchmarks.models.memory."""
    torch.set_num_threads(threads)
    images = photos(source)[1]
    load = partial(load_side, side, name, size, file)
    return memory(lambda: partial(_each_twice, _call(side, load(), device, precision, compile), images), device)


def _measure(
    name: str, reference: nn.Module, images: Sequence[np.ndarray], device: str, options: InferenceOptions
) -> Case:
    state = reference.state_dict()
    model = detkit_model(name, state, options.input_size)
    predictor = Predictor(model, device, precision=options.precision, compile=options.compile)
    calls = {"torchvision": _call("torchvision", reference, device), "detkit": _predict(predictor)}
    expected = [calls["torchvision"](image) for image in images]
    check = partial(_check, expected, predictor.network.precision, f"{name} on {device}, seed {options.seed}")
    candidates = [Candidate(side, partial(_each, call, images), compiles=True) for side, call in calls.items()]
    console().print(f"{name} on {device}: results, then times in turns", style="dim")
    rows = compare(candidates, check, len(images), Budget(options.round_count, options.sample_seconds))
    facts: dict[str, Any] = {
        "detections": [len(found["scores"]) for found in expected],
        "choices": predictor.network.choices,
        "stages_ms": stages(predictor, images),
    }
    console().print(f"{name} on {device}: memory of each side, in a process of its own", style="dim")
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
        arguments = (
            f"{name!r}, {options.input_size}, {file!r}, {device!r}, {options.threads}, {options.source!r}, "
            f"{options.precision!r}, {options.compile}"
        )
        code = "import json; from benchmarks.inference import peaks; print(json.dumps(peaks({!r}, {})))"
        return {side: run_python(code.format(side, arguments)) for side in ("torchvision", "detkit")}


def _call(
    side: str, model: Any, device: str, precision: Precision = "fp32", compile: bool = False
) -> Callable[[np.ndarray], Any]:
    """From an image to detections on the CPU, as each library's own users write it."""
    if side == "detkit":
        return _predict(Predictor(model, device, precision=precision, compile=compile))
    return partial(_torchvision, model.to(device), device)


def _predict(predictor: Predictor) -> Callable[[np.ndarray], Detections]:
    return partial(predictor.predict, conf=predictor.model.head.postprocess.score_threshold)


@torch.inference_mode()
def _torchvision(model: nn.Module, device: str, image: np.ndarray) -> dict[str, Tensor]:
    found = model([as_tensor(image).to(device)])[0]
    return {key: values.cpu() for key, values in found.items()}


def _each(call: Callable[[np.ndarray], Any], images: Sequence[np.ndarray]) -> list[Any]:
    return [call(image) for image in images]


def _each_twice(call: Callable[[np.ndarray], Any], images: Sequence[np.ndarray]) -> None:
    for image in [*images, *images]:
        call(image)


def stages(predictor: Predictor, images: Sequence[np.ndarray]) -> dict[str, float]:
    """Milliseconds an image of each part of `Predictor.predict`: the median over rounds of the mean over images."""
    with predictor.network.arithmetic():
        samples = [_stage_round(predictor, images) for _ in range(STAGE_ROUNDS + 1)]  # the first warms up
    return {name: statistics.median(values) for name, values in zip(STAGES, zip(*samples[1:]))}


def _stage_round(predictor: Predictor, images: Sequence[np.ndarray]) -> list[float]:
    model, network, device = predictor.model, predictor.network, predictor.device
    spent = [0.0] * len(STAGES)
    for image in images:
        clocks = [_now(device)]
        meta = Meta("", "the image", (image.shape[0], image.shape[1]))
        batch = collate([model.fit(Sample(image, Target.empty(), meta))], model.fit).to(device)
        clocks.append(_now(device))
        features = network.features(batch.images)
        clocks.append(_now(device))
        outputs = network.outputs(features, Inputs((batch.images.shape[2], batch.images.shape[3]), batch.sizes))
        clocks.append(_now(device))
        found = model.head.decode(outputs)[0]
        clocks.append(_now(device))
        task_of(model.head).undo(found.to("cpu"), batch.metas[0], model.classes.names)
        clocks.append(_now(device))
        spent = [total + after - before for total, before, after in zip(spent, clocks, clocks[1:])]
    return [1e3 * seconds / len(images) for seconds in spent]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _check(
    expected: Sequence[dict[str, Tensor]], precision: Precision, label: str, side: str, results: Sequence[Any]
) -> int | None:
    """Detections that only one side has; of detkit's there may be few in float32. In half precision they are counted
    only: the random weights of a deep network make much of rounding, as trained ones do not."""
    if side != "detkit":
        return None
    if precision != "fp32":
        return sum(unmatched_in_half(found, wanted) for found, wanted in zip(results, expected))
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


def unmatched_in_half(found: Detections, expected: dict[str, Tensor]) -> int:
    """How many of both have no counterpart: the same class, an IoU above 0.95, scores within 0.02."""
    if not len(found) or not len(expected["scores"]):
        return len(found) + len(expected["scores"])
    same = found.labels[:, None] + 1 == expected["labels"]
    same &= (found.scores[:, None] - expected["scores"]).abs() < HALF_SCORE_TOLERANCE
    same &= pairwise_iou(found.boxes, expected["boxes"]) > HALF_OVERLAP
    return int((~same.any(1)).sum() + (~same.any(0)).sum())


def _stage_table(cases: Sequence[Case]) -> Table:
    """Where detkit's time goes: a column for each part, milliseconds an image."""
    out = Table(
        title="detkit's parts, ms an image", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    out.add_column("model", no_wrap=True)
    for stage in STAGES:
        out.add_column(stage, justify="right", no_wrap=True)
    for case in cases:
        out.add_row(case.kind, *(f"{case.facts['stages_ms'][stage]:.1f}" for stage in STAGES))
    return out
