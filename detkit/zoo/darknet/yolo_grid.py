"""The shared parts of YOLOv2 and YOLOv3: boxes predicted from grid cells and anchors, and their assignment to targets.

A *place* is one anchor in one cell of one level. Places are numbered level by level, row by row, the anchors of a cell
beside each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from detkit.boxes.coding import MIN_ENCODED_SIDE
from detkit.boxes.convert import clip, cxcywh_to_xyxy, xyxy_to_cxcywh
from detkit.boxes.iou import intersection_over_area, pairwise_iou
from detkit.boxes.matching import IGNORED_COVER
from detkit.errors import ConfigError
from detkit.heads.base import Postprocess
from detkit.structures import Detections, Target

LARGEST_LOG = 10.0
"""Of a predicted side to its anchor; keeps exp finite in a network that diverges."""
Anchors = tuple[tuple[float, float], ...]


class GridOutputs(NamedTuple):
    """Raw outputs of YOLOv2 and YOLOv3; a tuple, so that device and precision wrappers can traverse it.

    Args:
        values: (B, P, 5 + C): raw x, y, width, height, objectness and classes of all places.
        cells: (P, 4) xyxy pixels of the network's input: the cell of each place.
        anchors: (P, 2) width and height in pixels of each place's anchor.
        maps: (rows, columns) of each level.
        size: (height, width) of the batched tensor in pixels.
        sizes: (height, width) of each image, without padding.
    """

    values: Tensor
    cells: Tensor
    anchors: Tensor
    maps: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which places answer for the ground truths of one image, and which are background.

    Args:
        places: (M,) int64, the places that answer for a ground truth, ascending.
        targets: (M,) int64, the ground truth of each; of several at one place the last.
        members: (K,) int64, all ground truths that count.
        rows: (K,) int64, for each of `members` the index of its place in `places`.
        negative: (P,) bool, background; a place that is neither is ignored.
    """

    places: Tensor
    targets: Tensor
    members: Tensor
    rows: Tensor
    negative: Tensor


def anchors_by_level(anchors: Anchors, levels: int, path: str) -> list[Tensor]:
    """The anchors of each level, (A, 2) each: the first part belongs to the finest.

    Args:
        anchors: (width, height) in pixels.
        path: the option's name, for messages.

    Raises:
        ConfigError: the anchors are not positive, or cannot be divided evenly.
    """
    if not anchors or len(anchors) % levels or min(min(anchor) for anchor in anchors) <= 0:
        raise ConfigError(
            f"'{path}' must be positive [width, height] pairs in pixels of the network's input, as many on each of the "
            f"{levels} feature maps, but there are {len(anchors)}: {[list(anchor) for anchor in anchors]}. "
            f"`detkit check CONFIG --anchors N` proposes N from the data."
        )
    return list(torch.tensor(anchors, dtype=torch.float32).reshape(levels, -1, 2))


def lay_grid(
    maps: Sequence[tuple[int, int]], size: tuple[int, int], anchors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cells (P, 4) xyxy pixels and anchors (P, 2) of all places.

    Args:
        maps: (rows, columns) of each level, whose cells divide the image evenly.
        size: (height, width) of the image in pixels.
        anchors: (A, 2) of each level.
    """
    cells, shapes = [], []
    for (rows, columns), level in zip(maps, anchors):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        corners = torch.stack((column, row, column + 1, row + 1), dim=-1).reshape(-1, 4)
        step = torch.tensor((size[1] / columns, size[0] / rows) * 2)
        cells.append((corners * step).repeat_interleave(len(level), dim=0))
        shapes.append(level.cpu().repeat(rows * columns, 1))
    return torch.cat(cells), torch.cat(shapes)


def flatten_places(prediction: Tensor, values: int) -> Tensor:
    """A level's prediction (B, A * values, h, w) as (B, h * w * A, values), float32."""
    # Sigmoids, exponentials and sums over thousands of places lose too much in half precision.
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values).float()


def predicted_boxes(values: Tensor, cells: Tensor, anchors: Tensor) -> Tensor:
    """(..., P, 4) xyxy pixels: the centre inside the cell, the sides as multiples of the anchor's.

    YOLOv2, section 2, "Direct location prediction": x = left + sigmoid(t_x) * step, w = anchor * exp(t_w).

    Args:
        values: (..., P, 4 or more) raw.
        cells: (P, 4) xyxy.
        anchors: (P, 2).
    """
    centres = cells[..., :2] + values[..., :2].sigmoid() * (cells[..., 2:] - cells[..., :2])
    sides = anchors * values[..., 2:4].clamp(max=LARGEST_LOG).exp()
    return cxcywh_to_xyxy(torch.cat((centres, sides), dim=-1))


def true_coordinates(boxes: Tensor, cells: Tensor, anchors: Tensor) -> Tensor:
    """(M, 4) what the places should predict for their boxes: sigmoid(t_x), sigmoid(t_y), t_w and t_h.

    Args:
        boxes: (M, 4) xyxy, the ground truth of each place.
        cells: (M, 4) xyxy.
        anchors: (M, 2).
    """
    box = xyxy_to_cxcywh(boxes)
    inside = ((box[:, :2] - cells[:, :2]) / (cells[:, 2:] - cells[:, :2])).clamp(0, 1)
    return torch.cat((inside, (box[:, 2:].clamp(min=MIN_ENCODED_SIDE) / anchors).log()), dim=1)


def size_weights(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(M,) 2 - the part of the image that a box covers, by which Darknet weights small boxes more."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return 2 - sides.prod(1) / (size[0] * size[1])


def assign(
    outputs: GridOutputs, image: int, target: Target, anchors: Sequence[Tensor], ignore_above: float
) -> Assignment:
    """One place for each ground truth over all levels, and background where no ground truth is near.

    A ground truth belongs to the cell that its centre lies in and to the anchor whose shape is nearest (IoU on one
    common centre; of equal ones the first). Every other place is background, but for those whose predicted box overlaps
    a ground truth by more than `ignore_above`; an ignored ground truth (crowd, difficult) gives no positive, and its
    place and the predicted boxes that lie half in it are no background either.

    Args:
        outputs: of the head.
        image: the row of `outputs` that is looked at.
        anchors: (A, 2) pixels of each level.
        ignore_above: IoU, 0..1.
    """
    places = _places_of(target.boxes, outputs, anchors)
    members = (~target.ignored).nonzero().flatten()
    positives, rows = places[members].unique(return_inverse=True)
    latest = torch.zeros_like(positives).scatter_reduce_(
        0, rows, torch.arange(len(members), device=rows.device), reduce="amax", include_self=True
    )
    negative = torch.ones(len(outputs.cells), dtype=torch.bool, device=places.device)
    if len(target):
        with torch.no_grad():
            boxes = predicted_boxes(outputs.values[image], outputs.cells, outputs.anchors)
            # Not so of NaN: a diverged network shall not count as nothing to learn, but stop the training.
            negative &= ~(pairwise_iou(boxes, target.boxes).amax(1) > ignore_above)
            crowds = target.boxes[target.ignored]
            if len(crowds):
                covered = intersection_over_area(clip(boxes, outputs.size), crowds).amax(1)
                negative &= ~(covered >= IGNORED_COVER)
    negative[places] = False
    return Assignment(positives, members[latest], members, rows, negative)


def _places_of(boxes: Tensor, outputs: GridOutputs, anchors: Sequence[Tensor]) -> Tensor:
    """(N,) int64: the place that each box belongs to."""
    box = xyxy_to_cxcywh(boxes)
    starts = [0, *accumulate(rows * columns * len(level) for (rows, columns), level in zip(outputs.maps, anchors))]
    shapes = torch.cat([outputs.anchors[start : start + len(level)] for start, level in zip(starts, anchors)])
    best = pairwise_iou(_centred(box[:, 2:]), _centred(shapes)).argmax(1) if len(boxes) else boxes.new_zeros(0).long()
    places = torch.zeros_like(best)
    first_anchor = 0
    for (rows, columns), level, first_place in zip(outputs.maps, anchors, starts):
        column = (box[:, 0] * columns / outputs.size[1]).long().clamp(0, columns - 1)
        row = (box[:, 1] * rows / outputs.size[0]).long().clamp(0, rows - 1)
        here = (best >= first_anchor) & (best < first_anchor + len(level))
        place = first_place + (row * columns + column) * len(level) + best - first_anchor
        places = torch.where(here, place, places)
        first_anchor += len(level)
    return places


def _centred(shapes: Tensor) -> Tensor:
    """(N, 2) widths and heights as boxes (N, 4) around one point."""
    return torch.cat((-shapes / 2, shapes / 2), dim=1)


def decode_places(
    outputs: GridOutputs, probabilities: Callable[[Tensor], Tensor], postprocess: Postprocess
) -> list[Detections]:
    """Return detections after per-class NMS, in pixels of the network's input.

    Args:
        probabilities: of the classes, from their raw values (K, C); a score is one of them times objectness.
    """
    found = []
    for values, size in zip(outputs.values, outputs.sizes):
        objectness, classes = values[:, 4], values[:, 5:]
        # Not a number, and so looked at everywhere, where a value of a class is not finite.
        kept = postprocess.above_threshold(objectness + 0 * classes.sum())
        scores = objectness[kept, None].sigmoid() * probabilities(classes[kept])
        rows, labels, best = postprocess.candidates(scores)
        rows = kept[rows]
        boxes = clip(predicted_boxes(values[rows], outputs.cells[rows], outputs.anchors[rows]), size)
        found.append((boxes, best, labels))
    return postprocess.detections(found)
