"""Conversion of torchvision's Faster and Mask R-CNN (R50-FPN, first and second version)."""

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
    (r"rpn\.head\.conv\.(\d+)\.0\.(\w+)", r"head.rpn.convolutions.\1.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"head.rpn.convolutions.0.\1"),
    (r"rpn\.head\.cls_logits\.(\w+)", r"head.rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(\w+)", r"head.rpn.offsets.\1"),
    (r"roi_heads\.box_head\.(fc[67])\.(\w+)", r"head.regions.trunk.\1.\2"),
    (r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", r"head.regions.trunk.convolutions.\1.\2.\3"),
    (r"roi_heads\.box_head\.\d+\.(weight|bias)", r"head.regions.trunk.fc.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(\w+)", r"head.regions.class_predictor.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(\w+)", r"head.regions.box_predictor.\1"),
    (r"roi_heads\.mask_head\.(\d+)\.([01])\.(\w+)", r"head.mask.convolutions.\1.\2.\3"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)", r"head.mask.upsample.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)", r"head.mask.predictor.\1"),
)
RATIOS = [0.5, 1.0, 2.0]
OLD_MASK_NAME = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(\w+)")
BACKGROUND_ROWS = {"head.regions.box_predictor": 4, "head.mask.predictor": 1}
"""Rows of torchvision's box and mask predictions for the background, which are not used."""


@weight_converters.register("rpn.head.cls_logits.weight")
def convert_rcnn(
    state: Mapping[str, Tensor], coco: bool | None = None, options: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert torchvision's `fasterrcnn_resnet50_fpn`, `maskrcnn_resnet50_fpn` and their second versions.

    Args:
        state: the state dict.
        coco: whether it is one of torchvision's COCO files; None if it has 91 outputs.
        options: names of the user's options; those of the anchors are checked.

    Raises:
        CheckpointError: a tensor is unknown or missing, or the anchors are unknown.
    """
    outputs = count_rows(state, "roi_heads.box_predictor.cls_score", "torchvision's Faster R-CNN")
    if outputs < 2:
        raise CheckpointError("The model has one output, the background, and so no class.")
    count_rows(state, "roi_heads.box_predictor.bbox_pred", "torchvision's Faster R-CNN")
    anchors = count_rows(state, "rpn.head.cls_logits", "torchvision's Faster R-CNN")
    check_anchors(anchors, len(RATIOS), "head.rpn.anchors", options)
    coco = is_coco(outputs, coco)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own_name = _detkit_name(name)
        rows = BACKGROUND_ROWS.get(own_name.rpartition(".")[0], 0)
        tensors[own_name] = tensor[rows:] if rows else tensor
    epsilon = epsilon_option(tensors, coco)
    second = "head.regions.trunk.fc.weight" in tensors
    masks = any(name.startswith("head.mask.") for name in tensors)
    experiment = Experiment(
        data={"name": "coco"},
        backbone={"name": "resnet50", **epsilon},
        neck={"name": "fpn", "extra_levels": 1, "extra": "pool", "norm": second},
        head=_head(second, masks),
        input=InputOptions((800, 1333), "short_side"),
        name="mask_rcnn" if masks else "faster_rcnn",
    )
    return tensors, experiment, coco_classes() if coco else unnamed_classes(outputs - 1, first_raw_id=1)


def _detkit_name(name: str) -> str:
    old = OLD_MASK_NAME.fullmatch(name)
    if old:
        name = f"roi_heads.mask_head.{int(old[1]) - 1}.0.{old[2]}"
    return renamed(name, NAMES, "Faster or Mask R-CNN with ResNet-50 and FPN")


def _head(second: bool, masks: bool) -> dict[str, Any]:
    """Return the options of the head: of the second version if `second`, with masks if `masks`."""
    anchors = {"name": "pyramid", "sizes": [[32.0], [64.0], [128.0], [256.0], [512.0]], "ratios": RATIOS}
    head: dict[str, Any] = {
        "name": "mask_rcnn" if masks else "faster_rcnn",
        "rpn": {"anchors": {**anchors, "divide": True}, "depth": 2 if second else 1},
        "regions": {"trunk": {"name": "conv_fc" if second else "mlp"}},
    }
    if masks:
        head["mask"] = {"norm": second}
    return head
