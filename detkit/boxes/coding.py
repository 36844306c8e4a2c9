"""Offsets between boxes and anchors, the targets and predictions of every anchor-based head.

With x, y the centres and w, h the sides of a box b and an anchor a, means mu and deviations sigma
("Dive into Deep Learning", 14.4; R-CNN, Girshick et al. 2014, appendix C):

    ((x_b - x_a) / w_a - mu_x) / sigma_x      (log(w_b / w_a) - mu_w) / sigma_w      and so for y and h
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.convert import cxcywh_to_xyxy, xyxy_to_cxcywh

SMALLEST_SIDE = 1e-3
"""Pixels; `encode` takes a shorter side for one of this length."""


def encode(
    boxes: Tensor,
    anchors: Tensor,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
) -> Tensor:
    """The offsets that take each anchor to its box; the inverse of `decode`.

    Sides under 0.001 pixels, of boxes and of anchors, count as 0.001: a box without area gives a large finite
    offset, not -inf, which masked by 0 would still be NaN in the loss. Such boxes do not come back exactly.

    Args:
        boxes: (..., 4) xyxy, the box that belongs to each anchor.
        anchors: (..., 4) xyxy.
        means: mu of (x, y, w, h).
        deviations: sigma of (x, y, w, h). Torchvision's weights are their reciprocals.

    Returns:
        (..., 4) offsets (x, y, w, h), differentiable.
    """
    box, anchor = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(anchors)
    box_sides, anchor_sides = box[..., 2:].clamp(min=SMALLEST_SIDE), anchor[..., 2:].clamp(min=SMALLEST_SIDE)
    offsets = torch.cat(((box[..., :2] - anchor[..., :2]) / anchor_sides, torch.log(box_sides / anchor_sides)), dim=-1)
    return (offsets - offsets.new_tensor(means)) / offsets.new_tensor(deviations)


def decode(
    offsets: Tensor,
    anchors: Tensor,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    max_log_ratio: float | None = math.log(1000 / 16),
) -> Tensor:
    """The boxes that offsets make of anchors; the inverse of `encode`.

    Args:
        offsets: (..., A, 4), for example (B, A, 4) for a batch.
        anchors: (A, 4) xyxy, or anything that broadcasts with `offsets`.
        means: as given to `encode`.
        deviations: as given to `encode`.
        max_log_ratio: limit of log(side / anchor's side), which keeps exp finite in an untrained network;
            by default a box is at most 62.5 times its anchor. None for no limit.

    Returns:
        (..., A, 4) xyxy in the anchors' pixels, not cut to the image, differentiable. With float16 offsets and
        float32 anchors it is float32.
    """
    offsets = offsets * offsets.new_tensor(deviations) + offsets.new_tensor(means)
    anchor = xyxy_to_cxcywh(anchors)
    log_ratios = offsets[..., 2:] if max_log_ratio is None else offsets[..., 2:].clamp(max=max_log_ratio)
    centres = offsets[..., :2] * anchor[..., 2:] + anchor[..., :2]
    # exp in the anchors' precision: 62.5 has few digits in half precision.
    return cxcywh_to_xyxy(torch.cat((centres, log_ratios.to(centres.dtype).exp() * anchor[..., 2:]), dim=-1))
