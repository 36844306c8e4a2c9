"""`python -m benchmarks iou`: detkit.boxes.pairwise_iou beside torchvision and others."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks import peers
from benchmarks.harness import Budget, Candidate, Case, compare, cpu_threads, cuda_clock, wall_clock
from benchmarks.inputs import anchors_and_targets
from benchmarks.options import IouOptions
from benchmarks.report import conditions, console, hardware, output_path, table, write_report
from detkit.boxes import pairwise_iou
from detkit.errors import DetkitError

TOLERANCE = 1e-6
BYTES_A_PAIR = 64
"""What a call takes at most: NumPy's four float32 corners, their sides, and a few matrices of float64."""


def bench_iou(options: IouOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print a table, write the JSON; returns what the JSON holds.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's result is not torchvision's.
    """
    devices, machine, out = options.devices(), hardware(), console()
    output_path("iou", machine, options)  # an error now, not after minutes
    out.print(conditions(machine, options))
    cases: list[Case] = []
    skipped: list[str] = []
    with cpu_threads(options.threads):
        for rows, columns in options.shapes:
            need, free = rows * columns * BYTES_A_PAIR, _free_memory()
            if free is not None and need > free:
                skipped.append(f"{rows}x{columns}: needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
                continue
            cases += [_measure(rows, columns, device, options) for device in devices]
    for device in devices:
        of_device = [case for case in cases if case.device == device]
        out.print()
        out.print(table(f"pairwise IoU on {device}", of_device, "pairs"), soft_wrap=False)
    for reason in skipped:
        out.print(f"left out: {reason}")
    path, report = write_report("iou", cases, options, machine, command, left_out=skipped)
    out.print(f"\nresults -> {path}")
    return report


def _measure(rows: int, columns: int, device: str, options: IouOptions) -> Case:
    boxes_a, boxes_b = (boxes.to(device) for boxes in anchors_and_targets(rows, columns, options.seed))
    on_cpu, pairs = device == "cpu", rows * columns
    calls = {"detkit": pairwise_iou, **(peers.ious() if on_cpu else {"torchvision": box_iou})}
    clock = wall_clock if on_cpu else cuda_clock
    candidates = [
        Candidate(name, partial(call, boxes_a, boxes_b), clock, compiles=True) for name, call in calls.items()
    ]
    check = partial(_check, box_iou(boxes_a, boxes_b), f"{rows}x{columns} on {device}, seed {options.seed}")
    measured = compare(candidates, check, pairs, Budget(options.round_count, options.sample_seconds))
    return Case("pairwise", device, f"{rows}x{columns}", pairs, measured)


def _check(expected: Tensor, label: str, name: str, result: Tensor) -> int:
    """Entries further than TOLERANCE from torchvision's; for detkit there must be none."""
    agrees = torch.isclose(result.to(expected.dtype), expected, rtol=0, atol=TOLERANCE)
    differing = agrees.numel() - int(agrees.sum())
    if name == "detkit" and differing:
        raise DetkitError(
            f"detkit.boxes.pairwise_iou is not torchvision.ops.box_iou: {differing} entries are further apart than "
            f"{TOLERANCE} ({label}). This is a fault of detkit; please report it with this line."
        )
    return differing


def _free_memory() -> int | None:
    """Bytes that can be had; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not this name
        return None
