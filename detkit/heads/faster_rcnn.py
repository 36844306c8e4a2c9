"""Faster R-CNN: a region-proposal network, then a class and a box for each proposal (Ren et al. 2015)."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from detkit.heads.base import ALL, DECODING, Head, Postprocess, check_count
from detkit.heads.parts.regions import RegionStage, SampledRegions
from detkit.heads.parts.rpn import ProposalOutputs, RegionProposalNetwork
from detkit.registry import build_part, heads
from detkit.structures import Detections, Inputs, Target


class FasterRCNNOutputs(NamedTuple):
    """Raw outputs of the first stage and inputs of the second.

    Args:
        features: maps [(B, C_i, h_i, w_i)].
        proposals: objectness and offsets of every anchor.
    """

    features: tuple[Tensor, ...]
    proposals: ProposalOutputs


@heads.register("faster_rcnn")
class FasterRCNN(Head):
    """Faster R-CNN with both stages trained jointly; no gradient flows through proposal coordinates (approximate joint
    training, section 3.2 of the paper).

    On one feature map of stride 16 it is the original detector (with `resnet_layer4` as region trunk, the "C4"
    variant); on a feature pyramid it is the detector of Lin et al. 2017.

    Args:
        channels, strides: of the feature maps, which must have the same channels.
        num_classes: C, without background.
        rpn: options of the first stage; see detkit.heads.parts.rpn.RegionProposalNetwork.
        regions: options of the second stage; see detkit.heads.parts.regions.RegionStage.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels"})
    decode_options: ClassVar[frozenset[str]] = DECODING

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        rpn: dict[str, Any] | None = None,
        regions: dict[str, Any] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.postprocess = Postprocess(score_threshold, nms_threshold, ALL, max_detections)
        self.rpn: RegionProposalNetwork = build_part(
            RegionProposalNetwork, rpn or {}, "head.rpn", "region-proposal network", channels=channels, strides=strides
        )
        self.regions: RegionStage = build_part(
            RegionStage,
            regions or {},
            "head.regions",
            "second stage",
            channels=channels,
            strides=strides,
            num_classes=num_classes,
        )

    def forward(self, features: list[Tensor], inputs: Inputs) -> FasterRCNNOutputs:
        """Compute objectness and offsets of all anchors from feature maps [(B, C, h_i, w_i)]."""
        return FasterRCNNOutputs(tuple(features), self.rpn(features, inputs))

    def loss(self, outputs: FasterRCNNOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `objectness` and `proposal_box` of the first stage, and `class` and `box` of the second."""
        check_count(targets, outputs.proposals.sizes)
        losses = self.rpn.loss(outputs.proposals, targets)
        if not torch.stack(list(losses.values())).isfinite().all():
            return losses  # no proposals can be made; the trainer stops and names the images
        proposals = self.rpn.propose(outputs.proposals, self.rpn.train_amounts)
        sampled = self.regions.sample(proposals, targets)
        return losses | self._region_losses(outputs.features, sampled, targets)

    @torch.no_grad()
    def decode(self, outputs: FasterRCNNOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input."""
        proposals = self.rpn.propose(outputs.proposals, self.rpn.amounts)
        return self.regions.decode(outputs.features, proposals, outputs.proposals.sizes, options or self.postprocess)

    def _region_losses(
        self, features: Sequence[Tensor], sampled: Sequence[SampledRegions], targets: tuple[Target, ...]
    ) -> dict[str, Tensor]:
        return self.regions.loss(features, sampled, targets)
