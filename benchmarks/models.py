"""One network in detkit and in torchvision: the same architecture, weights and images, for benchmarks of models."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks.harness import Case, peak_rise
from benchmarks.report import short_count
from detkit.boxes import nms
from detkit.config import InputOptions
from detkit.data.image import read_image
from detkit.data.sources import find_images
from detkit.errors import DetkitError, nearest
from detkit.io.tensor_files import read_tensors
from detkit.model import Model, build_model, load_tensors
from detkit.published.read import PUBLISHED, find_converter

CLASSES = 91
"""Of COCO as torchvision counts them, background included."""
CANDIDATES = 300
"""Boxes of an image whose score is over the threshold: about what a trained detector finds before suppression."""
LONG_BY_SHORT = 1333 / 800
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


def model_names(text: str, others: Iterable[str] = ()) -> list[str]:
    """Names with commas between them.

    Args:
        others: what may be named besides.

    Raises:
        DetkitError: one is no model that both libraries have.
    """
    names = [name.strip() for name in text.split(",")]
    known = {*PUBLISHED, *others}
    for name in names:
        if name not in known:
            raise DetkitError(f"--models holds '{name}'. {nearest(name, known)}")
    return names


def photos(source: str | None) -> tuple[str, list[np.ndarray]]:
    """What the images are, and each as (H, W, 3) uint8 RGB.

    Args:
        source: an image, a folder of images or a glob; None for photographs that come with scikit-image, or made-up
            images where it is not installed.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    if source is not None:
        return source, [read_image(file) for file in find_images(source)]
    try:
        from skimage import data
    except ImportError:
        return "made-up images", [made_up_image(*size, seed) for seed, size in enumerate(((480, 640), (640, 480)))]
    photographs = [np.ascontiguousarray(getattr(data, name)()) for name in PHOTOGRAPHS]
    return f"photographs of scikit-image: {', '.join(PHOTOGRAPHS)}", photographs


def made_up_image(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 with structure at every scale."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, height, width)
    for cells in (3, 9, 27, 81):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        total += nn.functional.interpolate(noise, (height, width), mode="bicubic") / cells**0.5
    return ((total - total.min()) / (total.max() - total.min()) * 255).byte()[0].permute(1, 2, 0).numpy()


def torchvision_model(name: str, size: int) -> nn.Module:
    """Torchvision's model with random weights, in evaluation mode, none of its layers frozen.

    Args:
        name: one of detkit.published.PUBLISHED.
        size: what the shorter side of an image becomes in pixels, the longer one at most 1333/800 as many; SSD300
            has its own.
    """
    sizes = {} if name.startswith("ssd300") else {"min_size": size, "max_size": round(size * LONG_BY_SHORT)}
    model: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **sizes)
    return model.eval()


def plausible_model(name: str, size: int, image: np.ndarray, seed: int) -> nn.Module:
    """Like `torchvision_model`, with random weights whose outputs for `image` are those of a trained network in kind.

    Batch norms fit the image, for with those of a new network the values of 50 layers grow without bound; offsets
    are small, and few boxes have a score over the threshold. What comes out means nothing, but takes as long.
    """
    torch.manual_seed(seed)
    model: Any = torchvision_model(name, size)
    photo = as_tensor(image)
    with torch.no_grad():
        _fit_batch_norms(model, photo)
        if name.startswith("ssd300"):
            head = model.head
            _spread(model, photo, head.regression_head.module_list, 1.0)
            logits = _spread(model, photo, head.classification_head.module_list, 2.0)
            _raise_background(head.classification_head.module_list, logits, model.score_thresh)
        elif name.startswith("retinanet"):
            _spread(model, photo, [model.head.regression_head.bbox_reg], 0.2)
            classes = model.head.classification_head.cls_logits
            (values,) = _spread(model, photo, [classes], 1.0)
            least = values.flatten().topk(CANDIDATES).values[-1]
            classes.bias += math.log(model.score_thresh / (1 - model.score_thresh)) - least
        else:
            _spread(model, photo, [model.rpn.head.cls_logits], 1.0)
            _spread(model, photo, [model.rpn.head.bbox_pred], 0.2)
            _spread(model, photo, [model.roi_heads.box_predictor.bbox_pred], 1.0)
            logits = _spread(model, photo, [model.roi_heads.box_predictor.cls_score], 2.0)
            _raise_background([model.roi_heads.box_predictor.cls_score], logits, model.roi_heads.score_thresh)
    return model


def detkit_model(name: str, state: dict[str, Tensor], size: int) -> Model:
    """detkit's model of torchvision's state dict, in evaluation mode; `size` as in `torchvision_model`."""
    convert = find_converter(state)
    assert convert is not None
    tensors, experiment, classes = convert(state)
    if not name.startswith("ssd300"):
        experiment = replace(experiment, input=InputOptions((size, round(size * LONG_BY_SHORT)), "short_side"))
    model = build_model(experiment, classes, load_weights=False)
    load_tensors(model, tensors, f"torchvision's {name}")
    return model.eval()


def load_side(side: str, name: str, size: int, file: str) -> Any:
    """The model of "detkit" or "torchvision" with the weights of a file that torch.save made of a state dict."""
    state = read_tensors(file)
    if side == "detkit":
        return detkit_model(name, state, size)
    model = torchvision_model(name, size)
    model.load_state_dict(state)
    return model


def as_tensor(image: np.ndarray) -> Tensor:
    """(3, H, W) float32 in 0..1, as torchvision's models take an image."""
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div_(255)


def memory(load: Callable[[], Callable[[], Any]], device: str) -> dict[str, int | None]:
    """Bytes of a process: `libraries` once all is imported, `weights` by which the loaded model raises that, `calls` by
    which what `load` returns raises that again at most, and `peak`, the two together.

    What loading takes for a moment does not count. For a process of its own; on a GPU only `peak`, of the GPU's memory
    that torch gave out. None where the system does not say.
    """
    if device == "cuda":
        load()()
        return {"peak": torch.cuda.max_memory_allocated()}
    nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)  # loads the compiled kernel
    libraries = _resident()
    call = load()
    loaded = _resident()
    calls = peak_rise(call)
    if libraries is None or loaded is None or calls is None:
        return dict.fromkeys(("libraries", "weights", "calls", "peak"))
    weights = loaded - libraries
    return {"libraries": libraries, "weights": weights, "calls": calls, "peak": weights + calls}


def speed_table(title: str, cases: Sequence[Case]) -> Table:
    """A row for each model: milliseconds an image, median and in brackets the best, the ratio, and memory."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column("model", no_wrap=True)
    for heading in ("detkit", "torchvision", "times as fast", "memory: detkit", "torchvision"):
        out.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        rows = {row.name: row for row in case.rows}
        times = [
            f"{(rows[name].median_us or 0) / case.work / 1e3:.1f} ms "
            f"({min(rows[name].samples_us) / case.work / 1e3:.1f})"
            for name in ("detkit", "torchvision")
        ]
        peaks = [rows[name].peak_bytes for name in ("detkit", "torchvision")]
        ratio = f"{rows['detkit'].ratio:.2f}"
        out.add_row(case.kind, *times, ratio, *("" if peak is None else f"{short_count(peak)}B" for peak in peaks))
    return out


def _resident() -> int | None:
    """Bytes of memory that the process needs now; None but on Linux."""
    peak_rise(int)  # gives back to the system what is free
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _fit_batch_norms(model: Any, image: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model([image])
    for norm in norms:
        norm.momentum = momentum
        norm.eval()


def _spread(model: nn.Module, image: Tensor, layers: Iterable[nn.Module], deviation: float) -> list[Tensor]:
    """New random weights for prediction layers, with which each output has mean 0 and this deviation on the image;
    (places, channels) of those outputs, for each layer."""
    layers = list(layers)
    values: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        hooks.append(layer.register_forward_hook(lambda m, _, out: values[m].append(out.movedim(1, -1).flatten(0, -2))))
    model([image])
    for hook in hooks:
        hook.remove()
    spread = []
    for layer, outputs in ((layer, torch.cat(values[layer])) for layer in layers):
        weight: Any = layer.weight
        # One place alone, as on SSD's last map, has no deviation of its own.
        mean, scale = (outputs.mean(0), outputs.std(0)) if len(outputs) > 1 else (outputs[0] * 0, outputs.std())
        weight.mul_((deviation / scale).reshape(-1, *[1] * (weight.ndim - 1)).expand(len(weight), *weight.shape[1:]))
        layer.bias.copy_(-deviation * mean / scale)  # type: ignore[operator]
        spread.append(deviation * (outputs - mean) / scale)
    return spread


def _raise_background(layers: Iterable[nn.Module], logits: Sequence[Tensor], threshold: float) -> None:
    """Raise the background's bias until few boxes have a score over the threshold."""
    rows = torch.cat([values.reshape(-1, CLASSES) for values in logits])
    shift = 0.0
    while ((rows + shift * (torch.arange(CLASSES) == 0)).softmax(-1)[:, 1:] > threshold).sum() > CANDIDATES:
        shift += 0.25
    for layer in layers:
        layer.bias[::CLASSES] += shift  # type: ignore[index, operator]
