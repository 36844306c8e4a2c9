"""The region-proposal network: an objectness score and a box for every anchor.

Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", 2015.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.coding import encode
from detkit.boxes.matching import match_two_thresholds
from detkit.boxes.proposals import select_proposals
from detkit.boxes.sampling import sample_balanced
from detkit.errors import ConfigError, check_range
from detkit.heads.parts.anchor_layouts import AnchorLayout, anchor_layouts
from detkit.heads.parts.losses import BoxLoss, box_loss
from detkit.heads.parts.size_cache import PerSize
from detkit.structures import Inputs, Target

DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
BETA = 1 / 9  # of smooth L1: 3^-2, with sigma = 3 as in the authors' code


class ProposalOutputs(NamedTuple):
    """Raw outputs of the region-proposal network.

    Args:
        objectness: (B, A) logits.
        offsets: (B, A, 4), see detkit.boxes.coding, with deviations 1.
        anchors: (A, 4) xyxy pixels of the network's input.
        level_counts: number of anchors of each level; their sum is A.
        sizes: (height, width) of each image, without padding.
    """

    objectness: Tensor
    offsets: Tensor
    anchors: Tensor
    level_counts: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


class RegionProposalNetwork(nn.Module):
    """Convolutions shared by all levels, then objectness and four offsets for each anchor.

    Anchors that cross the image border take part in training, as in torchvision and Detectron2; the paper excludes
    them.

    Args:
        channels, strides: of the feature maps; on several levels (FPN) all must have the same channels.
        anchors: `name` and options of an anchor layout. Default on one level: the paper's nine anchors, of 128, 256 and
            512 pixels with ratios 1:2, 1:1 and 2:1; on several levels: one size per level, 8 times the stride.
        depth: number of 3x3 convolutions before the predictors.
        foreground_from: IoU with a ground-truth box from which an anchor is positive; the best anchor of each box is
            positive too.
        background_below: maximum IoU below which an anchor is negative; anchors between the two are ignored.
        samples: number of anchors per image that take part in the loss.
        positive_fraction: maximum fraction of positives among them.
        candidates: number of anchors per level and image that enter NMS in `decode`.
        proposals: maximum number of proposals per image after NMS.
        train_candidates, train_proposals: the same for training the second stage.
        nms_threshold: of two proposals with a higher IoU, the lower-scoring one is removed.
        box_loss: l1, smooth_l1, giou, diou or ciou.
        box_weight: factor of the box loss.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        anchors: dict[str, Any] | None = None,
        depth: int = 1,
        foreground_from: float = 0.7,
        background_below: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
        candidates: int = 1000,
        proposals: int = 1000,
        train_candidates: int = 2000,
        train_proposals: int = 2000,
        nms_threshold: float = 0.7,
        box_loss: BoxLoss = "smooth_l1",
        box_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if len(set(channels)) != 1:
            raise ConfigError(
                f"The region-proposal network shares its convolutions between levels, so all maps must have the same "
                f"number of channels, but they have {list(channels)}. Add a neck ({{name: fpn}}), or use a single "
                f"backbone level."
            )
        check_range("head.rpn", 1, candidates=candidates, proposals=proposals, samples=samples)
        check_range("head.rpn", 1, train_candidates=train_candidates, train_proposals=train_proposals)
        check_range("head.rpn", 0, depth=depth, box_weight=box_weight)
        check_range("head.rpn", 0, 1, positive_fraction=positive_fraction, nms_threshold=nms_threshold)
        check_range("head.rpn", 0, 1, foreground_from=foreground_from, background_below=background_below)
        if background_below > foreground_from:
            raise ConfigError(
                f"'head.rpn.background_below' must not be above 'head.rpn.foreground_from', but they are "
                f"{background_below} and {foreground_from}."
            )
        self.strides = tuple(strides)
        self.layout: AnchorLayout = anchor_layouts.build(anchors or _default_anchors(strides), "head.rpn.anchors")
        self.anchors = PerSize(self.layout)
        counts = self.layout.per_location(len(strides))
        if len(set(counts)) != 1:
            raise ConfigError(
                f"'head.rpn.anchors' must give the same number of anchors per location on each level, but gives "
                f"{counts}."
            )
        self.foreground_from, self.background_below = foreground_from, background_below
        self.samples, self.positive_fraction = samples, positive_fraction
        self.amounts, self.train_amounts = (candidates, proposals), (train_candidates, train_proposals)
        self.nms_threshold = nms_threshold
        self.box_loss: BoxLoss = box_loss
        self.box_weight = box_weight
        width = channels[0]
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.objectness = nn.Conv2d(width, counts[0], 1)
        self.offsets = nn.Conv2d(width, counts[0] * 4, 1)
        for layer in (*self.convolutions, self.objectness, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], inputs: Inputs) -> ProposalOutputs:
        """Compute objectness and offsets of all anchors from feature maps [(B, C, h_i, w_i)]."""
        objectness, offsets = [], []
        for feature in features:
            for convolution in self.convolutions:
                feature = F.relu(convolution(feature))
            objectness.append(self.objectness(feature).permute(0, 2, 3, 1).flatten(1))
            offsets.append(self.offsets(feature).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
        map_sizes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        anchors = self.anchors(features[0].device, map_sizes, inputs.size, self.strides)
        level_counts = tuple(level.shape[1] for level in objectness)
        return ProposalOutputs(
            torch.cat(objectness, 1).float(), torch.cat(offsets, 1).float(), anchors, level_counts, inputs.sizes
        )

    def loss(self, outputs: ProposalOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `objectness` (binary cross-entropy) and `proposal_box`, both divided by the number of sampled
        anchors."""
        logits, labels = [], []
        boxes_loss = outputs.offsets.sum() * 0.0
        for image, target in enumerate(targets):
            match = match_two_thresholds(
                outputs.anchors,
                target.boxes,
                target.ignored,
                low=self.background_below,
                high=self.foreground_from,
            )
            positive, negative = sample_balanced(match, self.samples, self.positive_fraction)
            chosen = torch.cat((positive, negative))
            logits.append(outputs.objectness[image, chosen])
            labels.append(torch.arange(len(chosen), device=chosen.device) < len(positive))
            anchors = outputs.anchors[positive]
            true_offsets = encode(target.boxes[match.target_index[positive]], anchors, deviations=DEVIATIONS)
            boxes_loss = boxes_loss + box_loss(
                outputs.offsets[image, positive], anchors, true_offsets, self.box_loss, DEVIATIONS, BETA
            )
        flat, ground_truth = torch.cat(logits), torch.cat(labels).float()
        normaliser = max(len(flat), 1)
        return {
            "objectness": F.binary_cross_entropy_with_logits(flat, ground_truth, reduction="sum") / normaliser,
            "proposal_box": self.box_weight * boxes_loss / normaliser,
        }

    def propose(self, outputs: ProposalOutputs, amounts: tuple[int, int]) -> list[Tensor]:
        """Return the best regions of each image, (P, 4) xyxy pixels, best first, without gradient.

        Args:
            amounts: (candidates, proposals): `self.amounts` or `self.train_amounts`.
        """
        candidates, proposals = amounts
        return select_proposals(
            outputs.objectness.detach(),
            outputs.offsets.detach(),
            outputs.anchors,
            outputs.level_counts,
            outputs.sizes,
            candidates=candidates,
            proposals=proposals,
            iou_threshold=self.nms_threshold,
        )


def _default_anchors(strides: Sequence[int]) -> dict[str, Any]:
    """Return the nine anchors of Ren et al. for one level, or those of Lin et al. (FPN), one size per level."""
    if min(strides) < 1:
        raise ConfigError(
            f"The region-proposal network has no default anchors for a map pooled from the whole image (strides "
            f"{list(strides)}). Set 'head.rpn.anchors', or remove that map."
        )
    sizes = [[128.0, 256.0, 512.0]] if len(strides) == 1 else [[8.0 * stride] for stride in strides]
    return {"name": "pyramid", "sizes": sizes}
