"""Non-maximum suppression: one call for every image and class of a batch."""

import logging

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.candidates import (
    check_candidates,
    check_finite,
    check_thresholds,
    first_of_each_image,
    sort_into_groups,
)

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
    check_candidates(boxes, scores, labels=labels, image_index=image_index)
    check_thresholds(iou_threshold, max_detections)
    device = boxes.device
    if device.type != "cpu":
        log.debug("nms of %d boxes on %s is computed on the CPU", len(boxes), device)
        labels = None if labels is None else labels.cpu()
        image_index = None if image_index is None else image_index.cpu()
    boxes = boxes.detach().to("cpu", torch.float32)
    # Not less precise than they are: rounding could make scores equal and change their order.
    scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32))
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")

    by_score = scores.argsort(descending=True, stable=True)
    if score_threshold is not None:
        by_score = by_score[scores[by_score] > score_threshold]
    if len(by_score) == 0:
        return by_score.to(device)
    kept = by_score[_suppress(boxes, by_score, iou_threshold, labels, image_index)[by_score]]
    if max_detections is not None:
        kept = first_of_each_image(kept, image_index, max_detections)
    return kept.to(device)


def _suppress(
    boxes: Tensor, by_score: Tensor, iou_threshold: float, labels: Tensor | None, image_index: Tensor | None
) -> Tensor:
    """(N,) bool, true for each of the boxes `by_score` that is kept; false for the others."""
    # Numba takes a second to import: whoever never suppresses does not wait for it.
    from detkit.boxes.nms_numba import suppress

    order, starts = sort_into_groups(by_score, [key for key in (labels, image_index) if key is not None])
    keep = suppress(np.ascontiguousarray(boxes.numpy()), order.numpy(), starts.numpy(), float(iou_threshold))
    return torch.from_numpy(keep)
