"""The second stage: a class and a box for each region, whoever proposed it."""

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
BETA = 1 / 9  # of smooth L1, as torchvision trains it
REGIONS_AT_ONCE = 256
SMALLEST_SIDE = 1e-2
"""Pixels; a detection with a shorter side is dropped."""


class SampledRegions(NamedTuple):
    """The regions of one image that take part in the loss, those that show an object first.

    Args:
        boxes: (S, 4) xyxy pixels.
        truth_index: (S,) the ground truth each answers for; to be read only where `positive`.
        positive: (S,) bool.
    """

    boxes: Tensor
    target_index: Tensor
    positive: Tensor


class RegionStage(nn.Module):
    """Features of regions, layers on top, a class and four offsets for each class.

    Args:
        channels, strides: of the feature maps.
        num_classes: C, without background.
        features: `name` of the kind of region features (warp, spp, roi_pool, roi_align) and its options.
        trunk: `name` of the layers behind them (mlp, conv_fc, resnet_layer4, mean) and their options.
        classifier: softmax over the classes and background; or hinge, a linear support vector machine for each class
            against all others, as in R-CNN, but trained together with the features (Tang 2013), not after them.
        foreground_from: a region that overlaps a ground truth this much shows it.
        background_below: one that overlaps every ground truth less shows background; between them it does not count.
        background_from: one that overlaps every ground truth less than this does not count either, in images with
            objects (0.1 in Fast R-CNN, which so looks for hard background).
        samples: regions of an image that take part in the loss.
        positive_fraction: largest part of objects among them.
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
        """(R, C + 1) logits, column 0 background (for hinge (R, C) margins), and (R, C, 4) offsets.

        Args:
            maps: feature maps [(B, C_i, h_i, w_i)].
            regions: of each image (R_b, 4) xyxy pixels of the network's input.
        """
        vectors = self.trunk(self.features(maps, regions))
        offsets = self.box_predictor(vectors).unflatten(1, (self.num_classes, 4))
        return self.class_predictor(vectors).float(), offsets.float()

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> list[SampledRegions]:
        """The regions of each image that take part in the loss, out of its proposals and the target boxes."""
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
        """`class` and `box`, both divided by the regions that were sampled."""
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
        """Detections of each image after per-class suppression, in pixels of the network's input."""
        found = []
        for image, (boxes, size) in enumerate(zip(proposals, sizes)):
            # As pooling wants them; once.
            own = [
                feature[image : image + 1].float().contiguous(memory_format=self.features.layout) for feature in maps
            ]
            # Not all at once: each region's features may be a whole network's.
            parts = [self(own, [part]) for part in boxes.split(REGIONS_AT_ONCE)]
            logits, offsets = (torch.cat(values) for values in zip(*parts))
            found.append(_candidates(self._scores(logits), offsets, boxes, size, limits))
        return limits.detections(found)

    def _scores(self, logits: Tensor) -> Tensor:
        """(R, C) in 0..1. A margin is no probability; the sigmoid keeps its order, 0.5 is the border of the class, and
        0.02 the margin that training wants of all that is not of it."""
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
    """Boxes, scores and labels that may become detections of one image, from (R, C) scores, (R, C, 4) offsets and
    (R, 4) proposals."""
    rows, labels, best = limits.candidates(scores)
    boxes = clip(decode(offsets[rows, labels], proposals[rows], deviations=DEVIATIONS), size)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_SIDE).all(dim=1)
    return boxes[large], best[large], labels[large]
