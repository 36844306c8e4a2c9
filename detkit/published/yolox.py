"""Conversion of the weights published by the authors of YOLOX (release 0.1.1rc0 and later)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.published.classes import coco_classes_without_gaps, unnamed_classes
from detkit.published.names import count_rows
from detkit.registry import weight_converters
from detkit.structures import ClassList

STEM = "backbone.backbone.stem.conv.conv.weight"
PREFIXES = (("backbone.backbone.", "backbone."), ("backbone.", "neck."), ("head.", "head."))
NAMES = {0.25: "yolox_nano", 0.375: "yolox_tiny", 0.5: "yolox_s", 0.75: "yolox_m", 1.0: "yolox_l", 1.25: "yolox_x"}
COCO_CLASSES = 80
LARGEST = 2.0
"""Maximum factor of width and depth; YOLOX-X has 1.25 and 1.33."""


@weight_converters.register(STEM)
def convert_yolox(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert YOLOX-Nano, Tiny, S, M, L or X, recognised by the shapes of the tensors.

    The published networks read BGR in 0..255. The input channels of the first convolution are swapped to read RGB; the
    backbone's `std` restores 0..255.

    Raises:
        CheckpointError: a tensor is unknown or missing.
    """
    tensors = {_renamed(name): tensor for name, tensor in state.items()}
    classes = count_rows(state, "head.cls_preds.0", "YOLOX's")
    stem = state[STEM]
    # Twelve input channels: blue, green and red of the four pixels that Focus stacks.
    swapped = stem.unflatten(1, (4, 3)).flip(2).flatten(1, 2)
    tensors["backbone.stem.conv.conv.weight"] = swapped
    coco = classes == COCO_CLASSES
    return tensors, _experiment(state), coco_classes_without_gaps() if coco else unnamed_classes(classes)


def _experiment(state: Mapping[str, Tensor]) -> Experiment:
    width = len(state[STEM]) / 64
    blocks = len([name for name in state if _is_block(name)])
    if width > LARGEST or blocks > 3 * LARGEST:
        raise CheckpointError(
            f"The model has {len(state[STEM])} channels after its first convolution and {blocks} blocks in its second "
            f"stage, more than twice those of YOLOX-L."
        )
    depthwise = "head.cls_convs.0.0.dconv.conv.weight" in state
    depth: dict[str, Any] = {"depth": round(blocks / 3, 2), "depthwise": depthwise}
    size = 416 if width <= 0.375 else 640
    # The models of configs/yolox_*.yaml.
    return Experiment(
        data={"name": "coco"},
        backbone={"name": "csp_darknet", "width": width, **depth},
        neck={"name": "pafpn", **depth},
        head={"name": "yolox", "depthwise": depthwise},
        input=InputOptions((size, size), "letterbox", trim_padding=False),
        name=NAMES.get(width, "yolox"),
    )


def _is_block(name: str) -> bool:
    """Return whether this is the first layer of a bottleneck of the second stage."""
    return name.startswith("backbone.backbone.dark2.1.m.") and name.endswith(".conv1.conv.weight")


def _renamed(name: str) -> str:
    for prefix, replacement in PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise CheckpointError(f"'{name}' is not a tensor of YOLOX.")
