"""Weighted box fusion: averages matching boxes of several models or of several views of one image."""

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
    """K fused boxes, by descending score over all images; ties by the index of the first member."""

    boxes: Tensor
    """(K, 4) float32 xyxy pixels."""
    scores: Tensor
    """(K,) float64 if the input scores are, otherwise float32."""
    labels: Tensor | None
    """(K,) of the input dtype; None without labels."""
    image_index: Tensor | None
    """(K,) of the input dtype; None without image_index."""
    counts: Tensor
    """(K,) int64, the number of boxes fused into each."""


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
    """Fuse overlapping boxes per image and class (Solovyev, Wang, Gabruseva 2021, arXiv 1910.13302).

    With N models of weights w_1..w_N, a box of model m with score s has the confidence c = w_m s. In descending order
    of c, ties by index, each box joins the cluster whose fused box has the largest IoU with it (ties: the oldest
    cluster) if that IoU is above `iou_threshold`; otherwise it starts a new cluster. For a cluster of T boxes

        fused box   = sum(c_i box_i) / sum(c_i)                    per corner, updated with every member
        fused score = sum(c_i) / T * min(T, N) / sum(w_1..w_N)

    so that a box found by few models loses score, and a box found by all of them with score 1 has score 1. With weights
    of 1 this is the paper's method, with others that of the authors' package ensemble_boxes (conf_type "avg", its
    default). Unlike there, boxes need not be in 0..1, and boxes without area are neither dropped nor reordered: their
    IoUs are 0, so each stays alone. Members of score 0 do not move the fused box.

    Tensors on a GPU are fused on the CPU (logged at debug level), and the result is returned to their device. The
    result is not differentiable.

    Args:
        boxes: (M, 4) xyxy pixels of any float dtype, computed in float32; the means in float64.
        scores: (M,) of any float dtype, at least 0.
        iou_threshold: in 0..1.
        labels: (M,) integers; boxes of different labels are not fused. None for a single class.
        image_index: (M,) integers, the image of the batch that each box belongs to. None for a single image.
        source_index: (M,) integers in 0..N-1, the model of each box. None for a single model.
        source_weights: N weights above 0, for example (1, 1, 1). Required with `source_index`, from whose maximum a
            model without any boxes would be missing. None for one model of weight 1.
        score_threshold: boxes with an unweighted score of at most this value are discarded. None keeps all.

    Raises:
        ValueError: invalid shapes, dtypes, devices, thresholds or weights; only one of `source_index` and
            `source_weights` is given; or, naming the entry ("source_index[17] is 3"), boxes or scores that are not
            finite, scores below 0 and sources without a weight.
    """
    check_candidates(boxes, scores, labels=labels, image_index=image_index, source_index=source_index)
    check_thresholds(iou_threshold, None)
    if score_threshold is not None and math.isnan(score_threshold):
        raise ValueError("score_threshold is nan, which no score is above; use None to keep all boxes")
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
    """Return for each cluster the fused box, the sum of confidences, the number of boxes and the index of the first."""
    # Imported on first use: Numba takes a second to import.
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
            f"scores[{index}] is {float(scores[index])}, but scores weight the mean and must be at least 0"
        )


def _check_sources(source_index: Tensor | None, source_weights: Sequence[float] | Tensor | None) -> Tensor:
    """Check the weights and the indices into them, and return (N,) float64 weights."""
    if source_index is None:
        if source_weights is not None:
            raise ValueError("source_weights need source_index, which says what source each box is of")
        return torch.ones(1, dtype=torch.float64, device="cpu")
    if source_weights is None:
        raise ValueError("source_index needs source_weights, one for each source; (1, 1, 1) for three of equal weight")
    weights = torch.as_tensor(source_weights, dtype=torch.float64, device="cpu").detach()
    if weights.ndim != 1 or len(weights) == 0:
        raise ValueError(f"source_weights must be (N,), at least one, but are {tuple(weights.shape)}")
    check_finite(weights, "source_weights")
    if not (weights > 0).all():
        index = int((weights <= 0).nonzero()[0])
        raise ValueError(
            f"source_weights[{index}] is {float(weights[index])}, but must be above 0; to ignore a source, leave out "
            "its boxes"
        )
    outside = (source_index < 0) | (source_index >= len(weights))
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"source_index[{index}] is {int(source_index[index])}, but there are {len(weights)} source_weights: "
            f"it must be in 0..{len(weights) - 1}"
        )
    return weights
