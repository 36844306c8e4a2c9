"""`python -m benchmarks scaling`: growth of time and memory with pixels, batch, objects, classes and data."""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.optim import SGD

from benchmarks.harness import (
    Budget,
    Candidate,
    Case,
    Row,
    compare,
    cpu_threads,
    cuda_clock,
    peak_rise,
    run_python,
    wall_clock,
)
from benchmarks.models import made_up_image
from benchmarks.options import ScalingOptions
from benchmarks.report import conditions, console, hardware, output_path, short_count, short_time, write_report
from detkit.config import Experiment, InputOptions
from detkit.data.formats.coco import Coco
from detkit.engine.malloc import keep_freed_memory
from detkit.heads.ssd import SSDOutputs
from detkit.model import Model, build_model
from detkit.structures import ClassList, Target
from detkit.tasks.drawing import write_image

BOXES_AN_OBJECT = 12
"""That enter suppression for each object, as a detector gives them."""
OBJECTS_IN_DATA = 7
"""Of each image of the data set."""
LINEAR = 1.1
"""A growth with an exponent up to it is linear: the times of the largest two sizes are known to some 5 %."""
MEASURABLE = 2_000_000
"""Bytes; of less the system's counters know too little for an exponent."""
DATA = "images of a data set"


@dataclass(frozen=True)
class Setting:
    """What a network works on.

    Args:
        side: height and width of the images in pixels.
        batch: images of a call.
        objects: of each image.
        classes: of the detector.
    """

    side: int = 256
    batch: int = 2
    objects: int = 7
    classes: int = 20


@dataclass(frozen=True)
class Axis:
    """What grows while all else stays.

    Args:
        name: as the table has it.
        field: of Setting; None for the size of the data set.
        values, quick: of the field, in increasing order.
    """

    name: str
    field: str | None
    values: tuple[int, ...]
    quick: tuple[int, ...]

    def size(self, value: int) -> int:
        """What time is compared with: of the side, its square."""
        return value * value if self.field == "side" else value


AXES = (
    Axis("pixels of an image", "side", (128, 192, 256, 384, 512, 768), (64, 128)),
    Axis("images of a batch", "batch", (1, 2, 4, 8, 16), (1, 4)),
    Axis("objects of an image", "objects", (1, 10, 30, 100, 300, 1000), (1, 30)),
    Axis("classes", "classes", (20, 80, 250, 500, 1000), (20, 100)),
    Axis(DATA, None, (100, 1000, 10000), (10, 100)),
)


def bench_scaling(options: ScalingOptions, command: str = "") -> dict[str, Any]:
    """Measure, print a table for each axis, write the JSON; returns what the JSON holds.

    The network is SSD on small_ssd with random weights: a training step (forward, loss, backward, SGD), a prediction,
    and the post-processing alone, whose scores are fixed: of every object, BOXES_AN_OBJECT boxes are candidates.

    Freed memory is kept for the next call, as by `detkit train`. Else large tensors (of 16 images of 256 pixels, say,
    or two of 768) are mapped anew each time, which took 40 % of a prediction's time, but nothing of smaller ones'.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense.
    """
    devices, machine, out = options.devices(), hardware(), console()
    output_path("scaling", machine, options)  # an error now, not after minutes
    base = Setting(side=96) if options.quick else Setting()
    out.print(f"{conditions(machine, options)}; SSD on small_ssd, {base}")
    keep_freed_memory()
    cases: list[Case] = []
    growth: dict[str, Any] = {}
    with cpu_threads(options.threads):
        for device in devices:
            for axis in AXES if device == "cpu" else AXES[:-1]:
                of_axis = [
                    _measure(axis, value, base, device, options)
                    for value in (axis.quick if options.quick else axis.values)
                ]
                cases += of_axis
                growth[f"{axis.name}, {device}"] = found = exponents(of_axis)
                out.print()
                out.print(growth_table(f"{axis.name}, on {device}", of_axis, found), soft_wrap=False)
    steep = [
        f"{row}'s {what} with {axis} ({values[what]['last']:.2f})"
        for axis, rows in growth.items()
        for row, values in rows.items()
        for what in values
        if values[what]["last"] > LINEAR
    ]
    out.print(f"\ngrows faster than linearly: {'; '.join(steep) or 'nothing'}")
    path, report = write_report("scaling", cases, options, machine, command, growth=growth)
    out.print(f"results -> {path}")
    return report


def exponents(cases: Sequence[Case]) -> dict[str, dict[str, dict[str, float]]]:
    """{candidate: {"time" or "memory": {"all": e, "last": e}}}: slopes of the logarithm against that of the size, by
    least squares over all sizes, and between the largest two, where what does not grow weighs least."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in (row.name for row in cases[0].rows):
        rows = [(case.work, next(row for row in case.rows if row.name == name)) for case in cases]
        measures: dict[str, list[tuple[int, float]]] = {
            "time": [(size, row.median_us) for size, row in rows if row.median_us],
            "memory": [(size, row.peak_bytes) for size, row in rows if row.peak_bytes and row.peak_bytes >= MEASURABLE],
        }
        found[name] = {
            what: {"all": _slope(points), "last": _slope(points[-2:])}
            for what, points in measures.items()
            if len(points) > 1
        }
    return found


def growth_table(title: str, cases: Sequence[Case], growth: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Time and memory of a call at each size, and their exponents."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column("", no_wrap=True)
    for heading in (*(case.size for case in cases), "exponent", "of the last two"):
        out.add_column(heading, justify="right", no_wrap=True)
    for name in (row.name for row in cases[0].rows):
        rows = [next(row for row in case.rows if row.name == name) for case in cases]
        times = ["" if row.median_us is None else short_time(row.median_us) for row in rows]
        sizes = ["" if row.peak_bytes is None else f"{short_count(row.peak_bytes)}B" for row in rows]
        for what, cells in (("time", times), ("memory", sizes)):
            slopes = [f"{growth[name][what][key]:.2f}" for key in ("all", "last")] if what in growth[name] else ["", ""]
            out.add_row(f"{name}, {what}", *cells, *slopes)
    return out


def calls(setting: Setting, device: str, seed: int) -> dict[str, Callable[[], Any]]:
    """What is measured of a network, by name."""
    torch.manual_seed(seed)
    experiment = Experiment(
        data={"name": "shapes"},
        backbone={"name": "small_ssd"},
        head={"name": "ssd"},
        input=InputOptions((setting.side, setting.side)),
        name="scaling",
    )
    classes = ClassList.from_names([str(label) for label in range(setting.classes)])
    learner, predictor = (build_model(experiment, classes, load_weights=False).to(device) for _ in range(2))
    images = torch.rand(setting.batch, 3, setting.side, setting.side).to(device)
    targets = [_target(setting).to(device) for _ in range(setting.batch)]
    optimizer = SGD(learner.parameters(), 1e-6, momentum=0.9, fused=True)
    head: Any = predictor.eval().head
    outputs = _fixed_scores(_outputs(predictor, images), setting)
    return {
        "training step": partial(_step, learner.train(), optimizer, images, targets),
        "prediction": lambda: head.decode(_outputs(predictor, images)),
        "post-processing": partial(head.decode, outputs),
    }


def peak(name: str, setting: dict[str, int], device: str, threads: int, seed: int) -> int | None:
    """Bytes by which this one of `calls` raises the memory at most.

    For a process of its own: what a training step leaves in the allocator's pieces made a prediction behind it take
    twice the memory.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    calls(Setting(side=64, batch=1), device, seed)[name]()  # loads what is loaded once
    call = calls(Setting(**setting), device, seed)[name]
    if device != "cuda":
        return peak_rise(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def data_peak(images: int) -> int | None:
    """Bytes by which opening a data set raises the memory at most; for a process of its own."""
    with coco_data(2) as root:
        Coco(str(root), "train")
    with coco_data(images) as root:
        return peak_rise(lambda: Coco(str(root), "train"))


@contextmanager
def coco_data(photos: int) -> Iterator[Path]:
    """The folder of a data set in COCO's layout: one image under many names, OBJECTS_IN_DATA boxes in each."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("annotations", "train"):
            (root / name).mkdir()
        write_image(root / "one.jpg", made_up_image(96, 128, 0))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(photos):
            name = f"{number:012}.jpg"
            os.link(root / "one.jpg", root / "train" / name)
            images.append({"id": number, "file_name": name, "height": 96, "width": 128})
            for x, y, width, height in (random.random((OBJECTS_IN_DATA, 4)) * 40 + 4).round(2).tolist():
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": len(annotations) % 80,
                        "bbox": [x, y, width, height],
                        "area": round(width * height, 2),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label, "name": str(label)} for label in range(80)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / "instances_train.json").write_text(json.dumps(content), encoding="utf-8")
        yield root


def _measure(axis: Axis, value: int, base: Setting, device: str, options: ScalingOptions) -> Case:
    budget = Budget(options.round_count, options.sample_seconds)
    rows: list[Row]
    if axis.field is None:
        with coco_data(value) as root:
            rows = compare([Candidate("opening", partial(Coco, str(root), "train"))], _unchecked, value, budget)
        facts: dict[str, Any] = {"objects": OBJECTS_IN_DATA}
    else:
        setting = replace(base, **{axis.field: value})
        clock = cuda_clock if device == "cuda" else wall_clock
        candidates = [
            Candidate(name, call, clock, compiles=True) for name, call in calls(setting, device, options.seed).items()
        ]
        rows = compare(candidates, _unchecked, axis.size(value), budget)
        facts = dict(vars(setting))
    for row in rows:
        call = f"peak({row.name!r}, {facts}, {device!r}, {options.threads}, {options.seed})"
        row.peak_bytes = run_python(
            "import json; from benchmarks.scaling import data_peak, peak; "
            f"print(json.dumps({call if axis.field else f'data_peak({value})'}))"
        )
    label = f"{value} x {value}" if axis.field == "side" else f"{value:,}"
    return Case(axis.name, device, label, axis.size(value), rows, facts)


def _unchecked(name: str, result: Any) -> None:
    """There is nothing to compare with."""


def _step(model: Model, optimizer: SGD, images: Tensor, targets: Sequence[Target]) -> None:
    outputs = _outputs(model, images)
    torch.stack(list(model.head.loss(outputs, tuple(targets)).values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _outputs(model: Model, images: Tensor) -> Any:
    with torch.set_grad_enabled(model.training):
        return model(images, ((images.shape[2], images.shape[3]),) * len(images))


def _target(setting: Setting) -> Target:
    """Objects with sides of a twentieth to a third of the image's."""
    sides = setting.side * (0.05 + 0.28 * torch.rand(setting.objects, 2))
    corners = (setting.side - sides) * torch.rand(setting.objects, 2)
    return Target(torch.cat((corners, corners + sides), 1), torch.randint(setting.classes, (setting.objects,)))


def _fixed_scores(outputs: SSDOutputs, setting: Setting) -> SSDOutputs:
    """Outputs by which, in each image, BOXES_AN_OBJECT anchors for each object have a score of a half to nearly 1 in
    one class, as far as there are anchors, and all other scores are next to 0."""
    batch, anchors, columns = outputs.logits.shape
    logits = torch.full((batch, anchors, columns), -20.0)
    logits[..., 0] = 0.0
    count = min(anchors, BOXES_AN_OBJECT * setting.objects)
    for row in range(batch):
        chosen = torch.randperm(anchors)[:count]
        logits[row, chosen, 1 + torch.randint(setting.classes, (count,))] = 4 * torch.rand(count)
    return outputs._replace(logits=logits.to(outputs.logits.device))


def _slope(points: Sequence[tuple[int, float]]) -> float:
    return statistics.linear_regression(
        [math.log(size) for size, _ in points], [math.log(value) for _, value in points]
    ).slope
