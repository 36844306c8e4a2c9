"""Conversion of torchvision's RetinaNet (R50-FPN, first and second version)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.published.classes import coco_classes, unnamed_classes
from detkit.published.names import TRUNK, check_anchors, count_rows, epsilon_option, is_coco, renamed
from detkit.registry import weight_converters
from detkit.structures import ClassList

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
RATIOS = [0.5, 1.0, 2.0]
ANCHORS_PER_LOCATION = len(SIZES[0]) * len(RATIOS)


@weight_converters.register("head.classification_head.cls_logits.weight")
def convert_retinanet(
    state: Mapping[str, Tensor], coco: bool | None = None, options: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert torchvision's `retinanet_resnet50_fpn` and its second version.

    RetinaNet has no background class. Torchvision's COCO files nevertheless have an output 0 for it, which was never
    trained; it is removed. In models that users trained, class 0 is a regular class.

    Args:
        state: the state dict.
        coco: whether it is one of torchvision's COCO files; None if it has 91 classes.
        options: names of the user's options; those of the anchors are checked.

    Raises:
        CheckpointError: a tensor is unknown or missing, or the anchors are unknown.
    """
    tensors = {_detkit_name(name): tensor for name, tensor in state.items()}
    outputs = count_rows(state, "head.classification_head.cls_logits", "torchvision's RetinaNet")
    anchors = count_rows(state, "head.regression_head.bbox_reg", "torchvision's RetinaNet") // 4
    classes, rest = divmod(outputs, max(anchors, 1))
    if rest or not classes:
        raise CheckpointError(f"The model has {outputs} class outputs for {anchors} anchors. It is damaged.")
    check_anchors(anchors, ANCHORS_PER_LOCATION, "head.anchors", options)
    coco = is_coco(classes, coco)
    for kind in ("weight", "bias") if coco else ():
        name = f"{CLASS_PREDICTOR}.{kind}"
        tensors[name] = tensors[name].unflatten(0, (anchors, classes))[:, 1:].flatten(0, 1)
    epsilon = epsilon_option(tensors, coco)
    second = "head.class_tower.0.1.weight" in tensors
    backbone: dict[str, Any] = {"name": "resnet50", "levels": [3, 4, 5]}
    experiment = Experiment(
        data={"name": "coco"},
        backbone=backbone | epsilon,
        neck={"name": "fpn", "extra_levels": 2, "extra": "conv_input" if second else "conv"},
        head={
            "name": "retinanet",
            "anchors": {"name": "pyramid", "sizes": SIZES, "ratios": RATIOS, "divide": True},
            "norm": second,
            "box_loss": "giou" if second else "l1",
        },
        input=InputOptions((800, 1333), "short_side"),
        name="retinanet",
    )
    return tensors, experiment, coco_classes() if coco else unnamed_classes(classes)


def _detkit_name(name: str) -> str:
    old = OLD_TOWER_NAME.fullmatch(name)
    if old:
        name = f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"  # the layers between are ReLUs
    return renamed(name, NAMES, "retinanet_resnet50_fpn")
