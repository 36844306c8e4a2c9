"""`python -m benchmarks nms`: detkit.boxes.nms beside torchvision and others, on made-up detections."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Budget, Candidate, Case, History, compare, cpu_threads, cuda_clock, run_python
from benchmarks.inputs import KINDS, Candidates
from benchmarks.options import NmsOptions
from benchmarks.peers import (
    Suppression,
    exact_nms,
    installed,
    suppressions,
    torchvision_batched,
    torchvision_nms,
)
from benchmarks.report import conditions, console, growth, hardware, output_path, table, write_report
from detkit.boxes import nms
from detkit.errors import DetkitError, nearest

SORT = "torch.sort of scores"
WARM_START = """
import json, time
import numpy, torch
begin = time.perf_counter()
from detkit.boxes import nms
imported = time.perf_counter()
boxes, scores = torch.tensor([[0.0, 0, 9, 9]]).repeat(100, 1), torch.arange(100) / 100
nms(boxes, scores, 0.5)
first = time.perf_counter()
nms(boxes, scores, 0.5)
second = time.perf_counter()
print(json.dumps([imported - begin, first - imported, second - first]))
"""


def bench_nms(options: NmsOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print a table for each kind of input, write the JSON and the plot.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Returns:
        What the JSON holds.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's result is not torchvision's.
    """
    kinds, devices, sizes, machine, out = _kinds(options), options.devices(), options.box_counts, hardware(), console()
    output_path("nms", machine, options)  # an error now, not after minutes
    if options.plot:
        # Before the measurement: what is missing is said at once, not after minutes.
        from benchmarks.plot import plot_rates, require_matplotlib

        require_matplotlib()
    out.print(f"{conditions(machine, options)}, IoU {options.iou}")
    if missing := [name for name, found in installed().items() if not found]:
        out.print(f"not installed, so not measured: {', '.join(missing)}")
    cases: list[Case] = []
    growths: dict[str, Any] = {}
    with cpu_threads(options.threads):
        _warm_up(options, devices)
        for kind in kinds:
            measured = measure_kind(kind, sizes, devices, options)
            for device in devices:
                of_device = [case for case in measured if case.device == device]
                growths[f"{kind} {device}"] = growth(of_device)
                out.print()
                out.print(table(f"{kind} on {device}", of_device, "boxes", ["kept"]), soft_wrap=False)
            cases += measured
        _explain(out, cases, options)
    warm = warm_start(3 if options.quick else 5)
    out.print(
        f"a new process: detkit.boxes.nms takes {warm['extra_s']:.2f} s once, beyond the import of torch and NumPy "
        f"(its import {warm['import_s']:.2f}, the first call {warm['first_call_s']:.2f}; median of {warm['runs']} runs)"
    )
    path, report = write_report("nms", cases, options, machine, command, growth=growths, warm_start=warm)
    out.print(f"results -> {path}")
    if options.plot:
        title = f"Non-maximum suppression at IoU {options.iou}\n{conditions(machine, options)}"
        out.print(f"plot    -> {plot_rates(cases, title, path.with_suffix('.png'))}")
    return report


def measure_kind(kind: str, sizes: list[int], devices: list[str], options: NmsOptions) -> list[Case]:
    """The cases of one kind of input, for every size and device."""
    budget = Budget(options.round_count, options.sample_seconds, options.limit)
    histories = {device: History() for device in devices}
    cases = []
    for count in sizes:
        given = KINDS[kind](count, options.seed)
        check = ExactCheck(given, options.iou, f"{kind}, {count} boxes, IoU {options.iou}, seed {options.seed}")
        for device in devices:
            candidates = candidates_on(device, given.to(device), options.iou)
            rows = compare(candidates, partial(check, device), count, budget, histories[device])
            cases.append(Case(kind, device, f"{count:,}", count, rows, {"kept": len(check.expected)}))
    return cases


def candidates_on(device: str, given: Candidates, iou_threshold: float) -> list[Candidate]:
    """What is timed on one device; torchvision first, as the others are checked against it."""
    if device == "cpu":
        peers = suppressions(given.groups is not None)
        torchvision = Candidate("torchvision", partial(peers.pop("torchvision"), given, iou_threshold))
        others = [
            Candidate(name, partial(peer, given, iou_threshold), may_be_left_out=True) for name, peer in peers.items()
        ]
        return [
            torchvision,
            Candidate("detkit", partial(detkit_nms, given, iou_threshold), compiles=True),
            *others,
            Candidate(SORT, partial(given.scores.sort, descending=True)),
        ]
    ours: dict[str, Suppression] = {
        "torchvision": torchvision_nms if given.groups is None else torchvision_batched,
        "detkit": detkit_nms,
    }
    calls: dict[str, Callable[[], Tensor]] = {name: partial(call, given, iou_threshold) for name, call in ours.items()}
    calls |= {f"{name}, to the host": partial(_to_host, call) for name, call in calls.items()}
    calls[SORT] = lambda: given.scores.sort(descending=True).values
    return [Candidate(name, call, cuda_clock, compiles=True) for name, call in calls.items()]


def detkit_nms(given: Candidates, iou_threshold: float) -> Tensor:
    """detkit.boxes.nms, images and classes in one call."""
    return nms(given.boxes, given.scores, iou_threshold, given.labels, given.image_index)


class ExactCheck:
    """Compares kept indices with torchvision's on the CPU: for detkit they must be equal, for others it counts.

    Args:
        given: the candidates.
        iou_threshold: in 0..1.
        label: of the case, for the error.
    """

    def __init__(self, given: Candidates, iou_threshold: float, label: str) -> None:
        self.given, self.iou_threshold, self.label = given, iou_threshold, label
        self._expected: Tensor | None = None

    @property
    def expected(self) -> Tensor:
        """(K,) int64 what is kept, best score first."""
        if self._expected is None:
            self._expected = exact_nms(self.given, self.iou_threshold)
        return self._expected

    def __call__(self, device: str, name: str, result: Any) -> int | None:
        """How many boxes are kept by one and not by the other; None for the sort.

        Raises:
            DetkitError: detkit's indices are not torchvision's, in the same order.
        """
        if name == SORT:
            return None
        kept = result.cpu()
        if name == "torchvision" and device == "cpu" and self.given.groups is None and self._expected is None:
            self._expected = kept  # the call that `expected` would make
        differing = len(set(kept.tolist()) ^ set(self.expected.tolist()))
        if name.startswith("detkit") and not torch.equal(kept, self.expected):
            raise DetkitError(
                f"detkit.boxes.nms on {device} is not torchvision.ops.nms: {differing} boxes are kept by one of them "
                f"only{'' if differing else ', and the order differs'} ({self.label}). This is a fault of detkit; "
                "please report it with this line."
            )
        return differing


def warm_start(runs: int) -> dict[str, Any]:
    """What the first call costs a new process when the compiled code is in Numba's cache, as it is after any call.

    Returns:
        Medians in seconds: import_s of detkit.boxes after torch and NumPy, first_call_s, second_call_s, and
        extra_s, the first two together less the third; and the number of runs.
    """
    measured = [run_python(WARM_START) for _ in range(runs)]
    imported, first, second = (statistics.median(column) for column in zip(*measured))
    extra = statistics.median(run[0] + run[1] - run[2] for run in measured)
    return {"import_s": imported, "first_call_s": first, "second_call_s": second, "extra_s": extra, "runs": runs}


def _kinds(options: NmsOptions) -> list[str]:
    kinds = list(KINDS) if options.kinds is None else [kind.strip() for kind in options.kinds.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise DetkitError(f"--kinds holds '{kind}'. {nearest(kind, KINDS)}")
    return list(dict.fromkeys(kinds))


def _warm_up(options: NmsOptions, devices: list[str]) -> None:
    """Imports and compilations happen here, so that no first call pays for them."""
    for make in KINDS.values():
        given = make(64, options.seed)
        for device in devices:
            for candidate in candidates_on(device, given.to(device), options.iou):
                candidate.call()


def _to_host(call: Callable[[], Tensor]) -> Tensor:
    return call().cpu()


def _explain(out: Any, cases: list[Case], options: NmsOptions) -> None:
    rows = [row for case in cases for row in case.rows]
    out.print()
    if any(row.left_out for row in rows):
        out.print(
            f"over {options.limit:g} s: left out, as a call takes longer even if its time grew no faster than the boxes"
        )
    if any(row.differences for row in rows):
        out.print("entries that differ: boxes kept by one of it and torchvision on each image and class, not by both")
