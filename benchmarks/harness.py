"""Timing candidates against one another: each checked first, then sampled in turns, and the median taken.

Turns, because a machine's clock and its other work change over minutes: candidates that are measured one after
the other are measured on different machines.
"""

import ctypes
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from detkit.errors import DetkitError

SHORTEST_SAMPLE = 0.003
"""Seconds; of shorter calls a sample takes several, after one that is not timed: the candidates whose turn it was
before have filled the caches with their own."""

Clock = Callable[[Callable[[], Any], int], float]
"""Seconds that so many calls take together."""


def wall_clock(call: Callable[[], Any], repetitions: int) -> float:
    """Seconds of `repetitions` calls on the CPU."""
    turns = itertools.repeat(None, repetitions)
    start = time.perf_counter()
    for _ in turns:
        call()
    return time.perf_counter() - start


def cuda_clock(call: Callable[[], Any], repetitions: int) -> float:
    """Seconds of `repetitions` calls on the current GPU's stream, from one CUDA event to another."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repetitions):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Args:
        name: as the table and the JSON have it.
        call: does the work once and returns its result.
        clock: how it is timed.
        may_be_left_out: when one call takes longer than the budget's limit.
        compiles: the first call of a size may compile or import, so that one is made before any is timed.
    """

    name: str
    call: Callable[[], Any]
    clock: Clock = wall_clock
    may_be_left_out: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Budget:
    """How much time a case may take.

    Args:
        rounds: the most samples of a candidate.
        seconds: a candidate that has spent so long on its samples takes no more. A first call that took longer
            is its one sample.
        limit: a candidate that may be left out is, when its call must take more seconds, judged by the size before.
    """

    rounds: int
    seconds: float
    limit: float = math.inf


@dataclass
class Row:
    """What was measured of one candidate at one size.

    Args:
        name: of the candidate.
        median_us: microseconds of one call; None where it was left out.
        samples_us: microseconds of one call, an entry for each sample, in the order taken.
        repetitions: calls that each sample takes the mean of.
        rate: work (boxes, pairs) per second.
        ratio: the reference's median by this one: how many times as fast as the reference.
        differences: entries of the result that differ from the reference's; None where there is nothing to compare.
        left_out: why there are no samples.
        peak_bytes: by which a call raises the memory of its process, where that was measured.
    """

    name: str
    median_us: float | None = None
    samples_us: list[float] = field(default_factory=list)
    repetitions: int = 1
    rate: float | None = None
    ratio: float | None = None
    differences: int | None = None
    left_out: str | None = None
    peak_bytes: int | None = None


@dataclass
class Case:
    """One size of one kind of input, and what was measured.

    Args:
        kind: of input.
        device: "cpu" or "cuda".
        size: as the table's column has it.
        work: boxes, or pairs of boxes.
        rows: one for each candidate.
        facts: what else is known of it, for example how many boxes are kept.
    """

    kind: str
    device: str
    size: str
    work: int
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)


class History:
    """How long each candidate took at the size before, from which follows what the next takes at least."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def add(self, name: str, work: int, seconds: float) -> None:
        """Note one size; sizes come in increasing order."""
        self._last[name] = (work, seconds)

    def at_least(self, name: str, work: int) -> float:
        """Seconds of a call at a larger size if the time grows no faster than the work; 0 for the first size."""
        before, seconds = self._last.get(name, (1, 0.0))
        return seconds * work / before


def compare(
    candidates: Sequence[Candidate],
    check: Callable[[str, Any], int | None],
    work: int,
    budget: Budget,
    history: History | None = None,
    reference: str = "torchvision",
) -> list[Row]:
    """Check every candidate's result, then time all of them in turns.

    Args:
        candidates: in the order of the rows.
        check: given a candidate's name and result, the number of differing entries, or None where there is nothing
            to compare; raises where a difference is an error.
        work: boxes or pairs of one call, for the rate.
        budget: see there.
        history: of smaller sizes; added to.
        reference: the candidate that the ratio refers to.

    Returns:
        One row for each candidate.
    """
    history = History() if history is None else history
    rows, firsts = [], {}
    for candidate in candidates:
        least = history.at_least(candidate.name, work)
        if candidate.may_be_left_out and least > budget.limit:
            reason = f"over {budget.limit:g} s: at least {least:.1f} s a call, judged by the size below"
            rows.append(Row(candidate.name, left_out=reason))
            continue
        firsts[candidate.name], result = _first_call(candidate)
        rows.append(Row(candidate.name, differences=check(candidate.name, result)))
    samples = time_in_turns([candidate for candidate in candidates if candidate.name in firsts], firsts, budget)
    for row in rows:
        if row.left_out is None:
            row.repetitions, seconds = samples[row.name]
            median = statistics.median(seconds)
            history.add(row.name, work, median)
            row.samples_us, row.median_us = [round(second * 1e6, 3) for second in seconds], median * 1e6
            row.rate = work / median
    medians = {row.name: row.median_us for row in rows}
    for row in rows:
        if row.median_us is not None and (of_reference := medians.get(reference)) is not None:
            row.ratio = of_reference / row.median_us
    return rows


def time_in_turns(
    candidates: Sequence[Candidate], firsts: dict[str, float], budget: Budget
) -> dict[str, tuple[int, list[float]]]:
    """Calls a sample, and seconds a call of each sample, by name.

    Each round takes one sample of every candidate; the next begins with another candidate. `firsts` are the
    seconds of the calls that were made already.
    """
    samples = {candidate.name: (1, [firsts[candidate.name]]) for candidate in candidates}
    turns = [candidate for candidate in candidates if firsts[candidate.name] <= budget.seconds]
    spent = dict.fromkeys(samples, 0.0)
    with _without_garbage_collection():
        for candidate in turns:
            samples[candidate.name] = (_repetitions(candidate, firsts[candidate.name]), [])
        for number in range(budget.rounds):
            for candidate in rotated(turns, number):
                repetitions, seconds = samples[candidate.name]
                if not seconds or spent[candidate.name] < budget.seconds:
                    if repetitions > 1:
                        candidate.call()
                    taken = candidate.clock(candidate.call, repetitions)
                    seconds.append(taken / repetitions)
                    spent[candidate.name] += taken
    return samples


def rotated(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """The order of round `number`: each round begins with the next candidate."""
    start = number % len(candidates) if candidates else 0
    return [*candidates[start:], *candidates[:start]]


def peak_rise(call: Callable[[], Any]) -> int | None:
    """Bytes by which the process's memory rose at most during a call, whoever allocates; None but on Linux.

    Some 2 MB more or less: the system counts in pages, and not at once. To be called in a process of its own.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))

    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # else memory that glibc keeps for reuse would hide what the call takes
        library.malloc_trim(0)
    reset.write_text("5")  # the peak so far is forgotten
    before = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - before) * 1024


def run_python(code: str) -> Any:
    """Run `code`, which may import benchmarks, in a new Python; returns what it prints as JSON.

    Raises:
        DetkitError: it failed; with the last line of its error.
    """
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise DetkitError(f"A measurement in a process of its own failed: {problem[0]}")
    return json.loads(done.stdout)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads for torch and OpenCV; afterwards as many as before."""
    import cv2

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_call(candidate: Candidate) -> tuple[float, Any]:
    if candidate.compiles:
        candidate.call()
    results: list[Any] = []
    return candidate.clock(lambda: results.append(candidate.call()), 1), results[0]


def _repetitions(candidate: Candidate, first: float) -> int:
    """Calls a sample; a first call that was short may have been longer than the next ones."""
    seconds = first
    if first < 20 * SHORTEST_SAMPLE:
        seconds = min(candidate.clock(candidate.call, 1) for _ in range(2))
    return max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))
