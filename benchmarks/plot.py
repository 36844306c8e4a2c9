"""The images of benchmarks: boxes a second against their number; objects found against the number of proposals."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.report import short_count
from detkit.errors import DetkitError

# The same in every panel, and in this order in the legend; told apart without colours by the markers.
STYLES = {
    "detkit": ("#d62728", "o"),
    "torchvision": ("#1f77b4", "s"),
    "torchvision per image": ("#17becf", "D"),
    "OpenCV": ("#2ca02c", "^"),
    "NumPy loop": ("#8c564b", "v"),
    "lsnms": ("#9467bd", "P"),
    "powerboxes": ("#e377c2", "X"),
    "powerboxes r-tree": ("#ff7f0e", "*"),
    "detkit, to the host": ("#ff9896", "<"),
    "torchvision, to the host": ("#aec7e8", ">"),
    "torch.sort of scores": ("#7f7f7f", "."),
}


def require_matplotlib() -> None:
    """Raises DetkitError, with the remedy, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DetkitError("The plot needs matplotlib: pip install -e '.[plot]'. To do without it: --plot false.")


def plot_rates(cases: Sequence[Case], title: str, path: Path) -> Path:
    """Write a PNG with a panel for each kind of input and device; its path.

    Args:
        cases: all that was measured.
        title: names the hardware.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((case.kind, case.device) for case in cases))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 1.6 + 3.9 * lines), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (kind, device) in zip(axes.flatten(), panels):
        _draw(axis, [case for case in cases if (case.kind, case.device) == (kind, device)], handles)
        axis.set_title(f"{kind} boxes on {'the CPU' if device == 'cpu' else 'the GPU'}")
        axis.tick_params(labelbottom=True, labelleft=True)
    for axis in axes.flatten()[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("boxes before suppression")
    for axis in axes[:, 0]:
        axis.set_ylabel("boxes a second")
    figure.suptitle(title)
    names = [name for name in STYLES if name in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=2 * columns + 1, frameon=False
    )
    figure.savefig(path)
    return path


def plot_recall(cases: Sequence[Case], title: str, path: Path) -> Path:
    """Write a PNG with a panel for each data set, of recall and best overlap against the proposals; its path.

    Args:
        cases: with the facts of `benchmarks.proposals.measure`.
        title: names the hardware.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(cases), 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False).flatten()
    for axis, case in zip(axes, cases):
        for row in case.rows:
            colour, marker = STYLES[row.name]
            for fact, line, label in (("recall", "-", "recall"), ("mabo", ":", "mean average best overlap")):
                values = case.facts[fact][row.name]
                axis.plot(
                    *zip(*values.items()), color=colour, marker=marker, linestyle=line, label=f"{row.name}, {label}"
                )
        rates = ", ".join(f"{row.name} {row.rate:.2f}" for row in case.rows)
        axis.set_title(f"{case.kind}, {case.size}; a second: {rates}", fontsize=10)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axis.set_xlabel("proposals of an image")
        axis.grid(visible=True, which="major", color="#dddddd")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path)
    return path


def _draw(axis: Any, cases: Sequence[Case], handles: dict[str, Any]) -> None:
    for name in dict.fromkeys(row.name for case in cases for row in case.rows):
        points = [(case.work, row.rate) for case in cases for row in case.rows if row.name == name and row.rate]
        colour, marker = STYLES[name]
        ours, scale = name.startswith("detkit"), name.startswith("torch.sort")
        (line,) = axis.plot(
            *zip(*points),
            color=colour,
            marker=marker,
            linestyle=":" if scale else "-",
            linewidth=2.5 if ours else 1.2,
            zorder=3 if ours else 2,
        )
        handles.setdefault(name, line)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(lambda value, _: short_count(value))
    axis.xaxis.set_minor_formatter("")
    axis.grid(visible=True, which="major", color="#dddddd")
