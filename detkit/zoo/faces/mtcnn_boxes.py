"""Boxes of MTCNN: squares, the pixels under them, the scales of its pyramid, and suppression by the smaller box.

The boxes in this module are the published model's: pixels are counted from 1, and the last one is inside, so that a box
(x1, y1, x2, y2) covers the pixels x1 - 1 to x2 - 1 of an array, and is x2 - x1 + 1 wide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE, CELL = 2, 12
"""Of the P-Net, in pixels of its input."""


def pyramid_scales(size: tuple[int, int], min_size: float, factor: float) -> list[float]:
    """By how much an image of (height, width) is shrunk so that objects of `min_size` pixels and larger fit P-Net's
    12."""
    scales = []
    scale = CELL / min_size
    while min(size) * scale >= CELL:
        scales.append(scale)
        scale *= factor
    return scales


def cells(rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """(N, 4) the boxes that P-Net saw at these places of its map, of an image shrunk by `scale`."""
    corner = torch.stack((columns, rows), dim=1).float() * STRIDE
    return torch.cat((((corner + 1) / scale).floor(), ((corner + CELL) / scale).floor()), dim=1)


def squares(boxes: Tensor) -> Tensor:
    """(N, 4) the squares around the same centres with the longer side of each box."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.amax(1, keepdim=True)
    corners = boxes[:, :2] + sides * 0.5 - longest * 0.5
    return torch.cat((corners, corners + longest), dim=1)


def moved(boxes: Tensor, offsets: Tensor) -> Tensor:
    """(N, 4) boxes whose edges are moved by (N, 4) parts of their sides."""
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return boxes + offsets * sides


def offsets_to(boxes: Tensor, targets: Tensor) -> Tensor:
    """(N, 4) what `moved` needs to make `ground truths` (N, 4) of boxes."""
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return (targets - boxes) / sides


def points_in(boxes: Tensor, fractions: Tensor) -> Tensor:
    """(N, 5, 2) xy pixels of points at (N, 10) parts of the boxes' sides, all x before all y."""
    sides = boxes[:, None, 2:] - boxes[:, None, :2] + 1
    return fractions.unflatten(1, (2, -1)).transpose(1, 2) * sides + boxes[:, None, :2] - 1


def fractions_of(boxes: Tensor, points: Tensor) -> Tensor:
    """(N, 10) the parts of the boxes' sides that `points_in` makes (N, 5, 2) points of."""
    sides = boxes[:, None, 2:] - boxes[:, None, :2] + 1
    return ((points - boxes[:, None, :2] + 1) / sides).transpose(1, 2).flatten(1)


def in_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N,) bool: whether any pixel of an image of (height, width) lies under the box."""
    left, top, right, bottom = _cut(boxes, size).unbind(1)
    return (right >= left) & (bottom >= top)


def windows(image: Tensor, boxes: Tensor, side: int) -> Tensor:
    """(N, C, side, side) the pixels of a (C, H, W) image under boxes (N, 4), `in_image`, resized by areas.

    What of a box lies outside is cut off first, and so what is left is stretched.
    """
    cut = _cut(boxes, (image.shape[1], image.shape[2])).tolist()
    pixels = [
        F.adaptive_avg_pool2d(image[:, top - 1 : bottom, left - 1 : right], side) for left, top, right, bottom in cut
    ]
    return torch.stack(pixels) if pixels else image.new_zeros(0, len(image), side, side)


def suppress_by_smaller(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (N, 4) that stay, best score first: of two whose intersection is more than `threshold` of
    the smaller one's area, the weaker goes. Of one box inside another so always one goes, however small it is."""
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        corner = torch.maximum(boxes[best, :2], boxes[rest, :2])
        shared = (torch.minimum(boxes[best, 2:], boxes[rest, 2:]) - corner + 1).clamp(min=0).prod(1)
        order = rest[shared / torch.minimum(areas[best], areas[rest]) <= threshold]
    return torch.stack(kept) if kept else order


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) int64: whole pixels, within an image of (height, width)."""
    height, width = size
    whole = boxes.trunc().long()
    return torch.cat((whole[:, :2].clamp(min=1), torch.minimum(whole[:, 2:], whole.new_tensor([width, height]))), dim=1)
