"""Intersection over union (IoU) with its generalised, distance and complete variants.

With intersection I, union U, area C and diagonal c of the smallest enclosing box, and distance d of the centres:

    iou  = I / U                            in 0..1
    giou = iou - (C - U) / C                in -1..1   Rezatofighi et al. 2019, arXiv 1902.09630, algorithm 1
    diou = iou - d^2 / c^2                  in -1..1   Zheng et al. 2020, arXiv 1911.08287, equation 6
    ciou = diou - alpha v                   in -2..1   the same, equations 8 to 11, where
           v = 4 / pi^2 (atan(w_a / h_a) - atan(w_b / h_b))^2 and alpha = v / (1 - iou + v) is constant in the
           gradient.

A quotient with denominator 0 is defined as 0, with gradient 0, so that boxes without area never give NaN. Boxes with
NaN coordinates give NaN, as in torchvision, and so do pairs with an infinite intersection, whose IoU is undefined.

Integers are computed in float64, which represents coordinates up to 2^53 exactly (float32: 2^24).
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from detkit.boxes.convert import area
from detkit.errors import nearest

Kind = Literal["iou", "giou", "diou", "ciou"]

SMALL = 4096
"""Number of pairs up to which `pairwise_iou` uses torch, which takes 0.1 ms for them. Compiled code takes a quarter of
that, but importing Numba and loading the code takes half a second, once. Speed-up on one core: 2x for 8,732 x 8 boxes,
5x for 8,732 x 20, 14x for 1,000 x 1,000 and 27x for 20,000 x 200."""


def pairwise_iou(boxes_a: Tensor, boxes_b: Tensor, kind: Kind = "iou") -> Tensor:
    """Compute the IoU of each of N boxes with each of M boxes.

    Args:
        boxes_a: (N, 4) xyxy.
        boxes_b: (M, 4) xyxy.
        kind: the variant; see the module.

    Returns:
        (N, M), float64 if one of the arguments is, otherwise float32; differentiable.

    Raises:
        ValueError: a shape is not (N, 4), or the kind is unknown.
    """
    _check_boxes(boxes_a, "boxes_a")
    _check_boxes(boxes_b, "boxes_b")
    iou = None
    if kind == "iou" and len(boxes_a) * len(boxes_b) > SMALL:
        arrays = _plain_arrays(at_least_float32(boxes_a), at_least_float32(boxes_b))
        iou = None if arrays is None else _compiled_pairwise_iou(*arrays)
    if iou is None:
        iou = _overlap(boxes_a[:, None], boxes_b[None], kind)
    return iou.to(_result_dtype(boxes_a, boxes_b))


def elementwise_iou(boxes_a: Tensor, boxes_b: Tensor, kind: Kind = "iou") -> Tensor:
    """Compute the IoU of N pairs of boxes; 1 minus the result is the IoU loss.

    Args:
        boxes_a: (N, 4) xyxy.
        boxes_b: (N, 4) xyxy.
        kind: the variant; see the module.

    Returns:
        (N,), float64 if one of the arguments is, otherwise float32; differentiable, without NaN in the gradient of
        finite boxes.
    """
    _check_boxes(boxes_a, "boxes_a")
    _check_boxes(boxes_b, "boxes_b")
    if len(boxes_a) != len(boxes_b):
        raise ValueError(f"boxes_a and boxes_b must have the same length, but have {len(boxes_a)} and {len(boxes_b)}")
    return _overlap(boxes_a, boxes_b, kind).to(_result_dtype(boxes_a, boxes_b))


def intersection_over_area(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Compute the fraction of each box's area that lies inside each crowd region.

    COCO's rule for crowds: a detection inside a region of many objects is not a false positive, regardless of how
    small a part of the region it covers.

    Args:
        boxes: (N, 4) xyxy.
        crowds: (M, 4) xyxy.

    Returns:
        (N, M) in 0..1, float64 if one of the arguments is, otherwise float32; 0 for a box without area, NaN if a box or
        a crowd contains NaN.
    """
    _check_boxes(boxes, "boxes")
    _check_boxes(crowds, "crowds")
    dtype = _result_dtype(boxes, crowds)
    boxes, crowds = at_least_float32(boxes), at_least_float32(crowds)
    return _ratio(_intersection(boxes[:, None], crowds[None]), area(boxes)[:, None]).to(dtype)


def _plain_arrays(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Convert the boxes to arrays for compiled code; None if torch is required: other devices, gradients, tracing."""
    tensors = (a, b)
    if any(boxes.device.type != "cpu" for boxes in tensors) or a.dtype != b.dtype:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if torch.is_grad_enabled() and any(boxes.requires_grad for boxes in tensors):
        return None
    if any(forward_ad.unpack_dual(boxes).tangent is not None for boxes in tensors):
        return None
    try:
        return np.ascontiguousarray(a.detach().numpy()), np.ascontiguousarray(b.detach().numpy())
    except RuntimeError:
        return None  # tensors without memory, as in torch.vmap


def _compiled_pairwise_iou(a: np.ndarray, b: np.ndarray) -> Tensor | None:
    """Compute (N, M) IoUs without the roughly ten temporary tensors of `_overlap`.

    Returns None if an area is not finite, since the compiled code does not handle NaN.
    """
    # Imported on first use: Numba takes half a second to import.
    from detkit.boxes.kernels.iou_numba import columns, pairwise

    columns_a, columns_b = columns(a), columns(b)
    if not (np.isfinite(columns_a[-1]).all() and np.isfinite(columns_b[-1]).all()):
        return None
    iou = np.empty(len(a) * len(b), dtype=a.dtype)
    pairwise(columns_a, columns_b, iou)
    return torch.from_numpy(iou).reshape(len(a), len(b))


def _overlap(a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    """Compute the chosen variant for boxes (..., 4) that broadcast against each other."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of IoU {kind!r}. {nearest(str(kind), get_args(Kind))}")
    a, b = at_least_float32(a), at_least_float32(b)
    intersection = _intersection(a, b)
    union = area(a) + area(b) - intersection
    iou = _ratio(intersection, union)
    if kind == "iou":
        return iou
    hull_width, hull_height = (_hull_side(a, b, axis) for axis in (0, 1))
    if kind == "giou":
        hull_area = hull_width * hull_height
        return iou - _ratio(hull_area - union, hull_area)
    across, down = ((a[..., i] + a[..., i + 2] - b[..., i] - b[..., i + 2]) / 2 for i in (0, 1))
    diou = iou - _ratio(across.square() + down.square(), hull_width.square() + hull_height.square())
    if kind == "diou":
        return diou
    shape_difference = 4 / math.pi**2 * (_shape_angle(a) - _shape_angle(b)).square()
    with torch.no_grad():
        weight = _ratio(shape_difference, 1 - iou + shape_difference)
    return diou - weight * shape_difference


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    # Per axis: operations over a last dimension of 2 are ten times slower.
    width, height = (
        (torch.minimum(a[..., axis + 2], b[..., axis + 2]) - torch.maximum(a[..., axis], b[..., axis])).clamp(min=0)
        for axis in (0, 1)
    )
    return width * height


def _hull_side(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Compute the width (axis 0) or height (axis 1) of the smallest enclosing box.

    An untrained network predicts inverted boxes. They have no area, but the enclosing box must contain their centres,
    otherwise the quotients leave their ranges.
    """
    lows = [torch.minimum(boxes[..., axis], boxes[..., axis + 2]) for boxes in (a, b)]
    highs = [torch.maximum(boxes[..., axis], boxes[..., axis + 2]) for boxes in (a, b)]
    return torch.maximum(*highs) - torch.minimum(*lows)


def _shape_angle(boxes: Tensor) -> Tensor:
    """Compute atan(width / height); 0 without gradient if both are 0."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    # torch.where backpropagates 0 * NaN from the branch not taken, so atan2 must not see (0, 0).
    return torch.atan2(width, torch.where((width == 0) & (height == 0), 1, height))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 with gradient 0 where the denominator is at most 0, NaN where it is NaN."""
    nothing = denominator <= 0
    return torch.where(nothing, 0, numerator) / torch.where(nothing, 1, denominator)


def at_least_float32(boxes: Tensor) -> Tensor:
    """Convert boxes to a dtype suited for IoU: float64 for integers, which float32 may round."""
    if not boxes.is_floating_point():
        return boxes.double()
    # The area of a box of 300 x 300 pixels overflows float16.
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


def _result_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _check_boxes(boxes: Tensor, name: str) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must be (N, 4), but got {tuple(boxes.shape)}")
