"""`python -m benchmarks train_step`: forward, loss, backward and SGD of detkit's networks beside torchvision's own."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from benchmarks.harness import Budget, Candidate, Case, compare, cpu_threads, run_python
from benchmarks.models import (
    detkit_model,
    load_side,
    memory,
    model_names,
    photos,
    plausible_model,
    speed_table,
)
from benchmarks.options import TrainStepOptions
from benchmarks.report import conditions, console, hardware, output_path, write_report
from detkit.data.transforms import Fit
from detkit.engine.malloc import keep_freed_memory
from detkit.errors import DetkitError, counted
from detkit.inference.optimization import bf16_instructions
from detkit.model import Model
from detkit.structures import Target

LEARNING_RATE = 1e-6
"""So small that the network stays as it is: all steps have the same work."""
LOSS_TOLERANCE = 0.01
OBJECTS = 7
"""Of each image, made up."""
MEMORY_STEPS = 3
LOSS_NAMES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "classification": "class",
    "bbox_regression": "box",
}
CONDITIONS = (
    "all parameters trained, batch norms in training mode; on both sides fused SGD with momentum, and memory freed by "
    "a step kept for the next (detkit.engine.malloc); detkit's network in channels_last and in {precision}, as "
    "`detkit train` has it, torchvision's as it comes, in fp32"
)


@dataclass(frozen=True)
class TrainingBatch:
    """What a step learns from.

    Args:
        images: (B, 3, H, W) float32 in 0..1.
        targets: one for each image, with masks.
    """

    images: Tensor
    targets: tuple[Target, ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each image."""
        return ((self.images.shape[2], self.images.shape[3]),) * len(self.images)

    def to(self, device: str) -> "TrainingBatch":
        """The same on `device`."""
        return TrainingBatch(self.images.to(device), tuple(target.to(device) for target in self.targets))


def bench_train_step(options: TrainStepOptions, command: str = "") -> dict[str, Any]:
    """Check, measure, print a table, write the JSON; returns what the JSON holds.

    Losses are compared with every anchor and proposal sampled, so that nothing is left to chance.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, or when detkit's losses are not torchvision's.
    """
    devices, names, machine, out = options.devices(), model_names(options.models), hardware(), console()
    output_path("train_step", machine, options)  # an error now, not after minutes
    source, images = photos(options.source)
    stated = CONDITIONS.format(precision=options.precision)
    out.print(f"{conditions(machine, options)}; {source}\n{stated}")
    keep_freed_memory()
    cases: list[Case] = []
    with cpu_threads(options.threads):
        for name in names:
            for device in devices:
                cases.append(_measure(name, images, device, options))
    for device in devices:
        out.print()
        of_device = [case for case in cases if case.device == device]
        out.print(speed_table(f"a step on {device}, ms for each of its images", of_device), soft_wrap=False)
    path, report = write_report("train_step", cases, options, machine, command, images=source, conditions=stated)
    out.print(f"\nresults -> {path}")
    return report


def training_batch(images: Sequence[np.ndarray], size: int, count: int, seed: int) -> TrainingBatch:
    """`count` images stretched to `size` pixels, with made-up objects: boxes of a tenth to two thirds of the side,
    masks of the ellipses in them."""
    generator = torch.Generator().manual_seed(seed)
    fit = Fit((size, size))
    pixels = torch.stack([fit.image(images[number % len(images)]) for number in range(count)])
    targets = []
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    for _ in range(count):
        sides = size * (0.1 + 0.55 * torch.rand(OBJECTS, 2, generator=generator))
        corners = (size - sides) * torch.rand(OBJECTS, 2, generator=generator)
        boxes = torch.cat((corners, corners + sides), dim=1)
        (x, y), (width, height) = ((corners + sides / 2).T[..., None, None], sides.T[..., None, None])
        masks = ((columns - x) / width) ** 2 + ((rows - y) / height) ** 2 <= 0.25
        labels = torch.randint(90, (OBJECTS,), generator=generator)
        targets.append(Target(boxes, labels, masks=masks))
    return TrainingBatch(pixels, tuple(targets))


def peaks(
    side: str,
    name: str,
    size: int,
    file: str,
    device: str,
    threads: int,
    source: str | None,
    batch: int,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """The memory that one side takes in a process of its own; see benchmarks.models.memory."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    learned = training_batch(photos(source)[1], size, batch, seed).to(device)
    return memory(
        lambda: partial(_repeat, _step(side, load_side(side, name, size, file), learned, device, precision)), device
    )


def _measure(name: str, images: Sequence[np.ndarray], device: str, options: TrainStepOptions) -> Case:
    size, count = step_shape(name, options)
    batch = training_batch(images, size, count, options.seed).to(device)
    reference = plausible_model(name, size, images[0], options.seed).to(device)
    state = {key: value.cpu() for key, value in reference.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        # Before the steps change them.
        file = str(Path(folder) / "weights.pth")
        torch.save(state, file)
        console().print(f"{name} on {device}: memory of each side, in a process of its own", style="dim")
        found = _memory(name, file, size, count, device, options)
    console().print(f"{name} on {device}: losses, then times in turns", style="dim")
    model = detkit_model(name, state, size).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    losses = compare_losses(reference, model, batch, f"{name} on {device}, seed {options.seed}")
    steps = {
        "torchvision": _step("torchvision", reference, batch, device),
        "detkit": _step("detkit", model, batch, device, options.precision),
    }
    candidates = [Candidate(side, step, compiles=True) for side, step in steps.items()]
    rows = compare(candidates, _check, count, Budget(options.round_count, options.sample_seconds))
    for row in rows:
        row.peak_bytes = found[row.name]["peak"]
    facts = {"losses": losses, "memory": found, "precision": step_precision(options.precision, device)}
    return Case(name, device, batch_label(count, size), count, rows, facts)


def _memory(name: str, file: str, size: int, count: int, device: str, options: TrainStepOptions) -> dict[str, Any]:
    """`peaks` of both sides."""
    arguments = (
        f"{name!r}, {size}, {file!r}, {device!r}, {options.threads}, {options.source!r}, {count}, {options.seed}, "
        f"{options.precision!r}"
    )
    code = "import json; from benchmarks.train_step import peaks; print(json.dumps(peaks({!r}, {})))"
    return {side: run_python(code.format(side, arguments)) for side in ("torchvision", "detkit")}


def _check(side: str, loss: float) -> None:
    if not np.isfinite(loss):
        raise DetkitError(f"A training step of {side} has the loss {loss}.")


def step_shape(name: str, options: TrainStepOptions) -> tuple[int, int]:
    """The side of the images in pixels, and how many a step has."""
    is_ssd = name.startswith("ssd300")
    return 300 if is_ssd else options.input_size, options.batch or (8 if is_ssd else 2)


def batch_label(count: int, size: int) -> str:
    """Images of a step, as tables name them."""
    return f"{counted(count, 'image')} of {size} px"


def step_precision(asked: str, device: str) -> str:
    """What detkit's step computes in, fp32 or bf16: "auto" is what train.precision auto takes."""
    if asked != "auto":
        return asked
    return "bf16" if bf16_instructions(torch.device(device)) else "fp32"


def _step(
    side: str, model: Any, batch: TrainingBatch, device: str, precision: str = "fp32", rate: float = LEARNING_RATE
) -> Callable[[], float]:
    """One step, which returns the sum of the losses."""
    optimizer, losses = learner(side, model, device, precision, rate)
    return partial(take_step, optimizer, partial(losses, batch))


def learner(
    side: str, model: Any, device: str, precision: str, rate: float
) -> tuple[SGD, Callable[[TrainingBatch], dict[str, Tensor]]]:
    """The optimiser of a model, and its losses of a batch; of torchvision always in fp32."""
    model.to(device)
    model.train()
    if side == "detkit":
        model.to(memory_format=torch.channels_last)
        groups = model.parameter_groups(rate, 1.0, 1e-4)
        half = step_precision(precision, device) == "bf16"
        return SGD(groups, momentum=0.9, fused=True), partial(_detkit_losses, model, half)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SGD(parameters, rate, momentum=0.9, weight_decay=1e-4, fused=True)
    return optimizer, partial(_torchvision_losses, model)


def take_step(optimizer: SGD, losses: Callable[[], dict[str, Tensor]]) -> float:
    """Forward, backward and a step; the sum of the losses before it."""
    total = torch.stack(list(losses().values())).sum()
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def _repeat(step: Callable[[], float]) -> None:
    for _ in range(MEMORY_STEPS):
        step()


def _detkit_losses(model: Model, half: bool, batch: TrainingBatch) -> dict[str, Tensor]:
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=half):
        return model.head.loss(model(batch.images, batch.sizes), batch.targets)


def _torchvision_losses(model: Any, batch: TrainingBatch) -> dict[str, Tensor]:
    targets = []
    for target in batch.targets:
        found = {"boxes": target.boxes, "labels": target.labels + 1}
        if hasattr(model, "roi_heads") and model.roi_heads.has_mask() and target.masks is not None:
            found["masks"] = target.masks.byte()
        targets.append(found)
    losses: dict[str, Tensor] = model(list(batch.images), targets)
    return {LOSS_NAMES[name]: value for name, value in losses.items()}


def compare_losses(reference: Any, model: Model, batch: TrainingBatch, label: str) -> dict[str, dict[str, float]]:
    """Each loss of both sides, with all anchors and proposals sampled.

    Raises:
        DetkitError: one differs.
    """
    with torch.no_grad(), _everything_sampled(reference, model):
        theirs = _torchvision_losses(reference.train(), batch)
        mine = _detkit_losses(model.train(), False, batch)
    found = {name: {"torchvision": theirs[name].item(), "detkit": mine[name].item()} for name in theirs}
    for name, values in found.items():
        if not abs(values["detkit"] - values["torchvision"]) <= LOSS_TOLERANCE * values["torchvision"]:
            raise DetkitError(
                f"detkit's loss '{name}' is {values['detkit']:.6g}, torchvision's {values['torchvision']:.6g} "
                f"({label}). This is a fault of detkit; please report it with this line."
            )
    return found


@contextmanager
def _everything_sampled(reference: Any, model: Any) -> Iterator[None]:
    """For as long, no anchor or proposal is left out of the losses at random."""
    if not hasattr(reference, "rpn"):
        yield
        return
    stages = [(stage, "samples", "positive_fraction") for stage in (model.head.rpn, model.head.regions)] + [
        (stage.fg_bg_sampler, "batch_size_per_image", "positive_fraction")
        for stage in (reference.rpn, reference.roi_heads)
    ]
    before = [(getattr(stage, count), getattr(stage, fraction)) for stage, count, fraction in stages]
    for stage, count, fraction in stages:
        setattr(stage, count, 10**6)
        setattr(stage, fraction, 1.0)
    try:
        yield
    finally:
        for (stage, count, fraction), (old_count, old_fraction) in zip(stages, before):
            setattr(stage, count, old_count)
            setattr(stage, fraction, old_fraction)
