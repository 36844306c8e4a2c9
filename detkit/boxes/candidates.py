"""Argument checks and partitioning by image and class, shared by all suppression functions."""

import math

import numpy as np
import torch
from torch import Tensor


def check_candidates(boxes: Tensor, scores: Tensor, **keys: Tensor | None) -> None:
    """Raise ValueError unless boxes are (N, 4), scores (N,), and `keys` (labels, ...) (N,) integers."""
    for name, tensor in {"boxes": boxes, "scores": scores, **keys}.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in keys):
            raise ValueError(f"{name} must be a torch.Tensor, but is a {type(tensor).__name__}")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes must be (N, 4) of a float dtype, but got {tuple(boxes.shape)} {boxes.dtype}")
    count = len(boxes)
    if scores.shape != (count,) or not scores.is_floating_point():
        raise ValueError(f"scores must be ({count},) of a float dtype, but got {tuple(scores.shape)} {scores.dtype}")
    for name, key in keys.items():
        if key is None:
            continue
        if key.shape != (count,) or key.is_floating_point() or key.is_complex() or key.dtype == torch.bool:
            raise ValueError(f"{name} must be ({count},) integers, but got {tuple(key.shape)} {key.dtype}")
    if any(tensor is not None and tensor.device != boxes.device for tensor in (scores, *keys.values())):
        raise ValueError(f"{', '.join(('scores', *keys))} must be on the device of the boxes, {boxes.device}")


def check_thresholds(iou_threshold: float, max_detections: int | None, score_threshold: float | None = None) -> None:
    """Raise ValueError unless the IoU is in 0..1, the limit at least 0 or None, the score a number or None."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, but is {iou_threshold}")
    if score_threshold is not None and math.isnan(score_threshold):
        raise ValueError("score_threshold is NaN, which no score is above. Give a number, or None for all scores.")
    if max_detections is not None and max_detections < 0:
        raise ValueError(f"max_detections must be 0 or more, or None for no limit, but is {max_detections}")


def check_finite(values: Tensor, name: str) -> None:
    """Raise ValueError for the first entry that is NaN or infinite: "scores[17] is nan". CPU only."""
    finite = np.isfinite(values.detach().numpy())  # several times faster than torch for a hundred boxes
    if not finite.all():
        index = np.argwhere(~finite)[0].tolist()
        value = float(values[tuple(index)])
        raise ValueError(
            f"{name}{index} is {value}" + (" as float32" if math.isinf(value) and values.dtype == torch.float32 else "")
        )


def sort_into_groups(indices: Tensor, keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Partition indices by keys, such as image and class.

    Args:
        indices: (N,) int64, by descending score.
        keys: each (M,) integers, indexed by `indices`.

    Returns:
        (N,) the indices grouped by equal keys, stable within each group; and (G + 1,) the start of each group, and N.
    """
    if not keys:
        return indices, torch.tensor((0, len(indices)), device=indices.device)
    order = indices
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    begins = torch.zeros(len(order) + 1, dtype=torch.bool, device=order.device)
    begins[0] = begins[-1] = True
    for key in keys:
        values = key[order]
        begins[1:-1] |= values[1:] != values[:-1]
    return order, begins.nonzero().flatten()


def first_of_each_image(kept: Tensor, image_index: Tensor | None, limit: int) -> Tensor:
    """Keep the first `limit` indices of each image, in their order."""
    if image_index is None:
        return kept[:limit]
    order, starts = sort_into_groups(torch.arange(len(kept), device=kept.device), [image_index[kept]])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(kept), device=kept.device) - torch.repeat_interleave(starts[:-1], starts.diff())
    return kept[rank < limit]
