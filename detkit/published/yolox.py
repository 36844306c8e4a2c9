"""The weights that the authors of YOLOX publish (release 0.1.1rc0 and later) under detkit's names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.published.classes import coco_classes_without_gaps
from detkit.types import ClassList

STEM = "backbone.backbone.stem.conv.conv.weight"
PREFIXES = (("backbone.backbone.", "backbone."), ("backbone.", "neck."), ("head.", "head."))
NAMES = {0.25: "yolox_nano", 0.375: "yolox_tiny", 0.5: "yolox_s", 0.75: "yolox_m", 1.0: "yolox_l", 1.25: "yolox_x"}
COCO_CLASSES = 80


def convert_yolox(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of YOLOX-Nano, Tiny, S, M, L or X; the tensors' shapes tell which.

    The published networks read BGR in 0..255. Here the first convolution's channels change places, and so they read
    RGB; the backbone's `std` brings back 0..255.

    Raises:
        CheckpointError: a tensor is unknown, or missing.
    """
    tensors = {_renamed(name): tensor for name, tensor in state.items()}
    if "head.cls_preds.0.bias" not in state:
        raise CheckpointError("The state dict is not YOLOX's: it lacks head.cls_preds.0.bias.")
    stem = state[STEM]
    # Twelve input channels: blue, green and red of each of the four pixels that Focus puts into one.
    swapped = stem.unflatten(1, (4, 3)).flip(2).flatten(1, 2)
    tensors["backbone.stem.conv.conv.weight"] = swapped
    return tensors, _experiment(state), _classes(len(state["head.cls_preds.0.bias"]))


def _experiment(state: Mapping[str, Tensor]) -> Experiment:
    width = len(state[STEM]) / 64
    blocks = len([name for name in state if _is_block(name)])
    depthwise = "head.cls_convs.0.0.dconv.conv.weight" in state
    depth: dict[str, Any] = {"depth": round(blocks / 3, 2), "depthwise": depthwise}
    size = 416 if width <= 0.375 else 640
    # configs/yolox_*.yaml train the same models.
    return Experiment(
        data={"name": "coco"},
        backbone={"name": "csp_darknet", "width": width, **depth},
        neck={"name": "pafpn", **depth},
        head={"name": "yolox", "depthwise": depthwise},
        input=InputOptions((size, size), "letterbox", trim_padding=False),
        name=NAMES.get(width, "yolox"),
    )


def _is_block(name: str) -> bool:
    """Whether this is the first layer of a bottleneck of the second stage."""
    return name.startswith("backbone.backbone.dark2.1.m.") and name.endswith(".conv1.conv.weight")


def _renamed(name: str) -> str:
    for prefix, replacement in PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise CheckpointError(f"'{name}' is no tensor of YOLOX.")


def _classes(count: int) -> ClassList:
    """COCO's where there are 80 of them, otherwise "class 0", "class 1" ..."""
    if count != COCO_CLASSES:
        return ClassList.from_names([f"class {label}" for label in range(count)])
    return coco_classes_without_gaps()
