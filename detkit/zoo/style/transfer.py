"""Style transfer by optimization of one image, as in `detkit style`.

Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks". No network is trained; the pixels are
optimized under the losses of the head `style`.
"""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer

from detkit.data.image import read_image, resized
from detkit.errors import ConfigError, DetkitError, check_range
from detkit.inference.paths import check_output, claimed_output
from detkit.inference.predictor import to_device
from detkit.io.files import replacing
from detkit.io.terminal import Console
from detkit.registry import heads
from detkit.tasks.drawing import write_image
from detkit.zoo.style.head import Style
from detkit.zoo.style.structures import Rendering

Losses = dict[str, float]
FINAL_LR = 0.1
"""Adam's final learning rate as a fraction of the initial one; a constant rate would leave noise in the image."""


@dataclass(frozen=True)
class StyleOptions:
    """Options of `detkit style`; all of them can be set in the config too.

    Args:
        content: the image to change.
        style: the style image.
        head: `name: style`, the loss network, the maps to compare, and the weights of the losses.
        optimizer: adam, or lbfgs, which needs fewer steps unless it diverges.
        lr: learning rate, for pixels in 0..1; adam's decreases linearly to a tenth.
        steps: number of optimization steps.
        every: interval in steps at which the image is written.
        size: longer side of the result in pixels; null for that of the content. Memory is about 8 KB per pixel.
        output: folder to write to; default runs/style/run, run2 ...
        device: auto, cpu, cuda, cuda:1 or mps.
    """

    content: str
    style: str
    head: dict[str, Any]
    optimizer: Literal["adam", "lbfgs"] = "adam"
    lr: float = 0.02
    steps: int = 200
    every: int = 50
    size: int | None = None
    output: str | None = None
    device: str = "auto"


def transfer(options: StyleOptions, output: Path) -> list[Losses]:
    """Optimize the image, and write it, its intermediate steps and losses.csv to `output`.

    Returns:
        The weighted losses by name, with their `total`, of the content itself and after each step.

    Raises:
        ConfigError: an option is not valid.
        CheckpointError: the weights of the loss network are not available.
        DataError: an image cannot be read, or is too small.
        DetkitError: a loss is not finite.
    """
    check_range("", 1, steps=options.steps, every=options.every)
    check_output(output)
    head = build_head(options)
    with claimed_output(output) as folder:
        return _transfer(options, head, folder)


def _transfer(options: StyleOptions, head: Style, output: Path) -> list[Losses]:
    content = read_content(options).to(next(head.parameters()).device)
    console = Console()
    console.print(
        f"content {options.content}, {content.shape[3]} x {content.shape[2]} pixels\nstyle   {options.style}\n"
        f"output  {output}"
    )
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    history: list[Losses] = []
    started = time.perf_counter()
    with bar:
        shown = bar.add_task("", total=options.steps, status="")

        def after(losses: Losses, image: Tensor) -> None:
            history.append(losses)
            step = len(history) - 1
            status = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            bar.update(shown, completed=step, status=status)
            if step % options.every == 0:
                console.print(f"step {step}  {status}")
                _write(output / f"step_{step:05d}.jpg", image)

        image = optimise(head, content, options, after)
    path = output / f"{Path(options.content).stem}_in_{Path(options.style).stem}.png"
    _write(path, image)
    _write_losses(output / "losses.csv", history)
    first, last = history[0]["total"], history[-1]["total"]
    console.print(
        f"loss {first:.4g} -> {last:.4g}, {first / max(last, 1e-12):.1f} times lower, in {options.steps} steps and "
        f"{time.perf_counter() - started:.0f} s -> {path}"
    )
    return history


def build_head(options: StyleOptions) -> Style:
    """Build the head `style` on its device, with the style loaded."""
    name = str(options.head.get("name"))
    if name != "style":
        raise ConfigError(f"A config for detkit style has the head 'style', but this one has '{name}'.")
    given = {**options.head, "style_image": options.style}
    head: Style = heads.build(given, "head", channels=(3,), strides=(1,), num_classes=0)
    head = to_device(head, options.device)
    head.prepare()
    return head.eval()


def read_content(options: StyleOptions) -> Tensor:
    """Read an image as (1, 3, H, W) float32 in 0..1, resized to the given size."""
    pixels = read_image(options.content)
    if options.size is not None:
        check_range("", 1, size=options.size)
        pixels = resized(pixels, options.size)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def optimise(head: Style, content: Tensor, options: StyleOptions, after: Callable[[Losses, Tensor], None]) -> Tensor:
    """Optimize the image, starting from the content, and return it, (1, 3, H, W) in 0..1.

    Args:
        after: called with the losses of the content and of the image after each step.

    Raises:
        DetkitError: a loss is not finite.
    """
    target = head.content_features(content)
    image = content.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer: Optimizer
    if options.optimizer == "adam":
        optimizer = Adam([image], lr=options.lr)
    else:
        # One iteration with one evaluation per step.
        optimizer = LBFGS([image], lr=options.lr, max_iter=1, history_size=20)
    for step in range(options.steps + 1):
        optimizer.zero_grad()
        losses = head.compare(image, target)
        total = torch.stack(list(losses.values())).sum()
        values = {"total": total.item(), **{name: value.item() for name, value in losses.items()}}
        if not math.isfinite(values["total"]):
            raise DetkitError(f"The loss is {values['total']} after {step} steps. Lower lr, or use optimizer adam.")
        after(values, image.detach())
        if step == options.steps:
            break
        total.backward()
        if options.optimizer == "adam":
            optimizer.param_groups[0]["lr"] = options.lr * (1 - (1 - FINAL_LR) * step / options.steps)
        optimizer.step(lambda total=total: total)
        with torch.no_grad():
            image.clamp_(0, 1)
    return image.detach()


def _write(path: Path, image: Tensor) -> None:
    write_image(path, Rendering(image[0].float()).pixels())


def _write_losses(path: Path, history: list[Losses]) -> None:
    with replacing(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *history[0]])
        writer.writeheader()
        writer.writerows({"step": step, **losses} for step, losses in enumerate(history))
