"""Box operations as pure tensor functions: formats, IoU, anchors, coding, matching, sampling and suppression."""

from detkit.boxes.anchors import (
    kmeans_priors,
    linear_scales,
    per_pixel_anchors,
    region_proposal_anchors,
    ssd_default_boxes,
)
from detkit.boxes.coding import decode, encode
from detkit.boxes.convert import area, clip, cxcywh_to_xyxy, xywh_to_xyxy, xyxy_to_cxcywh, xyxy_to_xywh
from detkit.boxes.fusion import FusedBoxes, weighted_box_fusion
from detkit.boxes.iou import elementwise_iou, intersection_over_area, pairwise_iou
from detkit.boxes.mask_paste import paste_masks
from detkit.boxes.matching import match_bipartite, match_ssd, match_two_thresholds
from detkit.boxes.nms import nms
from detkit.boxes.proposals import select_proposals
from detkit.boxes.sampling import hard_negatives, sample_balanced
from detkit.boxes.sim_ota import match_sim_ota
from detkit.boxes.soft_nms import soft_nms

__all__ = [
    "FusedBoxes",
    "area",
    "clip",
    "cxcywh_to_xyxy",
    "decode",
    "elementwise_iou",
    "encode",
    "hard_negatives",
    "intersection_over_area",
    "kmeans_priors",
    "linear_scales",
    "match_bipartite",
    "match_sim_ota",
    "match_ssd",
    "match_two_thresholds",
    "nms",
    "pairwise_iou",
    "paste_masks",
    "per_pixel_anchors",
    "region_proposal_anchors",
    "sample_balanced",
    "select_proposals",
    "soft_nms",
    "ssd_default_boxes",
    "weighted_box_fusion",
    "xywh_to_xyxy",
    "xyxy_to_cxcywh",
    "xyxy_to_xywh",
]
