"""Non-maximum suppression: one call for every image and class of a batch."""

import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from detkit.boxes.candidates import (
    check_candidates,
    check_finite,
    check_thresholds,
    first_of_each_image,
)

log = logging.getLogger(__name__)

_INDICES = torch.empty(0, dtype=torch.int64)
_kernel: Callable[..., int] | None = None


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
    boxes = boxes.detach().to("cpu", torch.float32).contiguous()
    # Not less precise than they are: rounding could make scores equal and change their order.
    scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32)).contiguous()
    above_score = -math.inf if score_threshold is None else float(score_threshold)
    if scores.dtype == torch.float64:
        check_finite(scores, "scores")
        scores, above_score = _ranked(scores, above_score)
    labels = None if labels is None else labels.to(torch.int64).contiguous()
    image_index = None if image_index is None else image_index.to(torch.int64).contiguous()
    limit = len(boxes) if max_detections is None else max_detections
    return _suppress(boxes, scores, float(iou_threshold), labels, image_index, above_score, limit).to(device)


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None,
    image_index: Tensor | None,
    above_score: float,
    limit: int,
) -> Tensor:
    """The kernel's call: contiguous float32 boxes and scores, int64 labels and images, all on the CPU."""
    suppress = _kernel or _load_kernel()
    count = boxes.shape[0]
    result = _INDICES.new_empty(count)
    kept = suppress(
        boxes.data_ptr(),
        scores.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if image_index is None else image_index.data_ptr(),
        count,
        iou_threshold,
        above_score,
        limit,
        result.data_ptr(),
    )
    if kept >= 0:
        return result.resize_(kept)
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")
    # Labels or images such as 2^40: numbered anew. An image's limit is applied afterwards.
    groups = _dense_groups([key for key in (labels, image_index) if key is not None])
    found = _suppress(boxes, scores, iou_threshold, groups, None, above_score, count)
    return first_of_each_image(found, image_index, limit)


def _dense_groups(keys: list[Tensor]) -> Tensor:
    """(N,) int64 in 0..N-1, equal where all keys are equal."""
    groups = keys[0].unique(return_inverse=True)[1]
    for key in keys[1:]:
        numbered = key.unique(return_inverse=True)[1]
        groups = (groups * (numbered.max() + 1) + numbered).unique(return_inverse=True)[1]
    return groups


def _ranked(scores: Tensor, above_score: float) -> tuple[Tensor, float]:
    """Float32 scores in the same order as the float64 ones, and the threshold for them: consecutive float32 numbers."""
    order = scores.argsort(descending=True, stable=True)
    greatest = 0x7F7FFFFF  # the bits of the greatest float32; lesser positive ones have lesser bits
    bits = torch.empty(len(scores), dtype=torch.int32)
    bits[order] = greatest - torch.arange(len(scores), dtype=torch.int32)
    above = int((scores > above_score).sum())
    threshold = torch.tensor(greatest - above, dtype=torch.int32).view(torch.float32)
    return bits.view(torch.float32), float(threshold)


def _load_kernel() -> Callable[..., int]:
    # Numba takes half a second to import: whoever never suppresses does not wait for it.
    global _kernel
    log.debug("loading the NMS kernel for the CPU; without Numba's cache it is compiled, some ten seconds")
    started = time.perf_counter()
    from detkit.boxes.nms_numba import suppress

    how = "loaded from Numba's cache" if suppress.stats.cache_hits else "compiled"
    log.debug("NMS kernel %s in %.1f s", how, time.perf_counter() - started)
    _kernel = suppress
    return _kernel
