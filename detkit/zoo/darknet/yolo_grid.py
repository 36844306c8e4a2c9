"""Shared parts of YOLOv2 and YOLOv3: boxes predicted from grid cells and anchors, and their assignment to targets.

A *place* is one anchor in one cell of one level. Places are ordered by level, row, column and then anchor.
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
"""Maximum ratio of a predicted side to its anchor; keeps exp finite if the network diverges."""
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
    """The assignment of places to the targets of one image.

    Args:
        places: (M,) int64, positive places, ascending.
        targets: (M,) int64, the target of each positive place; if several share a place, the last one.
        members: (K,) int64, all targets that are not ignored.
        rows: (K,) int64, for each of `members` the index of its place in `places`.
        negative: (P,) bool, background; places that are neither positive nor negative are ignored.
    """

    places: Tensor
    targets: Tensor
    members: Tensor
    rows: Tensor
    negative: Tensor


def anchors_by_level(anchors: Anchors, levels: int, path: str) -> list[Tensor]:
    """Split anchors into levels of (A, 2) each, finest level first.

    Args:
        anchors: (width, height) in pixels.
        path: the name of the option, for messages.

    Raises:
        ConfigError: the anchors are not positive, or cannot be divided evenly.
    """
    if not anchors or len(anchors) % levels or min(min(anchor) for anchor in anchors) <= 0:
        raise ConfigError(
            f"'{path}' must be positive [width, height] pairs in pixels of the network's input, the same number for "
            f"each of the {levels} feature maps, but there are {len(anchors)}: {[list(anchor) for anchor in anchors]}. "
            f"`detkit check CONFIG --anchors N` proposes N from the data."
        )
    return list(torch.tensor(anchors, dtype=torch.float32).reshape(levels, -1, 2))


def lay_grid(
    maps: Sequence[tuple[int, int]], size: tuple[int, int], anchors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the cells (P, 4) xyxy pixels and anchors (P, 2) of all places.

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
    """Reshape the prediction of a level (B, A * values, h, w) to (B, h * w * A, values), float32."""
    # Half precision is not accurate enough for sigmoids, exponentials and sums over thousands of places.
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values).float()


def predicted_boxes(values: Tensor, cells: Tensor, anchors: Tensor) -> Tensor:
    """Decode boxes (..., P, 4) xyxy pixels: the centre within its cell, the sides as multiples of the anchor's.

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
    """Encode boxes as regression targets (M, 4) of their places: sigmoid(t_x), sigmoid(t_y), t_w and t_h.

    Args:
        boxes: (M, 4) xyxy, the target box of each place.
        cells: (M, 4) xyxy.
        anchors: (M, 2).
    """
    box = xyxy_to_cxcywh(boxes)
    inside = ((box[:, :2] - cells[:, :2]) / (cells[:, 2:] - cells[:, :2])).clamp(0, 1)
    return torch.cat((inside, (box[:, 2:].clamp(min=MIN_ENCODED_SIDE) / anchors).log()), dim=1)


def size_weights(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return box weights (M,) of 2 - (fraction of the image covered), with which Darknet emphasizes small boxes."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return 2 - sides.prod(1) / (size[0] * size[1])


def assign(
    outputs: GridOutputs, image: int, target: Target, anchors: Sequence[Tensor], ignore_above: float
) -> Assignment:
    """Assign one place over all levels to each target, and find the background.

    A target is assigned to the cell that contains its centre and to the anchor of the most similar shape (highest IoU
    of centred boxes; in a tie the first). All other places are background, except those whose predicted box has an IoU
    above `ignore_above` with a target. Ignored targets (crowd, difficult) give no positives; their places, and
    predicted boxes that lie at least half inside them, are ignored too.

    Args:
        outputs: raw outputs of the head.
        image: index of the image in `outputs`.
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
            # NaN boxes stay negative, so that a diverged network gives a NaN loss and stops the training.
            negative &= ~(pairwise_iou(boxes, target.boxes).amax(1) > ignore_above)
            crowds = target.boxes[target.ignored]
            if len(crowds):
                covered = intersection_over_area(clip(boxes, outputs.size), crowds).amax(1)
                negative &= ~(covered >= IGNORED_COVER)
    negative[places] = False
    return Assignment(positives, members[latest], members, rows, negative)


def _places_of(boxes: Tensor, outputs: GridOutputs, anchors: Sequence[Tensor]) -> Tensor:
    """Return the place (N,) int64 of each box."""
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
    """Convert widths and heights (N, 2) to boxes (N, 4) with a common centre."""
    return torch.cat((-shapes / 2, shapes / 2), dim=1)


def decode_places(
    outputs: GridOutputs, probabilities: Callable[[Tensor], Tensor], postprocess: Postprocess
) -> list[Detections]:
    """Return detections after per-class NMS, in pixels of the network's input.

    Args:
        probabilities: maps raw class values (K, C) to probabilities; scores are these times objectness.
    """
    found = []
    for values, size in zip(outputs.values, outputs.sizes):
        objectness, classes = values[:, 4], values[:, 5:]
        # The added term is NaN if any class value is not finite, so that `candidates` reports it.
        kept = postprocess.above_threshold(objectness + 0 * classes.sum())
        scores = objectness[kept, None].sigmoid() * probabilities(classes[kept])
        rows, labels, best = postprocess.candidates(scores)
        rows = kept[rows]
        boxes = clip(predicted_boxes(values[rows], outputs.cells[rows], outputs.anchors[rows]), size)
        found.append((boxes, best, labels))
    return postprocess.detections(found)
