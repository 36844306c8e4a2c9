"""SSD, the single-shot detector: a class and four offsets for every anchor of every feature map (Liu et al. 2016)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.coding import decode, encode
from detkit.boxes.convert import clip
from detkit.boxes.matching import match_bipartite, match_ssd
from detkit.boxes.sampling import hard_negatives
from detkit.errors import CheckpointError
from detkit.heads.base import DECODING, Head, Postprocess, check_count
from detkit.heads.parts.anchor_layouts import AnchorLayout, anchor_layouts
from detkit.heads.parts.losses import BoxLoss, box_loss, weigh_empty_images
from detkit.heads.parts.size_cache import PerSize
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Match, Target

MINIMUM_NEGATIVES = 8
MATCHERS = {"ssd": match_ssd, "bipartite": match_bipartite}


class SSDOutputs(NamedTuple):
    """Raw outputs of the SSD head; a tuple, so that device and precision wrappers can traverse it.

    Args:
        logits: (B, A, C + 1), column 0 is background.
        offsets: (B, A, 4), see detkit.boxes.coding.
        anchors: (A, 4) xyxy pixels of the network's input.
        sizes: (height, width) of each image, without padding.
    """

    logits: Tensor
    offsets: Tensor
    anchors: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("ssd")
class SSD(Head):
    """Class and box predictors, one 3x3 convolution each, on every feature map.

    Args:
        channels, strides: of the feature maps.
        num_classes: C, without background.
        anchors: `name` (default_boxes, per_pixel or pyramid) and options of an anchor layout.
        matching: ssd matches every ground-truth box to its best anchor, and every anchor to a box with sufficient IoU;
            bipartite first assigns boxes and anchors greedily one to one (Dive into Deep Learning, 14.4.3).
        iou_threshold: IoU with a ground-truth box from which an anchor is positive.
        negatives_per_positive: number of highest-loss negatives per positive that count; null for all.
        box_loss: l1, smooth_l1, giou, diou or ciou.
        box_weight: factor of the box loss.
        tower: number of convolutions with batch norm before the predictors of each level.
        tower_width: their channels.
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
        anchors: dict[str, Any] | None = None,
        matching: Literal["ssd", "bipartite"] = "ssd",
        iou_threshold: float = 0.5,
        negatives_per_positive: float | None = 3.0,
        box_loss: BoxLoss = "smooth_l1",
        box_weight: float = 1.0,
        tower: int = 0,
        tower_width: int = 128,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        max_detections: int = 200,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.layout: AnchorLayout = anchor_layouts.build(anchors or {"name": "default_boxes"}, "head.anchors")
        self.anchors = PerSize(self.layout)
        self.match = MATCHERS[matching]
        self.iou_threshold = iou_threshold
        self.negatives_per_positive = negatives_per_positive
        self.box_loss: BoxLoss = box_loss
        self.box_weight = box_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, max_detections=max_detections)
        counts = self.layout.per_location(len(channels))
        widths = [tower_width if tower else width for width in channels]
        self.class_towers = nn.ModuleList(_tower(width, tower_width, tower) for width in channels)
        self.box_towers = nn.ModuleList(_tower(width, tower_width, tower) for width in channels)
        self.class_predictors = nn.ModuleList(
            nn.Conv2d(width, count * (num_classes + 1), 3, padding=1) for width, count in zip(widths, counts)
        )
        self.box_predictors = nn.ModuleList(
            nn.Conv2d(width, count * 4, 3, padding=1) for width, count in zip(widths, counts)
        )
        for predictor in (*self.class_predictors, *self.box_predictors):
            nn.init.xavier_uniform_(predictor.weight)
            nn.init.zeros_(predictor.bias)

    def forward(self, features: list[Tensor], inputs: Inputs) -> SSDOutputs:
        """Compute logits and offsets of all anchors from feature maps [(B, C_i, h_i, w_i)]."""
        logits, offsets = [], []
        for level, feature in enumerate(features):
            logits.append(
                _per_anchor(self.class_predictors[level](self.class_towers[level](feature)), self.num_classes + 1)
            )
            offsets.append(_per_anchor(self.box_predictors[level](self.box_towers[level](feature)), 4))
        map_sizes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        anchors = self.anchors(features[0].device, map_sizes, inputs.size, self.strides)
        # Half precision is not accurate enough for softmax, exponentials and sums over thousands of anchors.
        return SSDOutputs(torch.cat(logits, 1).float(), torch.cat(offsets, 1).float(), anchors, inputs.sizes)

    def loss(self, outputs: SSDOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `class` (cross-entropy) and `box`, each summed and divided by the number of positives in the batch.

        Negatives of images without objects are weighted by detkit.heads.parts.losses.weigh_empty_images; torchvision
        uses no such negatives.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        anchors = outputs.anchors
        matches = [self._match(anchors, target) for target in targets]
        positive = torch.stack([match.positive for match in matches])
        ignored = torch.stack([match.ignored for match in matches])
        classes = torch.zeros_like(positive, dtype=torch.int64)
        boxes_loss = outputs.offsets.sum() * 0.0
        for row, (match, target) in enumerate(zip(matches, targets)):
            ground_truth = match.target_index[match.positive]
            classes[row, match.positive] = target.labels[ground_truth] + 1
            matched = anchors[match.positive]
            true_offsets = encode(target.boxes[ground_truth], matched)
            boxes_loss = boxes_loss + box_loss(
                outputs.offsets[row, match.positive], matched, true_offsets, self.box_loss
            )
        cross_entropy = F.cross_entropy(outputs.logits.flatten(0, 1), classes.flatten(), reduction="none")
        cross_entropy = cross_entropy.view_as(classes)
        negative = self._negatives(cross_entropy.detach(), positive, ignored)
        cross_entropy = weigh_empty_images(cross_entropy, positive, negative)
        normaliser = positive.sum().clamp(min=1)
        return {
            "class": cross_entropy[positive | negative].sum() / normaliser,
            "box": self.box_weight * boxes_loss / normaliser,
        }

    def _match(self, anchors: Tensor, target: Target) -> Match:
        return self.match(anchors, target.boxes, target.ignored, threshold=self.iou_threshold)

    def _negatives(self, losses: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
        """Select the background anchors (B, A) bool whose loss counts."""
        if self.negatives_per_positive is None:
            return ~(positive | ignored)
        # Images without objects have no positives; their hardest anchors still count as background.
        return hard_negatives(losses, positive, ignored, self.negatives_per_positive, minimum=MINIMUM_NEGATIVES)

    @torch.no_grad()
    def decode(self, outputs: SSDOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input."""
        options = options or self.postprocess
        return options.detections(
            [
                _candidates(logits, offsets, outputs.anchors, size, options)
                for logits, offsets, size in zip(outputs.logits, outputs.offsets, outputs.sizes)
            ]
        )


def _candidates(
    logits: Tensor, offsets: Tensor, anchors: Tensor, size: tuple[int, int], options: Postprocess
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes, scores and labels of one image that enter NMS."""
    # The softmax over one class and background is an upper bound of the softmax over all classes.
    kept = options.above_threshold(logits[:, 1:].amax(1) - logits[:, 0])
    rows, labels, scores = options.candidates(logits[kept].softmax(-1)[:, 1:])
    rows = kept[rows]
    return clip(decode(offsets[rows], anchors[rows]), size), scores, labels


def _tower(channels: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def _per_anchor(prediction: Tensor, values: int) -> Tensor:
    """Reshape (B, anchors * values, h, w) to (B, h * w * anchors, values)."""
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values)


def from_torchvision(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Convert the head weights of torchvision's `ssd300_vgg16` to detkit's names; also return the number of classes.

    Torchvision's predictors have the same layout: anchor by anchor, background first.

    Raises:
        CheckpointError: a tensor is unknown or missing.
    """
    renamed: dict[str, Tensor] = {}
    kinds = {"classification_head": "class_predictors", "regression_head": "box_predictors"}
    for name, tensor in state.items():
        if not name.startswith("head."):
            continue
        found = re.fullmatch(r"head\.(classification_head|regression_head)\.module_list\.(\d+\.(?:weight|bias))", name)
        if found is None:
            raise CheckpointError(f"'{name}' is not a tensor of torchvision's ssd300_vgg16.")
        renamed[f"{kinds[found[1]]}.{found[2]}"] = tensor
    try:
        anchors = len(renamed["box_predictors.0.bias"]) // 4
        return renamed, len(renamed["class_predictors.0.bias"]) // anchors - 1
    except KeyError as error:
        raise CheckpointError(f"The state dict is not torchvision's ssd300_vgg16: it lacks {error}.") from None
