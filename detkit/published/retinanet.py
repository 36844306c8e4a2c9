"""Torchvision's RetinaNet (R50-FPN, first and second version) under detkit's names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.published.classes import coco_classes
from detkit.published.names import TRUNK, add_counters, renamed
from detkit.types import ClassList

NAMES = (
    *TRUNK,
    (r"backbone\.fpn\.extra_blocks\.p6\.(\w+)", r"neck.extra_blocks.0.0.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(\w+)", r"neck.extra_blocks.1.0.\1"),
    (r"head\.classification_head\.conv\.(\d+\.\d+\.\w+)", r"head.class_tower.\1"),
    (r"head\.regression_head\.conv\.(\d+\.\d+\.\w+)", r"head.box_tower.\1"),
    (r"head\.classification_head\.cls_logits\.(\w+)", r"head.class_predictor.\1"),
    (r"head\.regression_head\.bbox_reg\.(\w+)", r"head.box_predictor.\1"),
)
OLD_TOWER_NAME = re.compile(r"(head\.\w+\.conv)\.(\d)\.(weight|bias)")
CLASS_PREDICTOR = "head.class_predictor"
SIZES = [[size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))] for size in (32, 64, 128, 256, 512)]
ANCHORS_PER_LOCATION = 9


def convert_retinanet(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of torchvision's `retinanet_resnet50_fpn` and its v2.

    Its class 0 is left out: torchvision keeps that number for a background, which RetinaNet does not have and no
    picture shows.

    Raises:
        CheckpointError: a tensor is unknown, or missing.
    """
    tensors = {_detkit_name(name): tensor for name, tensor in state.items()}
    for kind in ("weight", "bias"):
        name = f"{CLASS_PREDICTOR}.{kind}"
        if name not in tensors:
            raise CheckpointError(
                f"The state dict is not torchvision's RetinaNet: it lacks head.classification_head.cls_logits.{kind}."
            )
        tensors[name] = tensors[name].unflatten(0, (ANCHORS_PER_LOCATION, -1))[:, 1:].flatten(0, 1)
    frozen = add_counters(tensors)
    second = "head.class_tower.0.1.weight" in tensors
    backbone: dict[str, Any] = {"name": "resnet50", "levels": [3, 4, 5]}
    experiment = Experiment(
        data={"name": "coco"},
        backbone=backbone | ({"norm_epsilon": 0.0} if frozen else {}),
        neck={"name": "fpn", "extra_levels": 2, "extra": "conv_input" if second else "conv"},
        head={
            "name": "retinanet",
            "anchors": {"name": "pyramid", "sizes": SIZES, "divide": True},
            "norm": second,
            "box_loss": "giou" if second else "l1",
        },
        input=InputOptions((800, 1333), "short_side"),
        name="retinanet",
    )
    return tensors, experiment, coco_classes(len(tensors[f"{CLASS_PREDICTOR}.bias"]) // ANCHORS_PER_LOCATION)


def _detkit_name(name: str) -> str:
    old = OLD_TOWER_NAME.fullmatch(name)
    if old:
        name = f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"  # between them stood a ReLU, which has no tensors
    return renamed(name, NAMES, "retinanet_resnet50_fpn")
