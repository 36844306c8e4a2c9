"""Detectors on external proposals: R-CNN, SPPNet and Fast R-CNN, one head with different region features."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from detkit.errors import ConfigError
from detkit.heads.base import ALL, DECODING, Head, Postprocess, check_count
from detkit.heads.parts.region_features import COARSEST_STRIDE
from detkit.heads.parts.regions import RegionStage
from detkit.registry import build_part, heads
from detkit.structures import Detections, Inputs, Target


class FastRCNNOutputs(NamedTuple):
    """Inputs of the second stage.

    Args:
        features: maps [(B, C_i, h_i, w_i)].
        proposals: of each image (P, 4) xyxy pixels of the network's input.
        sizes: (height, width) of each image, without padding.
    """

    features: tuple[Tensor, ...]
    proposals: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]


@heads.register("fast_rcnn")
class FastRCNN(Head):
    """A class and a box for each proposal (Girshick, "Fast R-CNN", 2015).

    With `regions: {features: {name: spp}}` it is SPPNet (He et al. 2014); with `warp` and `classifier: hinge` it is
    R-CNN (Girshick et al. 2014), trained in one stage instead of three.

    Args:
        channels, strides: of the feature maps.
        num_classes: C, without background.
        regions: options of the second stage; see detkit.heads.parts.regions.RegionStage.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels", "proposals"})
    decode_options: ClassVar[frozenset[str]] = DECODING

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        regions: dict[str, Any] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if not 0 < min(strides) <= max(strides) <= COARSEST_STRIDE:
            raise ConfigError(
                f"'fast_rcnn' reads feature maps of strides up to {COARSEST_STRIDE} only, so other maps would be "
                f"unused: the strides are {list(strides)}. Set neck.extra_levels to 0, or choose other 'levels'."
            )
        self.postprocess = Postprocess(score_threshold, nms_threshold, ALL, max_detections)
        self.regions: RegionStage = build_part(
            RegionStage,
            {"features": {"name": "roi_pool"}, **(regions or {})},
            "head.regions",
            "second stage of 'fast_rcnn'",
            channels=channels,
            strides=strides,
            num_classes=num_classes,
        )

    def forward(self, features: list[Tensor], inputs: Inputs) -> FastRCNNOutputs:
        """Return the feature maps with the proposals.

        Raises:
            ValueError: the inputs have no proposals.
        """
        if inputs.proposals is None:
            raise ValueError("fast_rcnn needs proposals for each image, but the inputs have none")
        return FastRCNNOutputs(tuple(features), tuple(inputs.proposals), inputs.sizes)

    def loss(self, outputs: FastRCNNOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `class` and `box` on a random sample of the proposals."""
        check_count(targets, outputs.sizes)
        return self.regions.loss(outputs.features, self.regions.sample(outputs.proposals, targets), targets)

    @torch.no_grad()
    def decode(self, outputs: FastRCNNOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input."""
        return self.regions.decode(outputs.features, outputs.proposals, outputs.sizes, options or self.postprocess)
