"""`detkit check`: read a data set completely and report its content and its problems."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from detkit.boxes.anchors import kmeans_priors
from detkit.config import InputOptions
from detkit.data.dataset import Dataset
from detkit.data.splits import Split, check_names, check_splits, open_split
from detkit.data.transforms import Fit, map_boxes
from detkit.errors import DataError
from detkit.io.terminal import Console
from detkit.registry import datasets, option_names
from detkit.structures import IGNORED_PIXEL, Target


def check(
    data: dict[str, Any],
    needs: frozenset[str] = frozenset(),
    open_set: bool = False,
    check_data: Callable[[Dataset, str], None] = lambda dataset, split: None,
) -> int:
    """Print every problem of both splits, and the counts of images and objects, or of pixels.

    The data are opened and compared as in training, but with `broken: repair`, which runs all checks and decodes every
    image; nothing on disk is changed.

    Args:
        data: the experiment's `data`.
        needs: the fields of Target that the head reads.
        open_set: the splits may have different classes.
        check_data: further checks of the task, given the data set and the name of the split.

    Returns:
        The number of problems subject to `broken`, which are printed with "repair"; harmless ones are printed but not
        counted.

    Raises:
        DataError: the data cannot be used for training with any policy.
        ConfigError: `data` has an unknown option.
    """
    console = Console()
    check_names(data)
    problems = 0
    opened = []
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        dataset = _open_repaired(data, split, needs)
        for problem in dataset.problems.found:
            policy = "" if problem.harmless else "repair: "
            console.print(f"{problem.kind}: {problem.where}: {problem.message} -> {policy}{problem.action}")
        problems += sum(not problem.harmless for problem in dataset.problems.found)
        console.print(_statistics(dataset, f"{split} ({data.get(split, split)})", console))
        for line in dataset.problems.counts():
            console.print(line)
        opened.append(dataset)
    for split, dataset in zip(splits, opened):
        check_data(dataset, str(data.get(split, split)))
    check_splits(opened[0], opened[1], data, open_set)
    return problems


def propose_anchors(data: dict[str, Any], fitting: InputOptions, count: int) -> None:
    """Print `count` YOLO anchors for the objects of the training split, in config format.

    They are clustered by IoU (detkit.boxes.kmeans_priors) in pixels of the network's input, without augmentation and
    without crowds and difficult objects.

    Raises:
        DataError: there are fewer distinct box shapes than anchors.
    """
    dataset = _open_repaired(data, "train")
    fit = Fit(fitting.size, fitting.resize)
    sides = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        boxes = map_boxes(target.boxes[~target.ignored], fit.matrix(dataset.size(index)))
        sides.append(boxes[:, 2:] - boxes[:, :2])
    shapes = torch.cat(sides)
    distinct = len(shapes.unique(dim=0))
    if distinct < count:
        raise DataError(
            f"--anchors is {count}, but the objects of the training split have only {distinct} distinct shapes. Set it "
            f"to at most {distinct}."
        )
    anchors, overlap = kmeans_priors(shapes, count)
    rounded = [[round(side, 1) for side in anchor] for anchor in anchors.tolist()]
    height, width = fitting.size
    print(
        f"{count} anchors for the {len(shapes)} objects of the training split at input.size [{height}, {width}] "
        f"({fitting.resize}), mean IoU with the best {overlap:.3f}:\nhead:\n  anchors: {rounded}"
    )


def _open_repaired(data: dict[str, Any], split: Split, needs: frozenset[str] = frozenset()) -> Dataset:
    return open_split(_repaired(data), split, needs)


def _repaired(data: dict[str, Any]) -> dict[str, Any]:
    """Set `broken: repair` in `data` if its format has that option; for crops, in the inner data set."""
    if isinstance(data.get("data"), dict):
        return {**data, "data": _repaired(data["data"])}
    known = option_names(datasets.get(str(data["name"]))) if "name" in data else set()
    return {**data, "broken": "repair"} if "broken" in known else dict(data)


def _statistics(dataset: Dataset, title: str, console: Console) -> Table:
    """Create a table of objects by class with their sizes, of pixels by class for semantic maps, or of images by class
    for data without objects."""
    if "semantic" in dataset.fields:
        return _pixels_by_class(dataset, title, console)
    if "boxes" not in dataset.fields:
        return _images_by_class(dataset, title)
    counts = [0] * len(dataset.classes)
    sides: list[list[float]] = [[] for _ in counts]
    empty = 0
    totals: Counter[str] = Counter()
    for index in track(
        range(len(dataset)), "counting", console=console, disable=not console.is_terminal, transient=True
    ):
        target = dataset.target(index)
        empty += not len(target)
        totals.update(_totals(target))
        for box, label in zip(target.boxes.tolist(), target.labels.tolist()):
            counts[label] += 1
            sides[label].append(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)
    of_these = "".join(f", {count} {what}" for what, count in totals.items() if count)
    table = Table(
        title=f"{title}: {len(dataset)} images, {empty} of them without objects, {sum(counts)} objects{of_these}"
    )
    table.add_column("class")
    for header in ("raw id", "objects", "smallest", "median", "largest"):
        table.add_column(header, justify="right")
    for name, raw_id, count, side in zip(dataset.classes.names, dataset.classes.raw_ids, counts, sides):
        side.sort()
        figures = (
            [f"{side[0]:.0f} px", f"{side[len(side) // 2]:.0f} px", f"{side[-1]:.0f} px"] if side else ["", "", ""]
        )
        table.add_row(escape(name), str(raw_id), str(count), *figures)
    return table


def _totals(target: Target) -> dict[str, int]:
    """Count the objects of an image with special properties."""
    totals = {"crowd regions": int(target.crowd.sum()), "difficult": int(target.difficult.sum())}
    if target.masks is not None:
        totals["masks"] = len(target.masks)
        totals["masks without pixels"] = int((~target.masks.flatten(1).any(1)).sum())
    if target.visible is not None:
        totals["with points"] = int(target.visible.any(1).sum())
        totals["visible points"] = int(target.visible.sum())
    return totals


def _pixels_by_class(dataset: Dataset, title: str, console: Console) -> Table:
    pixels, images = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for index in track(
        range(len(dataset)), "counting", console=console, disable=not console.is_terminal, transient=True
    ):
        semantic = dataset.target(index).semantic
        assert semantic is not None
        counts = torch.bincount(semantic.flatten(), minlength=256)
        pixels += counts
        images += counts > 0
    total = max(1, int(pixels.sum()))
    ignored = 100 * int(pixels[IGNORED_PIXEL]) / total
    table = Table(title=f"{title}: {len(dataset)} images, {ignored:.1f} % of their pixels not counted")
    table.add_column("class")
    for header in ("raw id", "images", "share of pixels"):
        table.add_column(header, justify="right")
    for name, raw_id, count, seen in zip(
        dataset.classes.names, dataset.classes.raw_ids, pixels.tolist(), images.tolist()
    ):
        table.add_row(escape(name), str(raw_id), str(seen), f"{100 * count / total:.2f} %")
    return table


def _images_by_class(dataset: Dataset, title: str) -> Table:
    counts = [0] * len(dataset.classes)
    for index in range(len(dataset)):
        labels = dataset.target(index).image_labels
        for label in labels.tolist() if labels is not None else ():
            counts[label] += 1
    table = Table(title=f"{title}: {len(dataset)} images")
    table.add_column("class")
    table.add_column("raw id", justify="right")
    table.add_column("images", justify="right")
    for name, raw_id, count in zip(dataset.classes.names, dataset.classes.raw_ids, counts):
        table.add_row(escape(name), str(raw_id), str(count))
    return table
