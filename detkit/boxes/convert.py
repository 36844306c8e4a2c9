"""Conversion of box formats to and from xyxy, the only format used inside detkit; clipping and area.

All functions take boxes of shape (..., 4) and any dtype, and return a new tensor.
"""

import torch
from torch import Tensor


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Convert (left, top, right, bottom) to COCO's (left, top, width, height); (..., 4) to (..., 4)."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert COCO's (left, top, width, height) to (left, top, right, bottom); (..., 4) to (..., 4)."""
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert (left, top, right, bottom) to (centre x, centre y, width, height); (..., 4) to (..., 4)."""
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert (centre x, centre y, width, height) to (left, top, right, bottom); (..., 4) to (..., 4)."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes to [0, width] x [0, height] of an image.

    A box outside the image becomes a box without area on its edge; it is not dropped.

    Args:
        boxes: (..., 4) xyxy pixels.
        size: (height, width) in pixels.
    """
    height, width = size
    return torch.stack(
        [boxes[..., side].clamp(0, limit) for side, limit in enumerate((width, height, width, height))], dim=-1
    )


def area(boxes: Tensor) -> Tensor:
    """(...) area of xyxy boxes (..., 4) in square pixels; 0 for inverted boxes."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height
