"""Offsets between boxes and anchors: the regression targets and predictions of anchor-based heads.

With centres x, y and sides w, h of a box b and an anchor a, means mu and standard deviations sigma
("Dive into Deep Learning", 14.4; R-CNN, Girshick et al. 2014, appendix C):

    ((x_b - x_a) / w_a - mu_x) / sigma_x      (log(w_b / w_a) - mu_w) / sigma_w      and likewise for y and h
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.convert import cxcywh_to_xyxy, xyxy_to_cxcywh

MIN_ENCODED_SIDE = 1e-3
"""Pixels; `encode` clamps shorter sides to this length."""


def encode(
    boxes: Tensor,
    anchors: Tensor,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
) -> Tensor:
    """Encode boxes as offsets from their anchors; the inverse of `decode`.

    Sides of boxes and anchors are clamped to at least 0.001 pixels: a box without area gives a large finite offset
    instead of -inf, which would be NaN in the loss even if masked by 0. Such boxes are not decoded exactly.

    Args:
        boxes: (..., 4) xyxy, the box of each anchor.
        anchors: (..., 4) xyxy.
        means: mu of (x, y, w, h).
        deviations: sigma of (x, y, w, h). Torchvision's weights are the reciprocals.

    Returns:
        (..., 4) offsets (x, y, w, h), differentiable.
    """
    box, anchor = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(anchors)
    box_sides, anchor_sides = box[..., 2:].clamp(min=MIN_ENCODED_SIDE), anchor[..., 2:].clamp(min=MIN_ENCODED_SIDE)
    offsets = torch.cat(((box[..., :2] - anchor[..., :2]) / anchor_sides, torch.log(box_sides / anchor_sides)), dim=-1)
    return (offsets - offsets.new_tensor(means)) / offsets.new_tensor(deviations)


def decode(
    offsets: Tensor,
    anchors: Tensor,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    max_log_ratio: float | None = math.log(1000 / 16),
) -> Tensor:
    """Decode offsets from anchors to boxes; the inverse of `encode`.

    Args:
        offsets: (..., A, 4), for example (B, A, 4) for a batch.
        anchors: (A, 4) xyxy, or any shape that broadcasts with `offsets`.
        means: as for `encode`.
        deviations: as for `encode`.
        max_log_ratio: upper limit of log(side / anchor's side), which keeps exp finite in an untrained network; by
            default a box is at most 62.5 times as large as its anchor. None for no limit.

    Returns:
        (..., A, 4) xyxy in the anchors' pixels, not clipped to the image, differentiable; float32 for float16 offsets
        and float32 anchors.
    """
    offsets = offsets * offsets.new_tensor(deviations) + offsets.new_tensor(means)
    anchor = xyxy_to_cxcywh(anchors)
    log_ratios = offsets[..., 2:] if max_log_ratio is None else offsets[..., 2:].clamp(max=max_log_ratio)
    centres = offsets[..., :2] * anchor[..., 2:] + anchor[..., :2]
    # exp in the anchors' precision, since half precision is too coarse at 62.5.
    return cxcywh_to_xyxy(torch.cat((centres, log_ratios.to(centres.dtype).exp() * anchor[..., 2:]), dim=-1))
