"""`python -m benchmarks matching`: assignment of ground truth to anchors beside torchvision's, time and memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from benchmarks.harness import (
    Budget,
    Candidate,
    Case,
    compare,
    cpu_threads,
    cuda_clock,
    peak_rise,
    run_python,
    wall_clock,
)
from benchmarks.inputs import anchors_and_targets
from benchmarks.options import MatchingOptions
from benchmarks.report import conditions, console, hardware, output_path, table, write_report
from detkit.boxes import match_ssd, match_two_thresholds
from detkit.errors import DetkitError
from detkit.structures import Match

Assignment = Callable[[Tensor, Tensor], Match | Tensor]
"""Anchors and ground truths to a Match, or to torchvision's (A,) int64."""


def bench_matching(options: MatchingOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print a table for each rule, write the JSON; returns what the JSON holds.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's result is not torchvision's.
    """
    devices, machine, out = options.devices(), hardware(), console()
    output_path("matching", machine, options)  # an error now, not after minutes
    out.print(conditions(machine, options))
    cases: list[Case] = []
    with cpu_threads(options.threads):
        for rule, of_rule in zip(RULES, _peaks_in_a_process(options)):
            for device in devices:
                measured = [_measure(rule, anchors, targets, device, options) for anchors, targets in options.shapes]
                if device == "cpu":
                    for case, peaks_of_case in zip(measured, of_rule):
                        for row in case.rows:
                            row.peak_bytes = peaks_of_case[row.name]
                out.print()
                out.print(table(f"{rule} on {device}", measured, "pairs"), soft_wrap=False)
                cases += measured
    path, report = write_report("matching", cases, options, machine, command)
    out.print(f"\nresults -> {path}")
    return report


def peaks(shapes: Sequence[tuple[int, int]], seed: int) -> list[list[dict[str, int | None]]]:
    """For each rule and shape: by how many bytes a call of each candidate raises the process's memory.

    Meant for a process of its own.
    """
    torch.set_num_threads(1)
    found: list[list[dict[str, int | None]]] = []
    for calls in RULES.values():
        found.append([])
        for anchors, targets in shapes:
            for call in calls.values():
                call(*anchors_and_targets(16, 2, seed))  # compiles
            boxes = anchors_and_targets(anchors, targets, seed)
            found[-1].append({name: peak_rise(partial(call, *boxes)) for name, call in calls.items()})
    return found


def _peaks_in_a_process(options: MatchingOptions) -> Any:
    call = f"peaks({options.shapes}, {options.seed})"
    return run_python(f"import json; from benchmarks.matching import peaks; print(json.dumps({call}))")


def _measure(rule: str, anchors: int, targets: int, device: str, options: MatchingOptions) -> Case:
    boxes = [tensor.to(device) for tensor in anchors_and_targets(anchors, targets, options.seed)]
    clock = wall_clock if device == "cpu" else cuda_clock
    candidates = [Candidate(name, partial(call, *boxes), clock, compiles=True) for name, call in RULES[rule].items()]
    label = f"{rule}, {anchors}x{targets} on {device}, seed {options.seed}"
    check = partial(_check, _as_torchvision(RULES[rule]["torchvision"](*boxes)), label)
    rows = compare(candidates, check, anchors * targets, Budget(options.round_count, options.sample_seconds))
    return Case(rule, device, f"{anchors}x{targets}", anchors * targets, rows)


def _check(expected: Tensor, label: str, name: str, result: Match | Tensor) -> int:
    """Anchors with another ground truth than torchvision's; for detkit there must be none."""
    differing = int((_as_torchvision(result) != expected).sum())
    if name == "detkit" and differing:
        raise DetkitError(
            f"detkit's matching is not torchvision's: {differing} anchors have another target ({label}). This is a "
            "fault of detkit; please report it with this line."
        )
    return differing


def _as_torchvision(found: Match | Tensor) -> Tensor:
    """(A,) int64 the ground truth of each anchor, -1 for a negative and -2 for an ignored one."""
    if isinstance(found, Tensor):
        return found
    return torch.where(found.positive, found.target_index, torch.where(found.ignored, -2, -1))


def _detkit_ssd(anchors: Tensor, targets: Tensor) -> Match:
    return match_ssd(anchors, targets)


def _detkit_two_thresholds(anchors: Tensor, targets: Tensor) -> Match:
    return match_two_thresholds(anchors, targets)


def _torchvision_ssd(anchors: Tensor, targets: Tensor) -> Tensor:
    return SSDMatcher(0.5)(box_iou(targets, anchors))


def _torchvision_two_thresholds(anchors: Tensor, targets: Tensor) -> Tensor:
    return Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(targets, anchors))


RULES: dict[str, dict[str, Assignment]] = {
    "match_ssd": {"torchvision": _torchvision_ssd, "detkit": _detkit_ssd},
    "match_two_thresholds": {"torchvision": _torchvision_two_thresholds, "detkit": _detkit_two_thresholds},
}
