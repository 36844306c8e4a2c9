"""Non-maximum suppression: one call for every image and class of a batch."""

import logging

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """Exact greedy non-maximum suppression, apart for each image and class.

    Takes the box with the highest score, removes all of the same image and class whose IoU with it is above
    `iou_threshold`, and repeats. Equal to torchvision.ops.nms on each image and class, equal scores included:
    there the box that comes first goes first. Boxes without area suppress nothing and are never suppressed.
    The work is bounded by nothing but the number of boxes; there is no time limit.

    On a GPU's tensors the suppression itself is computed on the CPU for now, which a log line of level debug
    says; the result returns to the device.

    Args:
        boxes: (N, 4) xyxy pixels of any float dtype, computed in float32.
        scores: (N,) of any float dtype.
        iou_threshold: in 0..1.
        labels: (N,) integers; boxes of different labels do not suppress each other. None: all one class.
        image_index: (N,) integers, which image of the batch each box is of. None: all one image.
        score_threshold: only scores above it (not equal to it) take part. None: all.
        max_detections: the most kept boxes of each image, those with the highest scores. None: all.

    Returns:
        (K,) int64 indices into `boxes` on its device, best score first over all images, ties by index.

    Raises:
        ValueError: for wrong shapes, dtypes, devices or thresholds, and for boxes or scores that are not
            finite, by name: "scores[17] is nan".
    """
    _check_arguments(boxes, scores, iou_threshold, labels, image_index, max_detections)
    device = boxes.device
    if device.type != "cpu":
        log.debug("nms of %d boxes on %s is computed on the CPU", len(boxes), device)
        labels = None if labels is None else labels.cpu()
        image_index = None if image_index is None else image_index.cpu()
    boxes = boxes.detach().to("cpu", torch.float32)
    # Not less precise than they are: rounding could make scores equal and change their order.
    scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32))
    _check_finite(boxes, "boxes")
    _check_finite(scores, "scores")

    by_score = scores.argsort(descending=True, stable=True)
    if score_threshold is not None:
        by_score = by_score[scores[by_score] > score_threshold]
    if len(by_score) == 0:
        return by_score.to(device)
    kept = by_score[_suppress(boxes, by_score, iou_threshold, labels, image_index)[by_score]]
    if max_detections is not None:
        kept = _first_of_each_image(kept, image_index, max_detections)
    return kept.to(device)


def _suppress(
    boxes: Tensor, by_score: Tensor, iou_threshold: float, labels: Tensor | None, image_index: Tensor | None
) -> Tensor:
    """(N,) bool, true for each of the boxes `by_score` that is kept; false for the others."""
    # Numba takes a second to import: whoever never suppresses does not wait for it.
    from detkit.boxes.nms_numba import suppress

    order, starts = _group(by_score, [key for key in (labels, image_index) if key is not None])
    keep = suppress(np.ascontiguousarray(boxes.numpy()), order.numpy(), starts.numpy(), float(iou_threshold))
    return torch.from_numpy(keep)


def _group(by_score: Tensor, keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The indices sorted into groups of equal keys, their order kept within each; and the G + 1 starts of groups."""
    if not keys:
        return by_score, torch.tensor((0, len(by_score)))
    order = by_score
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    begins = torch.zeros(len(order) + 1, dtype=torch.bool)
    begins[0] = begins[-1] = True
    for key in keys:
        values = key[order]
        begins[1:-1] |= values[1:] != values[:-1]
    return order, begins.nonzero().flatten()


def _first_of_each_image(kept: Tensor, image_index: Tensor | None, limit: int) -> Tensor:
    """The first `limit` of each image's indices, in the order they come."""
    if image_index is None:
        return kept[:limit]
    order, starts = _group(torch.arange(len(kept)), [image_index[kept]])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(kept)) - torch.repeat_interleave(starts[:-1], starts.diff())
    return kept[rank < limit]


def _check_arguments(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None,
    image_index: Tensor | None,
    max_detections: int | None,
) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes must be (N, 4) of a float dtype, but got {tuple(boxes.shape)} {boxes.dtype}")
    count = len(boxes)
    if scores.shape != (count,) or not scores.is_floating_point():
        raise ValueError(f"scores must be ({count},) of a float dtype, but got {tuple(scores.shape)} {scores.dtype}")
    for name, key in (("labels", labels), ("image_index", image_index)):
        if key is None:
            continue
        if key.shape != (count,) or key.is_floating_point() or key.is_complex() or key.dtype == torch.bool:
            raise ValueError(f"{name} must be ({count},) integers, but got {tuple(key.shape)} {key.dtype}")
    if any(tensor is not None and tensor.device != boxes.device for tensor in (scores, labels, image_index)):
        raise ValueError(f"scores, labels and image_index must be on the device of the boxes, {boxes.device}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, but is {iou_threshold}")
    if max_detections is not None and max_detections < 0:
        raise ValueError(f"max_detections must be 0 or more, or None for no limit, but is {max_detections}")


def _check_finite(values: Tensor, name: str) -> None:
    finite = np.isfinite(values.numpy())  # for a hundred boxes several times faster than torch's
    if not finite.all():
        index = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"{name}{index} is {float(values[tuple(index)])}")
