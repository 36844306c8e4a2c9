"""`python -m benchmarks tables`: the tables of whole networks in docs/pages/benchmarks.md, made from the results.

There is a table for each machine, number of threads and set of images. Of several measurements of the same thing the
latest counts.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import hardware_name, short_count, short_time
from detkit.errors import DetkitError, counted

PLACE = re.compile(r"(<!-- benchmarks/tables\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
VARIANTS = [f"{precision}{rest}" for rest in ("", ", compiled") for precision in ("fp32", "bf16", "fp16", "auto")]
REFERENCES = ("torchvision", "ultralytics")
Record = dict[str, Any]
"""What a JSON file holds, and under "file" its path."""


@dataclass
class Measured:
    """One network on one machine.

    Args:
        label: as the table names it.
        reference: of each way that detkit ran, the row of whom it is compared with, measured in the same minutes.
        detkit: of each way, detkit's own row.
    """

    label: str
    reference: dict[str, Record | None]
    detkit: dict[str, Record]


def tables(folder: Path) -> dict[str, str]:
    """Markdown by the name of a table: inference, train_step, yolo, learning, scaling; empty where nothing is measured.

    Args:
        folder: whose *.json are read; those of quick runs, of other benchmarks and of other programs are left out.
    """
    records = [{**json.loads(path.read_text(encoding="utf-8")), "file": path} for path in sorted(folder.glob("*.json"))]
    measured = (record for record in records if "benchmark" in record and not record["options"].get("quick"))
    records = sorted(measured, key=lambda record: record["date"])

    def of(benchmark: str, wanted: Callable[[Record], bool] = lambda case: True) -> list[tuple[Record, Record]]:
        """(record, case), the earliest first."""
        chosen = [record for record in records if record["benchmark"] == benchmark]
        return [(record, case) for record in chosen for case in record["cases"] if wanted(case)]

    return {
        "inference": _speed(of("inference", lambda case: not _is_yolo(case)), "an image"),
        "yolo": _speed(of("inference", _is_yolo), "an image, from its file"),
        "train_step": _speed(of("train_step"), "a step"),
        "learning": _learning(of("learning")),
        "scaling": _scaling([record for record in records if record["benchmark"] == "scaling"]),
    }


def with_tables(text: str, found: dict[str, str]) -> str:
    """The text with the tables in their places.

    Raises:
        DetkitError: there is a place for an unknown table, or none for a known one.
    """
    places = [name for _, name, _ in PLACE.findall(text)]
    if sorted(places) != sorted(found):
        raise DetkitError(
            f"The page has places for the tables {places}, but there are {list(found)}. A place is a line "
            f"<!-- benchmarks/tables.py: NAME --> and further down a line <!-- end -->, once for each."
        )
    return PLACE.sub(lambda match: match[1] + found[match[2]] + match[3], text)


def rewrite(page: Path, folder: Path) -> bool:
    """Put the tables of a folder's results into a page; whether that changed it."""
    before = page.read_text(encoding="utf-8")
    after = with_tables(before, tables(folder))
    page.write_text(after, encoding="utf-8")
    return after != before


def _is_yolo(case: Record) -> bool:
    return str(case["kind"]).startswith("yolo")


def _speed(measured: Iterable[tuple[Record, Record]], unit: str) -> str:
    """Times and memory, a line of each for every network."""
    groups: dict[str, dict[str, Measured]] = {}
    files: dict[str, list[Path]] = {}
    reference_of: dict[str, str] = {}
    for record, case in measured:
        calls = 1 if record["benchmark"] == "train_step" else case["work"]
        rows = {row["name"]: {**row, "median_us": row["median_us"] / calls} for row in case["rows"]}
        reference = next((name for name in REFERENCES if name in rows), "")
        group = f"{_machine(record, case)}; {record['images']}"
        reference_of[group] = reference or reference_of.get(group, "")
        files.setdefault(group, []).append(record["file"])
        networks = groups.setdefault(group, {})
        network = networks.setdefault(f"{case['kind']} {case['size']}", Measured(_label(case), {}, {}))
        for name, row in rows.items():
            if name.startswith("detkit"):
                variant = _variant(record, case, name)
                network.detkit[variant], network.reference[variant] = row, rows.get(reference)
    return "".join(
        f"\n{group} ({_links(files[group])}):\n\n{_speed_table(list(networks.values()), reference_of[group], unit)}"
        for group, networks in reversed(groups.items())
    )


def _speed_table(networks: Sequence[Measured], reference: str, unit: str) -> str:
    variants = [variant for variant in VARIANTS if any(variant in network.detkit for network in networks)]
    lines = [[unit, "", *([reference] if reference else []), *(f"detkit, {variant}" for variant in variants)]]
    for network in networks:
        first = next((row for variant in variants if (row := network.reference.get(variant)) is not None), None)
        head = [network.label, "time", *([_time(first)] if reference else [])]
        lines.append([*head, *(_time_and_ratio(network, variant) for variant in variants)])
        if any(row["peak_bytes"] for row in network.detkit.values()):
            head = ["", "peak memory", *([_memory(first)] if reference else [])]
            lines.append([*head, *(_memory(network.detkit.get(variant)) for variant in variants)])
    return _markdown(lines)


def _time_and_ratio(network: Measured, variant: str) -> str:
    row, reference = network.detkit.get(variant), network.reference.get(variant)
    ratio = f" ({reference['median_us'] / row['median_us']:.2f}x)" if row and reference else ""
    return _time(row) + ratio


def _time(row: Record | None) -> str:
    return short_time(row["median_us"]) if row else ""


def _memory(row: Record | None) -> str:
    return f"{short_count(row['peak_bytes'])}B" if row and row["peak_bytes"] else ""


def _variant(record: Record, case: Record, name: str) -> str:
    """How a row of detkit ran: what the predictor said ("cpu, bf16 (AMX), ..., compiled"), else what was asked for."""
    choices = case["facts"].get("choices")
    precision = _precision(record, case)
    said = choices[name] if isinstance(choices, dict) else choices
    if said is None:
        compiled = record["options"].get("compile", False)
    else:
        precision, compiled = said.split(", ")[1].split(" ")[0], not said.endswith("not compiled")
    return f"{precision}{', compiled' if compiled else ''}"


def _precision(record: Record, case: Record) -> str:
    """What a step was computed in, where the benchmark says so; else what was asked for."""
    return str(case["facts"].get("precision") or record["options"].get("precision", "fp32"))


def _label(case: Record) -> str:
    facts = case["facts"]
    own = f" ({facts['gflops']:.1f} GFLOPs)" if facts.get("gflops") else ""
    peer = facts.get("peer")
    beside = f" beside {peer['model'].removesuffix('.yaml')} ({peer['gflops']:.1f} GFLOPs)" if peer else ""
    return f"`{case['kind']}`{own}{beside}, {case['size']}"


def _learning(measured: Iterable[tuple[Record, Record]]) -> str:
    """The mean loss at the end of each seed's run."""
    groups: dict[str, dict[str, list[str]]] = {}
    files: dict[str, list[Path]] = {}
    for record, case in measured:
        options, ends = record["options"], case["facts"]["ends"]
        group = f"{_machine(record, case)}; detkit in {_precision(record, case)}; {record['images']}"
        losses = [", ".join(f"{value:.3f}" for value in ends[side]) for side in ("torchvision", "detkit")]
        cells = [f"`{case['kind']}`, {case['size']}", str(options["steps"]), *losses]
        groups.setdefault(group, {})[cells[0]] = cells
        files.setdefault(group, []).append(record["file"])
    header = ["loss at the end", "steps", "torchvision, three seeds", "detkit, the same"]
    return "".join(
        f"\n{group} ({_links(files[group])}):\n\n{_markdown([header, *lines.values()])}"
        for group, lines in reversed(groups.items())
    )


def _scaling(records: Sequence[Record]) -> str:
    """By which power of the size time and memory grow between the largest two sizes."""
    latest = {_machine(record, record["cases"][0]): record for record in records}
    return "".join(
        f"\n{machine} ({_links([record['file']])}):\n\n{_scaling_table(record)}"
        for machine, record in reversed(latest.items())
    )


def _scaling_table(record: Record) -> str:
    sizes: dict[str, list[str]] = {}
    for case in record["cases"]:
        sizes.setdefault(f"{case['kind']}, {case['device']}", []).append(case["size"])
    names = list(dict.fromkeys(name for rows in record["growth"].values() for name in rows))
    lines = [["grows with", "from, to", *(f"{name}: time, memory" for name in names)]]
    for axis, rows in record["growth"].items():
        powers = [
            ", ".join(_power(rows[name].get(what)) for what in ("time", "memory")) if name in rows else ""
            for name in names
        ]
        lines.append([axis, f"{sizes[axis][0]}, {sizes[axis][-1]}", *powers])
    return _markdown(lines)


def _power(exponents: dict[str, float] | None) -> str:
    return "-" if exponents is None else f"{round(exponents['last'], 2) + 0:.2f}"  # no -0.00


def _machine(record: Record, case: Record) -> str:
    """ "AMD EPYC, 2 cores (family 25 model 17), 2 threads"."""
    machine, threads = record["hardware"], record["options"]["threads"]
    number = f" ({machine['cpu_model_number']})" if machine.get("cpu_model_number") else ""
    device = f", on {case['device']}" if machine["gpu"] else ""
    return f"{hardware_name(machine)}{number}, {counted(threads, 'thread')}{device}"


def _links(files: Sequence[Path]) -> str:
    """Links to the files from docs/pages."""
    distinct = dict.fromkeys(files)
    return ", ".join(f"[{file.stem}](../../benchmarks/results/{file.name})" for file in distinct)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    out = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([out[0], "|" + "---|" * len(lines[0]), *out[1:]]) + "\n"
