"""Conversion of torchvision's ssd300_vgg16."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.heads.ssd import from_torchvision as head_from_torchvision
from detkit.necks.ssd_vgg import from_torchvision as trunk_from_torchvision
from detkit.published.classes import coco_classes, unnamed_classes
from detkit.published.names import COCO_OUTPUTS, check_anchors, count_rows
from detkit.registry import weight_converters
from detkit.structures import ClassList

# The model of configs/ssd300_vgg16.yaml.
SSD300_BACKBONE = {
    "name": "vgg16", "levels": [4, 5], "ceil_mode": True,
    "mean": [0.48235, 0.45882, 0.40784], "std": [1 / 255, 1 / 255, 1 / 255],
}  # fmt: skip
SSD300_HEAD: dict[str, Any] = {
    "name": "ssd",
    "anchors": {
        "name": "default_boxes",
        "ratios": [[2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0], [2.0]],
        "scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        "steps": [8, 16, 32, 64, 100, 300],
    },
}


@weight_converters.register("backbone.scale_weight")
def convert_ssd300_vgg16(
    state: Mapping[str, Tensor], options: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert torchvision's `ssd300_vgg16`.

    Args:
        state: the state dict.
        options: names of the user's options; those of the anchors are checked.

    Raises:
        CheckpointError: the state dict belongs to another model, or the anchors are unknown.
    """
    backbone, neck = trunk_from_torchvision(state)
    head, num_classes = head_from_torchvision(state)
    for level, ratios in enumerate(SSD300_HEAD["anchors"]["ratios"]):
        heads = (f"head.{kind}_head.module_list.{level}" for kind in ("classification", "regression"))
        outputs, offsets = (count_rows(state, head, "torchvision's ssd300_vgg16") for head in heads)
        check_anchors(offsets // 4, 2 + 2 * len(ratios), "head.anchors", options)
        if num_classes < 1 or outputs != (num_classes + 1) * (offsets // 4):
            raise CheckpointError(
                f"The model has {outputs} class outputs for {offsets // 4} anchors on map {level}, which does not "
                f"match {num_classes} classes and background."
            )
    tensors = {
        **{f"backbone.{name}": tensor for name, tensor in backbone.items()},
        **{f"neck.{name}": tensor for name, tensor in neck.items()},
        **{f"head.{name}": tensor for name, tensor in head.items()},
    }
    experiment = Experiment(
        data={"name": "coco"},
        backbone=dict(SSD300_BACKBONE),
        neck={"name": "ssd_vgg"},
        head=dict(SSD300_HEAD),
        input=InputOptions((300, 300)),
        name="ssd300_vgg16",
    )
    return tensors, experiment, coco_classes() if num_classes == COCO_OUTPUTS - 1 else unnamed_classes(num_classes, 1)
