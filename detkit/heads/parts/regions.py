"""The second stage of two-stage detectors: a class and a box for each region."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.coding import decode, encode
from detkit.boxes.convert import clip
from detkit.boxes.matching import match_two_thresholds
from detkit.boxes.sampling import sample_balanced
from detkit.errors import ConfigError, check_range
from detkit.heads.base import Postprocess
from detkit.heads.parts.losses import BoxLoss, box_loss
from detkit.heads.parts.region_features import RegionFeatures, region_features
from detkit.heads.parts.region_trunks import RegionTrunk, region_trunks
from detkit.structures import Detections, Match, Target

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
BETA = 1 / 9  # of smooth L1, as in torchvision
REGIONS_AT_ONCE = 256
SMALLEST_SIDE = 1e-2
"""Minimum side of a detection in pixels; smaller ones are dropped."""


class SampledRegions(NamedTuple):
    """The regions of one image that take part in the loss, positives first.

    Args:
        boxes: (S, 4) xyxy pixels.
        target_index: (S,) index of the matched target; only valid where `positive`.
        positive: (S,) bool.
    """

    boxes: Tensor
    target_index: Tensor
    positive: Tensor


class RegionStage(nn.Module):
    """Region features, a trunk, and predictors of a class and of four offsets per class.

    Args:
        channels, strides: of the feature maps.
        num_classes: C, without background.
        features: `name` (warp, spp, roi_pool or roi_align) and options of the region features.
        trunk: `name` (mlp, conv_fc, resnet_layer4 or mean) and options of the layers after them.
        classifier: softmax over the classes and background, or hinge: a one-vs-rest linear support vector machine per
            class as in R-CNN, but trained jointly with the features (Tang 2013), not after them.
        foreground_from: IoU with a ground-truth box from which a region is positive.
        background_below: maximum IoU below which a region is negative; regions between the two are ignored.
        background_from: maximum IoU below which a region is also ignored, in images with objects (0.1 in Fast R-CNN, to
            select hard negatives).
        samples: number of regions per image that take part in the loss.
        positive_fraction: maximum fraction of positives among them.
        box_loss: l1, smooth_l1, giou, diou or ciou.
        box_weight: factor of the box loss.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        features: dict[str, Any] | None = None,
        trunk: dict[str, Any] | None = None,
        classifier: Literal["softmax", "hinge"] = "softmax",
        foreground_from: float = 0.5,
        background_below: float = 0.5,
        background_from: float = 0.0,
        samples: int = 512,
        positive_fraction: float = 0.25,
        box_loss: BoxLoss = "smooth_l1",
        box_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_range("head.regions", 1, samples=samples)
        check_range("head.regions", 0, box_weight=box_weight)
        check_range("head.regions", 0, 1, positive_fraction=positive_fraction)
        if not 0 <= background_from <= background_below <= foreground_from <= 1:
            raise ConfigError(
                f"'head.regions' needs 0 <= background_from <= background_below <= foreground_from <= 1, but they are "
                f"{background_from}, {background_below} and {foreground_from}."
            )
        self.num_classes, self.classifier = num_classes, classifier
        self.foreground_from, self.background_below = foreground_from, background_below
        self.background_from = background_from
        self.samples, self.positive_fraction = samples, positive_fraction
        self.box_loss: BoxLoss = box_loss
        self.box_weight = box_weight
        self.features: RegionFeatures = region_features.build(
            features or {"name": "roi_align"}, "head.regions.features", channels=channels, strides=strides
        )
        self.trunk: RegionTrunk = region_trunks.build(
            trunk or {"name": "mlp"}, "head.regions.trunk", shape=self.features.shape
        )
        self.class_predictor = nn.Linear(self.trunk.width, num_classes + (classifier == "softmax"))
        self.box_predictor = nn.Linear(self.trunk.width, num_classes * 4)
        nn.init.normal_(self.class_predictor.weight, std=0.01)
        nn.init.normal_(self.box_predictor.weight, std=0.001)
        for predictor in (self.class_predictor, self.box_predictor):
            nn.init.zeros_(predictor.bias)

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute logits (R, C + 1), column 0 background (for hinge, margins (R, C)), and offsets (R, C, 4).

        Args:
            maps: feature maps [(B, C_i, h_i, w_i)].
            regions: (R_b, 4) xyxy pixels of the network's input for each image.
        """
        vectors = self.trunk(self.features(maps, regions))
        offsets = self.box_predictor(vectors).unflatten(1, (self.num_classes, 4))
        return self.class_predictor(vectors).float(), offsets.float()

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> list[SampledRegions]:
        """Sample the regions of each image that take part in the loss from its proposals and target boxes."""
        sampled = []
        for boxes, target in zip(proposals, targets):
            boxes = torch.cat((boxes, target.boxes[~target.ignored]))
            match = self._match(boxes, target)
            positive, negative = sample_balanced(match, self.samples, self.positive_fraction)
            chosen = torch.cat((positive, negative))
            sampled.append(SampledRegions(boxes[chosen], match.target_index[chosen], match.positive[chosen]))
        return sampled

    def loss(
        self, maps: Sequence[Tensor], sampled: Sequence[SampledRegions], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Compute `class` and `box`, both divided by the number of sampled regions."""
        logits, offsets = self(maps, [regions.boxes for regions in sampled])
        labels, boxes, ground_truths = [], [], []
        for regions, target in zip(sampled, targets):
            ground_truth = regions.target_index[regions.positive]
            label = torch.zeros_like(regions.target_index)
            label[regions.positive] = target.labels[ground_truth] + 1
            labels.append(label)
            boxes.append(regions.boxes[regions.positive])
            ground_truths.append(target.boxes[ground_truth])
        label = torch.cat(labels)
        anchors = torch.cat(boxes)
        rows = label.nonzero().flatten()
        boxes_loss = box_loss(
            offsets[rows, label[rows] - 1],
            anchors,
            encode(torch.cat(ground_truths), anchors, deviations=DEVIATIONS),
            self.box_loss,
            DEVIATIONS,
            BETA,
        )
        normaliser = max(len(label), 1)
        return {"class": self._class_loss(logits, label) / normaliser, "box": self.box_weight * boxes_loss / normaliser}

    @torch.no_grad()
    def decode(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        limits: Postprocess,
    ) -> list[Detections]:
        """Return the detections of each image after per-class NMS, in pixels of the network's input."""
        found = []
        for image, (boxes, size) in enumerate(zip(proposals, sizes)):
            # Convert once to the format that pooling requires.
            own = [
                feature[image : image + 1].float().contiguous(memory_format=self.features.layout) for feature in maps
            ]
            # In parts to limit memory, since each region may pass through a whole network.
            parts = [self(own, [part]) for part in boxes.split(REGIONS_AT_ONCE)]
            logits, offsets = (torch.cat(values) for values in zip(*parts))
            found.append(_candidates(self._scores(logits), offsets, boxes, size, limits))
        return limits.detections(found)

    def _scores(self, logits: Tensor) -> Tensor:
        """Convert logits to scores (R, C) in 0..1. A margin is not a probability, but the sigmoid preserves its order:
        0.5 is the decision boundary, and 0.02 the margin that training demands of negatives."""
        return logits.softmax(-1)[:, 1:] if self.classifier == "softmax" else (4 * logits).sigmoid()

    def _match(self, boxes: Tensor, target: Target) -> Match:
        match = match_two_thresholds(
            boxes,
            target.boxes,
            target.ignored,
            low=self.background_below,
            high=self.foreground_from,
            force_best=False,
        )
        objects = target.boxes[~target.ignored]
        if self.background_from == 0 or not len(objects):
            return match
        far = match_two_thresholds(boxes, objects, low=self.background_from, high=1.0, force_best=False).negative
        return Match(match.target_index, match.positive, match.ignored | far)

    def _class_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.classifier == "softmax":
            return F.cross_entropy(logits, label, reduction="sum")
        signs = 2.0 * F.one_hot(label, self.num_classes + 1)[:, 1:] - 1.0
        return F.relu(1 - signs * logits).sum()


def _candidates(
    scores: Tensor, offsets: Tensor, proposals: Tensor, size: tuple[int, int], limits: Postprocess
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes, scores and labels of one image that enter NMS, from scores (R, C), offsets (R, C, 4) and
    proposals (R, 4)."""
    rows, labels, best = limits.candidates(scores)
    boxes = clip(decode(offsets[rows, labels], proposals[rows], deviations=DEVIATIONS), size)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_SIDE).all(dim=1)
    return boxes[large], best[large], labels[large]
