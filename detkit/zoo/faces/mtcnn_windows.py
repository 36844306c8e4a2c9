"""The windows that MTCNN's networks are trained on, drawn around the objects of an image and anywhere in it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from detkit.boxes.iou import intersection_over_area, pairwise_iou
from detkit.structures import Target

POSITIVE_FROM, PART_FROM, NEGATIVE_BELOW = 0.65, 0.4, 0.3
"""Least IoU of a window that shows an object, and of one that shows part of it; one that shows nothing has less than
the last."""
SMALLEST_SIDE = 12.0
_FROM_ONE = (1.0, 1.0, 0.0, 0.0)
"""What makes a box of detkit one of detkit.zoo.faces.mtcnn_boxes."""


class Windows(NamedTuple):
    """Windows of one image that take part in the loss.

    Args:
        boxes: (N, 4) whole pixels, as detkit.zoo.faces.mtcnn_boxes counts them.
        truth_index: (N,) the object each overlaps most; to be read only where `positive` or `part`.
        positive, part, negative: (N,) bool, one of them true for each.
    """

    boxes: Tensor
    target_index: Tensor
    positive: Tensor
    part: Tensor
    negative: Tensor


def draw_windows(target: Target, size: tuple[int, int], count: int) -> Windows:
    """Squares, two thirds of them around objects where there are any; those in doubt are left out.

    Around an object a square has 0.8 of its shorter to 1.25 of its longer side, and its centre is moved by up to a
    fifth of them; every other one is moved and scaled further, for parts and close misses.

    Args:
        target: the ground truth; of what is ignored no window shows more than the share that makes it no negative.
        size: (height, width) of the image.
        count: how many are drawn.
    """
    targets = target.boxes[~target.ignored]
    near = _around(targets, count * 2 // 3) if len(targets) else targets[:0]
    boxes = torch.cat((near, _anywhere(size, count - len(near)).to(near.device)))
    boxes = torch.cat((boxes[:, :2].floor(), boxes[:, 2:].floor()), dim=1)
    if not len(targets):
        targets = boxes.new_tensor([[-1.0, -1.0, -1.0, -1.0]])  # one that nothing overlaps
    overlap, index = pairwise_iou(boxes, targets).max(1)
    positive, part = overlap >= POSITIVE_FROM, (overlap >= PART_FROM) & (overlap < POSITIVE_FROM)
    negative = overlap < NEGATIVE_BELOW
    inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, 0] < size[1]) & (boxes[:, 1] < size[0])
    negative &= ~_covered(boxes, target.boxes[target.ignored])
    counted = (positive | part | negative) & inside
    boxes = boxes + boxes.new_tensor(_FROM_ONE)
    return Windows(boxes[counted], index[counted], positive[counted], part[counted], negative[counted])


def _around(targets: Tensor, count: int) -> Tensor:
    """(count, 4) squares around (T, 4) objects in turn."""
    chosen = targets[torch.arange(count, device=targets.device) % len(targets)]
    sides = chosen[:, 2:] - chosen[:, :2]
    shorter, longer = sides.amin(1), sides.amax(1)
    # Of each object alternately, whatever the number of objects.
    far = (torch.arange(count, device=targets.device) // len(targets) % 2).to(targets.dtype)
    low, high = (0.8 - 0.3 * far) * shorter, (1.25 + 0.35 * far) * longer
    side = (low + (high - low) * _random(count, targets)).clamp(min=2)
    move = (2 * torch.stack((_random(count, targets), _random(count, targets)), 1) - 1) * sides
    centres = (chosen[:, :2] + chosen[:, 2:]) / 2 + move * (0.2 + 0.4 * far)[:, None]
    return torch.cat((centres - side[:, None] / 2, centres + side[:, None] / 2), dim=1)


def _anywhere(size: tuple[int, int], count: int) -> Tensor:
    """(count, 4) squares within an image, small ones as common as large ones."""
    largest = float(min(size))
    smallest = min(SMALLEST_SIDE, largest)
    side = torch.exp(math.log(smallest) + math.log(largest / smallest) * torch.rand(count))
    room = torch.tensor([size[1], size[0]]) - side[:, None]
    corners = room.clamp(min=0) * torch.rand(count, 2)
    return torch.cat((corners, corners + side[:, None]), dim=1)


def _covered(boxes: Tensor, ignored: Tensor) -> Tensor:
    """(N,) bool: whether so much of a window is ignored that it cannot count as showing nothing."""
    if not len(ignored):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return (intersection_over_area(boxes, ignored) >= NEGATIVE_BELOW).any(1)


def _random(count: int, like: Tensor) -> Tensor:
    return torch.rand(count).to(like)
