"""What the tests against torchvision's detectors share: a photograph, plausible random weights, matching detections."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def photograph() -> np.ndarray:
    images = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return np.ascontiguousarray(images.astronaut()[:400])


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def fit_norms(model: nn.Module) -> None:
    """Batch norms that fit the image: with those of a new network the values of 50 layers grow without bound."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.backbone.train()
    model.backbone(nn.functional.interpolate(as_tensor(photograph())[None], (192, 256)))
    model.eval()


def calibrate(model: nn.Module, layers: dict[nn.Module, tuple[float, float]]) -> None:
    """New random weights, with which the outputs have the given deviation and mean, as a trained network's do."""
    values: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:
        layer.weight.normal_()
        layer.bias.zero_()
        hooks.append(layer.register_forward_hook(lambda m, _, out: values[m].append(out.movedim(1, -1).flatten(0, -2))))
    model([as_tensor(photograph())])
    for hook in hooks:
        hook.remove()
    for layer, (deviation, mean) in layers.items():
        outputs = torch.cat(values[layer])
        layer.weight.mul_((deviation / outputs.std(0)).view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.copy_(mean - deviation * outputs.mean(0) / outputs.std(0))


def counterparts(found: Any, expected: dict[str, Tensor]) -> Tensor:
    """For each detection the torchvision detection of its class that is nearest: close scores may swap places.

    Scores count, too: boxes outside of the image are cut to the same line on its border.
    """
    distance = (found.boxes[:, None] - expected["boxes"][None]).abs().amax(-1)
    distance = distance + 1e3 * (found.scores[:, None] - expected["scores"][None]).abs()
    distance = distance + 1e6 * (found.labels[:, None] + 1 != expected["labels"][None])
    nearest = distance.argmin(1)
    assert nearest.unique().numel() == len(found)
    return nearest
