"""Other libraries under detkit's own calls: tensors in, tensors out, conversions included.

The peers that detkit does not depend on are found when they are installed: `installed` says which.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import ops

from benchmarks.inputs import Candidates

Suppression = Callable[[Candidates, float], Tensor]
"""Indices of the kept boxes from candidates and the IoU threshold."""
OPTIONAL = ("lsnms", "powerboxes")


def installed() -> dict[str, bool]:
    """Whether each optional peer can be imported."""
    return {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}


def suppressions(grouped: bool) -> dict[str, Suppression]:
    """Peers of detkit.boxes.nms by name: for boxes of one group, or of many images and classes."""
    found: dict[str, Suppression] = {"torchvision": torchvision_batched if grouped else torchvision_nms}
    if grouped:
        found["torchvision per image"] = torchvision_per_image
    found["OpenCV"] = opencv_nms
    found["NumPy loop"] = by_group(numpy_loop)
    if installed()["lsnms"]:
        found["lsnms"] = lsnms_nms
    if installed()["powerboxes"]:
        found["powerboxes"] = by_group(powerboxes_nms)
        found["powerboxes r-tree"] = by_group(powerboxes_rtree)
    return found


def torchvision_nms(given: Candidates, iou_threshold: float) -> Tensor:
    """torchvision.ops.nms."""
    return ops.nms(given.boxes, given.scores, iou_threshold)


def torchvision_batched(given: Candidates, iou_threshold: float) -> Tensor:
    """One torchvision.ops.batched_nms for all images and classes."""
    assert given.groups is not None
    return ops.batched_nms(given.boxes, given.scores, given.groups, iou_threshold)


def torchvision_per_image(given: Candidates, iou_threshold: float) -> Tensor:
    """A torchvision.ops.batched_nms for each image."""
    assert given.labels is not None
    assert given.image_index is not None
    kept = []
    for image in range(int(given.image_index.max()) + 1):
        members = (given.image_index == image).nonzero().flatten()
        found = ops.batched_nms(given.boxes[members], given.scores[members], given.labels[members], iou_threshold)
        kept.append(members[found])
    return torch.cat(kept)


def opencv_nms(given: Candidates, iou_threshold: float) -> Tensor:
    """cv2.dnn.NMSBoxes, or NMSBoxesBatched."""
    from cv2 import dnn

    suppressing: Any = dnn  # its type stubs know lists only
    corners = given.boxes.double().numpy()
    xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
    scores = given.scores.numpy()
    if given.groups is None:
        kept = suppressing.NMSBoxes(xywh, scores, 0.0, iou_threshold)
    else:
        kept = suppressing.NMSBoxesBatched(xywh, scores, given.groups.int().numpy(), 0.0, iou_threshold)
    return _indices(kept)


def lsnms_nms(given: Candidates, iou_threshold: float) -> Tensor:
    """lsnms.nms: an R-tree, in Rust."""
    groups = None if given.groups is None else given.groups.numpy()
    nms = importlib.import_module("lsnms").nms
    return _indices(nms(given.boxes.numpy(), given.scores.numpy(), iou_threshold, 0.0, class_ids=groups))


def powerboxes_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """powerboxes.nms: all pairs, in Rust."""
    nms = importlib.import_module("powerboxes").nms
    return _indices(nms(boxes.numpy(), scores.double().numpy(), iou_threshold, 0.0))


def powerboxes_rtree(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """powerboxes.rtree_nms: an R-tree, in Rust."""
    nms = importlib.import_module("powerboxes").rtree_nms
    return _indices(nms(boxes.numpy(), scores.double().numpy(), iou_threshold, 0.0))


def numpy_loop(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression as it is usually written in NumPy: the best box against all that remain, in a loop."""
    left, top, right, bottom = boxes.numpy().T
    areas = (right - left) * (bottom - top)
    remaining = np.argsort(-scores.numpy(), kind="stable")
    kept = []
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        kept.append(best)
        width = np.minimum(right[best], right[others]) - np.maximum(left[best], left[others])
        height = np.minimum(bottom[best], bottom[others]) - np.maximum(top[best], top[others])
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        iou = intersection / (areas[best] + areas[others] - intersection)
        remaining = others[iou <= iou_threshold]
    return _indices(kept)


def by_group(one_group: Callable[[Tensor, Tensor, float], Tensor]) -> Suppression:
    """A suppression of one class and image, called for each."""

    def suppress(given: Candidates, iou_threshold: float) -> Tensor:
        if given.groups is None:
            return one_group(given.boxes, given.scores, iou_threshold)
        order = given.groups.argsort(stable=True)
        _, counts = given.groups[order].unique_consecutive(return_counts=True)
        members = order.split(counts.tolist())
        return torch.cat([m[one_group(given.boxes[m], given.scores[m], iou_threshold)] for m in members])

    return suppress


def exact_nms(given: Candidates, iou_threshold: float) -> Tensor:
    """What detkit must equal: torchvision.ops.nms on each image and class, best score first, ties by index."""
    kept = by_group(ops.nms)(given, iou_threshold)
    if given.groups is None:
        return kept
    kept = kept.sort().values
    return kept[given.scores[kept].argsort(descending=True, stable=True)]


def ious() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Peers of detkit.boxes.pairwise_iou by name."""
    found = {"torchvision": ops.box_iou, "NumPy": numpy_iou, "supervision": supervision_iou}
    if installed()["powerboxes"]:
        found["powerboxes"] = powerboxes_iou
    return found


def numpy_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Pairwise IoU as it is usually written in NumPy."""
    a, b = boxes_a.numpy()[:, None], boxes_b.numpy()[None]
    sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
    intersection = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
    return torch.from_numpy(intersection / (area_a + area_b - intersection))


def supervision_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """supervision.box_iou_batch."""
    from supervision import box_iou_batch

    return torch.from_numpy(box_iou_batch(boxes_a.numpy(), boxes_b.numpy()))


def powerboxes_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """1 - powerboxes.iou_distance."""
    distance = importlib.import_module("powerboxes").iou_distance
    return torch.from_numpy(1 - distance(boxes_a.numpy(), boxes_b.numpy()))


def _indices(kept: Any) -> Tensor:
    return torch.from_numpy(np.asarray(kept).astype(np.int64).reshape(-1))
