"""Soft-NMS: decays the scores of overlapping boxes instead of removing the boxes."""

import logging
from typing import Literal, get_args

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
from detkit.errors import nearest

log = logging.getLogger(__name__)

Method = Literal["gaussian", "linear"]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    method: Method = "gaussian",
    iou_threshold: float | None = None,
    sigma: float | None = None,
    score_threshold: float = 0.001,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact Soft-NMS per image and class (Bodla et al. 2017, arXiv 1704.04503).

    Takes the box with the highest current score, ties by index, decays the scores of the other boxes of the same image
    and class, and repeats:

        linear:   score * (1 - iou) where iou > iou_threshold, else unchanged
        gaussian: score * exp(-iou^2 / sigma)

    An IoU equal to the threshold does not decay, as in `nms` and the authors' program; the paper's equation has >=.
    Boxes without area have an IoU of 0 with all others.

    Tensors on a GPU are processed on the CPU (logged at debug level), and the results are returned to their device. The
    result is not differentiable.

    Args:
        boxes: (N, 4) xyxy pixels of any float dtype, computed in float32.
        scores: (N,) of any float dtype.
        method: the decay function.
        iou_threshold: in 0..1, for the linear decay only. None for 0.3.
        sigma: in 1e-30..1e30, for the Gaussian decay only; smaller values decay more. None for 0.5.
        score_threshold: at least 0; boxes whose initial or decayed score is not above it are removed.
        labels: (N,) integers; boxes of different labels do not decay each other. None for a single class.
        image_index: (N,) integers, the image of the batch that each box belongs to. None for a single image.
        max_detections: maximum number of boxes per image, those with the highest decayed scores. None for no limit.

    Returns:
        (K,) int64 indices into `boxes` on its device, by descending decayed score over all images, ties by index; and
        (K,) their decayed scores, float64 if `scores` is, otherwise float32.

    Raises:
        ValueError: invalid shapes, dtypes, devices or thresholds, an unknown method, an option of the other method, or
            boxes or scores that are not finite, naming the entry: "scores[17] is nan".
    """
    iou_threshold, sigma = _options(method, iou_threshold, sigma)
    check_candidates(boxes, scores, labels=labels, image_index=image_index)
    check_thresholds(iou_threshold, max_detections)
    if not score_threshold >= 0:
        raise ValueError(f"score_threshold must be at least 0, but is {score_threshold}")
    device = boxes.device
    if device.type != "cpu":
        log.debug("soft_nms of %d boxes on %s is computed on the CPU", len(boxes), device)
        labels = None if labels is None else labels.cpu()
        image_index = None if image_index is None else image_index.cpu()
    boxes = boxes.detach().to("cpu", torch.float32)
    scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32))
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")

    taken, decayed = _take_and_decay(
        boxes, scores, method, iou_threshold, sigma, score_threshold, labels, image_index, max_detections
    )
    taken = taken.sort().values
    taken = taken[decayed[taken].argsort(descending=True, stable=True)]
    if max_detections is not None:
        taken = first_of_each_image(taken, image_index, max_detections)
    return taken.to(device), decayed[taken].to(device)


def _take_and_decay(
    boxes: Tensor,
    scores: Tensor,
    method: Method,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    labels: Tensor | None,
    image_index: Tensor | None,
    limit: int | None,
) -> tuple[Tensor, Tensor]:
    """Return (K,) int64 boxes taken, at most `limit` per image and class, and (N,) scores, decayed for those."""
    by_score = scores.argsort(descending=True, stable=True)
    least = torch.tensor(score_threshold, dtype=scores.dtype, device=scores.device)
    by_score = by_score[scores[by_score] > least]
    if len(by_score) == 0:
        return by_score, scores
    # Imported on first use: Numba takes a second to import.
    from detkit.boxes.kernels.soft_nms_numba import take_and_decay

    order, starts = sort_into_groups(by_score, [key for key in (labels, image_index) if key is not None])
    gaussian = method == "gaussian"
    taken, decayed = take_and_decay(
        np.ascontiguousarray(boxes.numpy()),
        np.ascontiguousarray(scores.numpy()),
        order.numpy(),
        starts.numpy(),
        gaussian,
        np.float32(sigma),
        0.0 if gaussian else iou_threshold,
        least.item(),
        len(boxes) if limit is None else limit,
    )
    return torch.from_numpy(taken), torch.from_numpy(decayed)


def _options(method: str, iou_threshold: float | None, sigma: float | None) -> tuple[float, float]:
    """Fill in the defaults of the IoU threshold and sigma; raise ValueError for an option of the other method."""
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}. {nearest(str(method), get_args(Method))}")
    if method == "gaussian" and iou_threshold is not None:
        raise ValueError("iou_threshold applies only to method='linear'; leave it out for the Gaussian decay")
    if method == "linear" and sigma is not None:
        raise ValueError("sigma applies only to method='gaussian'; leave it out for the linear decay")
    if sigma is not None and not 1e-30 <= sigma <= 1e30:  # neither 0 nor infinite as float32
        raise ValueError(f"sigma must be in 1e-30..1e30, but is {sigma}")
    return 0.3 if iou_threshold is None else float(iou_threshold), 0.5 if sigma is None else float(sigma)
