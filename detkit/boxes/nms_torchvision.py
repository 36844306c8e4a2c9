"""Non-maximum suppression by torchvision's kernel, group by group, for GPUs without numba-cuda."""

from itertools import pairwise

import torch
from torch import Tensor
from torchvision import ops

from detkit.boxes.candidates import first_of_each_image, sort_into_groups


def nms_by_torchvision(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """`detkit.boxes.nms` with one call of torchvision.ops.nms per image and class. Works on any device.

    Arguments and result as for `detkit.boxes.nms`, which checks the arguments.

    Raises:
        ValueError: boxes or scores are not finite.
    """
    boxes = boxes.detach().float()
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    for name, values in (("boxes", boxes), ("scores", scores)):
        if not bool(values.isfinite().all()):
            index = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{index} is {float(values[tuple(index)])}")
    by_score = scores.argsort(descending=True, stable=True)
    if score_threshold is not None:
        by_score = by_score[scores[by_score] > score_threshold]
    if len(by_score) == 0:
        return by_score
    order, starts = sort_into_groups(by_score, [key for key in (labels, image_index) if key is not None])
    # Each group is sorted by score already. Strictly decreasing scores keep that order, regardless of the real dtype.
    falling = torch.arange(len(order), 0, -1, device=boxes.device).to(boxes.dtype)
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for begin, end in pairwise(starts.tolist()):
        members = order[begin:end]
        keep[members[ops.nms(boxes[members], falling[begin:end], iou_threshold)]] = True
    kept = by_score[keep[by_score]]
    return kept if max_detections is None else first_of_each_image(kept, image_index, max_detections)
