"""Selection of the proposals of a region-proposal network for the second stage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.coding import decode
from detkit.boxes.convert import clip
from detkit.boxes.nms import nms

MIN_PROPOSAL_SIDE = 1e-3
"""Pixels; proposals with a shorter side are dropped."""


@torch.no_grad()
def select_proposals(
    objectness: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    level_counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    candidates: int,
    proposals: int,
    iou_threshold: float,
) -> list[Tensor]:
    """Select the best proposals of each image (Faster R-CNN, Ren et al. 2015, section 3.3; levels as in FPN, Lin et al.
    2017).

    The best `candidates` of each level are decoded and clipped to the image, and each level is suppressed separately.
    Equal to torchvision's RegionProposalNetwork.filter_proposals, except that only candidates are decoded, and that
    logits are compared: torchvision compares their sigmoid, which ties above 17.

    Args:
        objectness: (B, A) logits.
        offsets: (B, A, 4), with means 0 and deviations 1; see detkit.boxes.coding.
        anchors: (A, 4) xyxy pixels.
        level_counts: number of anchors of each level, in the order of the anchors.
        sizes: (height, width) of each image without padding.
        candidates: maximum number per level and image before suppression.
        proposals: maximum number per image after suppression.
        iou_threshold: IoU above which the lower-scoring of two proposals of a level is removed.

    Returns:
        For each image (P, 4) float32 xyxy pixels inside it, by descending score, P <= proposals.

    Raises:
        ValueError: the level counts do not sum to A.
    """
    if sum(level_counts) != len(anchors):
        raise ValueError(f"the levels have {sum(level_counts)} anchors in total, but there are {len(anchors)}")
    chosen, levels, start = [], [], 0
    for level, count in enumerate(level_counts):
        of_level = objectness[:, start : start + count].topk(min(candidates, count), dim=1).indices
        chosen.append(of_level + start)
        levels.append(torch.full_like(of_level, level))
        start += count
    index, level_of = torch.cat(chosen, dim=1), torch.cat(levels, dim=1)
    scores = objectness.gather(1, index)
    boxes = decode(offsets.gather(1, index[..., None].expand(-1, -1, 4)), anchors[index], deviations=(1.0,) * 4)
    kept = []
    for image, size in enumerate(sizes):
        inside = clip(boxes[image], size)
        large = ((inside[:, 2:] - inside[:, :2]) >= MIN_PROPOSAL_SIDE).all(dim=1)
        inside = inside[large]
        best = nms(inside, scores[image, large], iou_threshold, labels=level_of[image, large], max_detections=proposals)
        kept.append(inside[best])
    return kept
