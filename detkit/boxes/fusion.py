"""Weighted box fusion: the boxes of several models, or of several views of one image, averaged where they agree."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.candidates import check_candidates, check_finite, check_thresholds, sort_into_groups

log = logging.getLogger(__name__)


class FusedBoxes(NamedTuple):
    """K fused boxes, best score first over all images; of equal scores, that whose first member comes first."""

    boxes: Tensor
    """(K, 4) float32 xyxy pixels."""
    scores: Tensor
    """(K,) float64 where the scores given were, else float32."""
    labels: Tensor | None
    """(K,) of the dtype given; None where none were given."""
    image_index: Tensor | None
    """(K,) of the dtype given; None where none was given."""
    counts: Tensor
    """(K,) int64, how many boxes each was fused from."""


def weighted_box_fusion(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.55,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    source_index: Tensor | None = None,
    source_weights: Sequence[float] | Tensor | None = None,
    score_threshold: float | None = None,
) -> FusedBoxes:
    """Weighted box fusion (Solovyev, Wang, Gabruseva 2021, arXiv 1910.13302), apart for each image and class.

    Of N models with weights w_1..w_N, a box of model m and score s counts with c = w_m s. In descending order of
    c, of equal ones by index, each box joins the cluster whose fused box it overlaps most, of equal ones the
    oldest, if their IoU is above `iou_threshold`; else it founds a cluster. With T boxes in a cluster

        fused box   = sum(c_i box_i) / sum(c_i)                    corner by corner, renewed with every member
        fused score = sum(c_i) / T * min(T, N) / sum(w_1..w_N)

    so that a box few models see loses score, and one all see with score 1 has score 1. With weights of 1 this is
    the paper's; with others that of the authors' package ensemble_boxes (conf_type "avg", its default). Unlike
    there, boxes need not be in 0..1, and boxes without area are neither dropped nor have their sides swapped:
    their IoUs are 0, and each stays by itself. Members of score 0 leave the fused box where it is.

    On a GPU's tensors the fusion is computed on the CPU, which a log line of level debug says; the result
    returns to the device. No gradient passes through.

    Args:
        boxes: (M, 4) xyxy pixels of any float dtype, computed in float32; the means in float64.
        scores: (M,) of any float dtype, 0 or more.
        iou_threshold: in 0..1.
        labels: (M,) integers; boxes of different labels are not fused. None: all one class.
        image_index: (M,) integers, which image of the batch each box is of. None: all one image.
        source_index: (M,) integers in 0..N-1, which model each box is of. None: all of one model.
        source_weights: N weights above 0, for example (1, 1, 1). Needed with `source_index`, whose greatest
            entry would miss a model that found nothing. None: one model of weight 1.
        score_threshold: only boxes with a score above it (not equal to it), before any weight, take part.
            None: all.

    Raises:
        ValueError: for wrong shapes, dtypes, devices, thresholds or weights, for one of `source_index` and
            `source_weights` without the other, and by name for boxes or scores that are not finite, scores
            below 0 and sources without a weight: "source_index[17] is 3".
    """
    check_candidates(boxes, scores, labels=labels, image_index=image_index, source_index=source_index)
    check_thresholds(iou_threshold, None)
    if score_threshold is not None and math.isnan(score_threshold):
        raise ValueError("score_threshold is nan, which no score is above; None takes all")
    device = boxes.device
    if device.type != "cpu":
        log.debug("weighted_box_fusion of %d boxes on %s is computed on the CPU", len(boxes), device)
    boxes = boxes.detach().to("cpu", torch.float32)
    scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32))
    labels, image_index, source_index = (
        None if key is None else key.cpu() for key in (labels, image_index, source_index)
    )
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")
    _check_not_negative(scores)
    source_weights = _check_sources(source_index, source_weights)

    confidences = scores.double() * (source_weights if source_index is None else source_weights[source_index.long()])
    by_confidence = confidences.argsort(descending=True, stable=True)
    if score_threshold is not None:
        by_confidence = by_confidence[scores[by_confidence] > score_threshold]
    fused, sums, counts, founders = _fuse(boxes, confidences, by_confidence, iou_threshold, labels, image_index)
    sources = len(source_weights)
    fused_scores = (sums / counts * counts.clamp(max=sources) / source_weights.sum()).to(scores.dtype)
    order = founders.argsort()
    order = order[fused_scores[order].argsort(descending=True, stable=True)]
    founders = founders[order]
    return FusedBoxes(
        boxes=fused[order].to(device),
        scores=fused_scores[order].to(device),
        labels=None if labels is None else labels[founders].to(device),
        image_index=None if image_index is None else image_index[founders].to(device),
        counts=counts[order].to(device),
    )


def _fuse(
    boxes: Tensor,
    confidences: Tensor,
    by_confidence: Tensor,
    iou_threshold: float,
    labels: Tensor | None,
    image_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each cluster the fused box, the sum of confidences, the count of boxes and the box that founded it."""
    # Numba takes a second to import: whoever never fuses does not wait for it.
    from detkit.boxes.kernels.fusion_numba import fuse

    order, starts = sort_into_groups(by_confidence, [key for key in (labels, image_index) if key is not None])
    fused, sums, counts, founders = fuse(
        np.ascontiguousarray(boxes.numpy()), confidences.numpy(), order.numpy(), starts.numpy(), float(iou_threshold)
    )
    return torch.from_numpy(fused), torch.from_numpy(sums), torch.from_numpy(counts), torch.from_numpy(founders)


def _check_not_negative(scores: Tensor) -> None:
    negative = scores < 0
    if negative.any():
        index = int(negative.nonzero()[0])
        raise ValueError(
            f"scores[{index}] is {float(scores[index])}: the mean is weighted by scores, which must be 0 or more"
        )


def _check_sources(source_index: Tensor | None, source_weights: Sequence[float] | Tensor | None) -> Tensor:
    """(N,) float64 weights, after their check and that of the indices that point into them."""
    if source_index is None:
        if source_weights is not None:
            raise ValueError("source_weights need source_index, which says what source each box is of")
        return torch.ones(1, dtype=torch.float64, device="cpu")
    if source_weights is None:
        raise ValueError("source_index needs source_weights, one for each source; (1, 1, 1) for three that count alike")
    weights = torch.as_tensor(source_weights, dtype=torch.float64, device="cpu").detach()
    if weights.ndim != 1 or len(weights) == 0:
        raise ValueError(f"source_weights must be (N,), at least one, but are {tuple(weights.shape)}")
    check_finite(weights, "source_weights")
    if not (weights > 0).all():
        index = int((weights <= 0).nonzero()[0])
        raise ValueError(
            f"source_weights[{index}] is {float(weights[index])}, but must be above 0; leave out the boxes of a "
            "source that shall not count"
        )
    outside = (source_index < 0) | (source_index >= len(weights))
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"source_index[{index}] is {int(source_index[index])}, but there are {len(weights)} source_weights: "
            f"it must be in 0..{len(weights) - 1}"
        )
    return weights
