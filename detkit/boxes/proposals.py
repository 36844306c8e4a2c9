"""From the scores and offsets of a region-proposal network to the regions that a second stage looks at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.coding import decode
from detkit.boxes.convert import clip
from detkit.boxes.nms import nms

SMALLEST_SIDE = 1e-3
"""Pixels; a proposal with a shorter side is dropped."""


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
    """The best regions of each image (Faster R-CNN, Ren et al. 2015, section 3.3; by level as in FPN, Lin et al. 2017).

    Of each level the best `candidates` are decoded and cut to the image; then the levels are suppressed one apart from
    the other. Equal to torchvision's RegionProposalNetwork.filter_proposals, but that only candidates are decoded, and
    that logits are compared, where torchvision's sigmoid makes those above 17 equal.

    Args:
        objectness: (B, A) logits.
        offsets: (B, A, 4), with means 0 and deviations 1; see detkit.boxes.coding.
        anchors: (A, 4) xyxy pixels.
        level_counts: how many of the A anchors each level has, in their order.
        sizes: (height, width) of each image without padding.
        candidates: of each level and image that enter suppression.
        proposals: the most that are kept of each image.
        iou_threshold: of two of one level that overlap more, the one with the lower score goes.

    Returns:
        For each image (P, 4) float32 xyxy pixels inside it, best score first, P <= proposals.

    Raises:
        ValueError: the level counts do not add up to A.
    """
    if sum(level_counts) != len(anchors):
        raise ValueError(f"the levels have {sum(level_counts)} anchors together, but there are {len(anchors)}")
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
        large = ((inside[:, 2:] - inside[:, :2]) >= SMALLEST_SIDE).all(dim=1)
        inside = inside[large]
        best = nms(inside, scores[image, large], iou_threshold, labels=level_of[image, large], max_detections=proposals)
        kept.append(inside[best])
    return kept
