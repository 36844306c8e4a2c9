"""What a benchmark leaves behind: the machine it ran on, a table to read, a JSON file to compare with."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from benchmarks.harness import Case, Row
from benchmarks.options import BenchOptions, usable_cores
from detkit.errors import DetkitError, counted
from detkit.io.terminal import Console

RESULTS = Path(__file__).with_name("results")
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "asimd", "sve")
LIBRARIES = ("torch", "torchvision", "numpy", "numba", "lsnms", "powerboxes", "supervision")


def hardware() -> dict[str, Any]:
    """The machine and the versions of what is measured; None for a library that is not installed."""
    cpu = _cpu_info()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    model = cpu.get("model name") or platform.processor() or platform.machine()
    family = [f"{word} {cpu[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in cpu]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": " ".join(model.split()),
        "cpu_model_number": " ".join(family) or None,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": usable_cores(),
        "memory_gb": _memory_gb(),
        "gpu": gpus[0] if gpus else None,
        "gpus": len(gpus),
        "cuda": torch.version.cuda if gpus else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {**{name: _version(name) for name in LIBRARIES}, "opencv": _opencv_version()},
    }


def hardware_name(machine: dict[str, Any]) -> str:
    """One line for a title: "AMD EPYC, 2 cores" with the GPU's name where there is one."""
    cores = counted(machine["cores"], "core")
    return ", ".join(filter(None, (machine["cpu"], cores, machine["gpu"])))


def default_output(benchmark: str, machine: dict[str, Any]) -> Path:
    """benchmarks/results/nms-intel-xeon-8488c-2-cores.json.

    Cloud machines of several generations call themselves "AMD EPYC": a name without a number gets the processor's own,
    nms-amd-epyc-family-25-model-17-2-cores.json.
    """
    cpu = re.sub(r"\((r|tm)\)|@.*", "", machine["cpu"].lower())
    if not re.search(r"\d", cpu) and machine.get("cpu_model_number"):
        cpu = f"{cpu} {machine['cpu_model_number']}"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name({**machine, "cpu": cpu}).lower()).strip("-")
    return RESULTS / f"{benchmark}-{slug}.json"


def output_path(benchmark: str, machine: dict[str, Any], options: BenchOptions) -> Path:
    """Where the results will go; asked for before measuring as well, so that no measurement is lost.

    A quick run has a name of its own, since its results are no substitute for those of a full one.

    Raises:
        DetkitError: nothing can be written there.
    """
    path = Path(options.output) if options.output else default_output(benchmark + "-quick" * options.quick, machine)
    remedy = "Give a file in a folder that can be written to: --output results/mine.json."
    if path.is_dir():
        raise DetkitError(f"The results cannot be written to '{path.absolute()}', which is a folder. {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise DetkitError(f"The results cannot be written to the folder '{path.parent.absolute()}'. {remedy}")
    return path


def write_report(
    benchmark: str,
    cases: Sequence[Case],
    options: BenchOptions,
    machine: dict[str, Any],
    command: str,
    **more: Any,
) -> tuple[Path, dict[str, Any]]:
    """Write the JSON file; its path, and what it holds."""
    given = asdict(options) | {"rounds": options.round_count, "seconds": options.sample_seconds}
    del given["output"]
    report = {
        "benchmark": benchmark,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine,
        "options": given,
        **more,
        "cases": [asdict(case) for case in cases],
    }
    path = output_path(benchmark, machine, options)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path, report


def console() -> Console:
    """Where tables go; wide enough that no number is broken in two, whatever the width of the window."""
    plain = Console()
    return Console(width=max(plain.width, 120))


def conditions(machine: dict[str, Any], options: BenchOptions) -> str:
    """One line: the hardware, threads and seed."""
    threads = counted(options.threads, "thread")
    return f"{hardware_name(machine)}; {threads}, seed {options.seed}"


def growth(cases: Sequence[Case]) -> dict[str, Any] | None:
    """By how much a call takes longer at ten times the boxes: {"from", "to", "factor": {candidate: factor}}, for the
    largest such pair among cases of one kind, or None."""
    by_work = {case.work: case for case in cases}
    pairs = [work for work in by_work if work * 10 in by_work]
    if not pairs:
        return None
    small, large = ({row.name: row.median_us for row in by_work[work].rows} for work in (max(pairs), max(pairs) * 10))
    factors = {
        name: after / before for name, after in large.items() if after and (before := small.get(name)) is not None
    }
    return {"from": max(pairs), "to": max(pairs) * 10, "factor": factors}


def table(title: str, cases: Sequence[Case], unit: str, facts: Sequence[str] = ()) -> Table:
    """The cases of one kind: a column for each size; the candidates' time, ratio, rate and differences below one
    another.

    Args:
        title: above it.
        cases: of one kind and device, in increasing order.
        unit: of the work: "boxes".
        facts: which of the cases' facts to show above the times.
    """
    grown = growth(cases)
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column(unit, no_wrap=True)
    for case in cases:
        out.add_column(case.size, justify="right", no_wrap=True)
    if grown:
        out.add_column(f"{short_count(grown['from'])} to {short_count(grown['to'])}", justify="right", no_wrap=True)
    for fact in facts:
        out.add_row(fact, *(f"{case.facts[fact]:,}" for case in cases))
    names = sorted(
        dict.fromkeys(row.name for case in cases for row in case.rows), key=lambda name: not name.startswith("detkit")
    )

    def section(heading: str, cell: Any, last: Any = None) -> None:
        out.add_row(Text(heading, style="italic"))
        for name in names:
            found = [next((row for row in case.rows if row.name == name), None) for case in cases]
            cells = ["" if row is None else cell(row) for row in found]
            if any(cells):
                style = "bold" if name.startswith("detkit") else ""
                out.add_row(f"  {name}", *cells, *([last(name)] if last else []), style=style)

    factor = grown["factor"] if grown else {}
    section("time a call", _time_cell, lambda name: f"x {factor[name]:.1f}" if name in factor else "")
    section("times as fast as torchvision", lambda row: "" if row.ratio is None else _three_digits(row.ratio))
    section(f"{unit} a second", lambda row: "" if row.rate is None else short_count(row.rate))
    if any(row.peak_bytes is not None for case in cases for row in case.rows):
        section("memory of a call", lambda row: "" if row.peak_bytes is None else f"{short_count(row.peak_bytes)}B")
    if any(row.differences for case in cases for row in case.rows):
        section("entries that differ", lambda row: f"{row.differences:,}" if row.differences else "")
    return out


def short_time(microseconds: float) -> str:
    """12.3 µs, 1.04 ms, 5.40 s."""
    microseconds = float(f"{microseconds:.3g}")  # 999.9 is 1000
    unit, size = next(((unit, size) for unit, size in (("s", 1e6), ("ms", 1e3)) if microseconds >= size), ("µs", 1.0))
    return f"{_three_digits(microseconds / size)} {unit}"


def short_count(number: float) -> str:
    """950, 10k, 7.72M."""
    number = float(f"{number:.3g}")
    suffixes = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    suffix, size = next(((suffix, size) for suffix, size in suffixes if number >= size), ("", 1.0))
    return f"{number / size:g}{suffix}"


def _time_cell(row: Row) -> str:
    if row.median_us is not None:
        return short_time(row.median_us)
    return (row.left_out or "").split(":")[0]


def _three_digits(number: float) -> str:
    return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _opencv_version() -> str:
    import cv2

    return str(cv2.__version__)
