"""Mask R-CNN: Faster R-CNN with a third branch that predicts a mask for each box (He et al. 2017)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import ConfigError, check_range
from detkit.heads.base import DECODING, Postprocess
from detkit.heads.faster_rcnn import FasterRCNN, FasterRCNNOutputs
from detkit.heads.parts.region_features import RegionFeatures, region_features
from detkit.heads.parts.region_trunks import convolutions
from detkit.heads.parts.regions import SampledRegions
from detkit.registry import build_part, heads
from detkit.structures import Detections, Target


class MaskBranch(nn.Module):
    """Convolutions on region features, then a mask of twice their size for each class.

    Args:
        channels, strides: of the feature maps.
        num_classes: C.
        features: `name` and options of the region features; default 14 x 14 roi_align.
        depth: number of 3x3 convolutions.
        width: channels of the convolutions.
        norm: whether each convolution is followed by batch norm.
        weight: factor of the loss.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        features: dict[str, Any] | None = None,
        depth: int = 4,
        width: int = 256,
        norm: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_range("head.mask", 0, depth=depth, weight=weight)
        check_range("head.mask", 1, width=width)
        self.weight = weight
        self.features: RegionFeatures = region_features.build(
            features or {"name": "roi_align", "size": 14}, "head.mask.features", channels=channels, strides=strides
        )
        if len(self.features.shape) != 3:
            raise ConfigError(
                "The mask branch needs region features with spatial dimensions. Use head.mask.features: "
                "{name: roi_align}."
            )
        incoming, rows, columns = self.features.shape
        self.size = (2 * rows, 2 * columns)
        self.convolutions = convolutions(incoming, width, depth, norm)
        self.upsample = nn.ConvTranspose2d(width if depth else incoming, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, num_classes, 1)
        for layer in (self.upsample, self.predictor):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Compute mask logits (R, m, m) for the classes `labels` (R,), with `regions` as in RegionFeatures."""
        features = self.convolutions(self.features(maps, regions))
        logits = self.predictor(F.relu(self.upsample(features)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def loss(self, maps: Sequence[Tensor], sampled: Sequence[SampledRegions], targets: Sequence[Target]) -> Tensor:
        """Compute the mean binary cross-entropy over all mask pixels of the positive regions."""
        positives = [regions.boxes[regions.positive] for regions in sampled]
        ground_truths = [regions.target_index[regions.positive] for regions in sampled]
        labels = torch.cat([target.labels[ground_truth] for target, ground_truth in zip(targets, ground_truths)])
        logits = self(maps, positives, labels)
        wanted = [
            self._crop(target, boxes, ground_truth)
            for target, boxes, ground_truth in zip(targets, positives, ground_truths)
        ]
        total = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
        return self.weight * total / max(logits.numel(), 1)

    def _crop(self, target: Target, boxes: Tensor, ground_truth: Tensor) -> Tensor:
        """Crop the ground-truth masks to the boxes: (S, m, m) in 0..1."""
        if target.masks is None:
            raise ValueError("mask_rcnn needs targets with masks")
        from torchvision.ops import roi_align

        # Cast each object to float only once, even if several regions match it.
        used, position = ground_truth.unique(return_inverse=True)
        rows = torch.cat((position[:, None].to(boxes.dtype), boxes), dim=1)
        return roi_align(target.masks[used][:, None].to(boxes.dtype), rows, self.size, 1.0)[:, 0]


@heads.register("mask_rcnn")
class MaskRCNN(FasterRCNN):
    """Mask R-CNN: Faster R-CNN with a mask branch.

    Args:
        channels, strides: of the feature maps, which must have the same channels.
        num_classes: C, without background.
        rpn: options of the first stage; see detkit.heads.parts.rpn.RegionProposalNetwork.
        regions: options of the second stage; see detkit.heads.parts.regions.RegionStage.
        mask: options of the mask branch; see MaskBranch.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels", "masks"})
    decode_options: ClassVar[frozenset[str]] = DECODING

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        rpn: dict[str, Any] | None = None,
        regions: dict[str, Any] | None = None,
        mask: dict[str, Any] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__(channels, strides, num_classes, rpn, regions, score_threshold, nms_threshold, max_detections)
        self.mask: MaskBranch = build_part(
            MaskBranch,
            mask or {},
            "head.mask",
            "mask branch",
            channels=channels,
            strides=strides,
            num_classes=num_classes,
        )

    @torch.no_grad()
    def decode(self, outputs: FasterRCNNOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections with `mask_patches`, the mask probabilities inside their boxes."""
        found = super().decode(outputs, options)
        labels = torch.cat([detections.labels for detections in found])
        patches = self.mask(outputs.features, [detections.boxes for detections in found], labels).sigmoid()
        return [
            replace(detections, mask_patches=part)
            for detections, part in zip(found, patches.split([len(detections) for detections in found]))
        ]

    def _region_losses(
        self, features: Sequence[Tensor], sampled: Sequence[SampledRegions], targets: tuple[Target, ...]
    ) -> dict[str, Tensor]:
        """Compute the losses of Faster R-CNN, and `mask`."""
        losses = super()._region_losses(features, sampled, targets)
        return losses | {"mask": self.mask.loss(features, sampled, targets)}
