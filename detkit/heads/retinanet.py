"""RetinaNet: a class and a box for every anchor of a feature pyramid, trained with the focal loss.

Lin, Goyal, Girshick, He and Dollár, "Focal Loss for Dense Object Detection", 2017.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detkit.boxes.coding import decode, encode
from detkit.boxes.convert import clip
from detkit.boxes.matching import match_two_thresholds
from detkit.errors import ConfigError, check_range
from detkit.heads.base import DECODING, Head, Postprocess, check_count
from detkit.heads.parts.anchor_layouts import AnchorLayout, anchor_layouts
from detkit.heads.parts.losses import BoxLoss, box_loss, sigmoid_focal_loss, weigh_background
from detkit.heads.parts.size_cache import PerSize
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target

DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
BETA = 1 / 9  # of smooth L1, as in the region-proposal network
PARTS = 16  # number of parts of a level's scores, over which maxima are computed first
NORM_WIDTH = 8  # channels per group of the group norm: 32 groups for 256 channels


class RetinaNetOutputs(NamedTuple):
    """Raw outputs of RetinaNet.

    Args:
        logits: (B, A, C), one binary classifier per class; there is no background class.
        offsets: (B, A, 4), see detkit.boxes.coding, with deviations 1.
        anchors: (A, 4) xyxy pixels of the network's input.
        level_counts: number of anchors of each level; their sum is A.
        sizes: (height, width) of each image, without padding.
    """

    logits: Tensor
    offsets: Tensor
    anchors: Tensor
    level_counts: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


@heads.register("retinanet")
class RetinaNet(Head):
    """Two convolutional towers, one for classes and one for boxes, shared by all levels.

    The paper's neck is `{name: fpn, extra_levels: 2}` on C3 to C5. As in torchvision, anchors that cross the image
    border take part in training, and the best anchor of each ground-truth box is positive whatever its IoU.

    Args:
        channels, strides: of the feature maps, which must have the same channels.
        num_classes: C, without background.
        anchors: `name` and options of an anchor layout; default the paper's nine anchors, with sides of 4, 5.04 and
            6.35 strides and ratios 1:2, 1:1 and 2:1.
        depth: number of 3x3 convolutions in each tower.
        norm: whether each of them is followed by group norm with groups of 8 channels.
        prior: initial score of every anchor and class, low so that the many background anchors do not dominate the
            first steps.
        alpha: weight of positives in the focal loss; negatives are weighted by 1 - alpha.
        gamma: focusing parameter of the focal loss; see detkit.heads.parts.losses.sigmoid_focal_loss.
        foreground_from: IoU with a ground-truth box from which an anchor is positive.
        background_below: IoU below which an anchor is negative; anchors between the two are ignored.
        box_loss: l1, smooth_l1, giou, diou or ciou.
        box_weight: factor of the box loss.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.
        candidates: number of anchor-class pairs per level and image that enter NMS.
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
        depth: int = 4,
        norm: bool = False,
        prior: float = 0.01,
        alpha: float = 0.25,
        gamma: float = 2.0,
        foreground_from: float = 0.5,
        background_below: float = 0.4,
        box_loss: BoxLoss = "smooth_l1",
        box_weight: float = 1.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        candidates: int = 1000,
        max_detections: int = 300,
    ) -> None:
        super().__init__()
        check_range("head", 0, depth=depth, gamma=gamma, box_weight=box_weight)
        check_range("head", 0, 1, alpha=alpha, foreground_from=foreground_from, background_below=background_below)
        check_range("head", 1e-6, 0.5, prior=prior)
        if background_below > foreground_from:
            raise ConfigError(
                f"'head.background_below' must not be above 'head.foreground_from', but they are {background_below} "
                f"and {foreground_from}."
            )
        width = _common_width(channels, norm)
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.layout: AnchorLayout = anchor_layouts.build(anchors or _default_anchors(strides), "head.anchors")
        self.anchors = PerSize(self.layout)
        counts = self.layout.per_location(len(strides))
        if len(set(counts)) != 1:
            raise ConfigError(
                f"'head.anchors' must give the same number of anchors per location on each level, but gives {counts}."
            )
        self.foreground_from, self.background_below = foreground_from, background_below
        self.alpha, self.gamma = alpha, gamma
        self.box_loss: BoxLoss = box_loss
        self.box_weight = box_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, candidates, max_detections)
        self.class_tower, self.box_tower = _tower(width, depth, norm), _tower(width, depth, norm)
        self.class_predictor = nn.Conv2d(width, counts[0] * num_classes, 3, padding=1)
        self.box_predictor = nn.Conv2d(width, counts[0] * 4, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.class_predictor.bias, math.log(prior / (1 - prior)))  # type: ignore[arg-type]

    def forward(self, features: list[Tensor], inputs: Inputs) -> RetinaNetOutputs:
        """Compute logits and offsets of all anchors from feature maps [(B, width, h_i, w_i)]."""
        logits = [
            _per_anchor(self.class_predictor(self.class_tower(feature)), self.num_classes) for feature in features
        ]
        offsets = [_per_anchor(self.box_predictor(self.box_tower(feature)), 4) for feature in features]
        map_sizes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        anchors = self.anchors(features[0].device, map_sizes, inputs.size, self.strides)
        level_counts = tuple(level.shape[1] for level in logits)
        return RetinaNetOutputs(
            torch.cat(logits, 1).float(), torch.cat(offsets, 1).float(), anchors, level_counts, inputs.sizes
        )

    def loss(self, outputs: RetinaNetOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `class` (focal) and `box`, each summed and divided by the number of positives in the batch.

        Images without objects are weighted by detkit.heads.parts.losses.weigh_background.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        anchors = outputs.anchors
        true_classes = torch.zeros_like(outputs.logits, dtype=torch.bool)
        is_positive, is_negative = (true_classes.new_zeros(true_classes.shape[:2]) for _ in range(2))
        boxes_loss = outputs.offsets.sum() * 0.0
        for image, target in enumerate(targets):
            match = match_two_thresholds(
                anchors, target.boxes, target.ignored, low=self.background_below, high=self.foreground_from
            )
            is_positive[image], is_negative[image] = match.positive, match.negative
            positive = match.positive.nonzero().flatten()
            ground_truth = match.target_index[positive]
            true_classes[image, positive, target.labels[ground_truth]] = True
            matched = anchors[positive]
            true_offsets = encode(target.boxes[ground_truth], matched, deviations=DEVIATIONS)
            boxes_loss = boxes_loss + box_loss(
                outputs.offsets[image, positive], matched, true_offsets, self.box_loss, DEVIATIONS, BETA
            )
        focal = sigmoid_focal_loss(outputs.logits, true_classes, self.alpha, self.gamma).sum(-1)
        focal = weigh_background(focal, is_positive, is_negative)
        normaliser = is_positive.sum().clamp(min=1)
        return {
            "class": torch.where(is_positive | is_negative, focal, 0.0).sum() / normaliser,
            "box": self.box_weight * boxes_loss / normaliser,
        }

    @torch.no_grad()
    def decode(self, outputs: RetinaNetOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input."""
        options = options or self.postprocess
        return options.detections(
            [
                self._candidates(logits, offsets, outputs, size, options)
                for logits, offsets, size in zip(outputs.logits, outputs.offsets, outputs.sizes)
            ]
        )

    def _candidates(
        self, logits: Tensor, offsets: Tensor, outputs: RetinaNetOutputs, size: tuple[int, int], options: Postprocess
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and labels of one image that enter NMS."""
        chosen, chosen_scores, start = [], [], 0
        for level in logits.split(outputs.level_counts):
            pairs = level.flatten()
            above = _above(pairs, options.least_logit)
            pair_scores = pairs[above].sigmoid()
            if len(above) > options.max_candidates:  # the limit applies to all classes of a level together
                pair_scores, best = pair_scores.topk(options.max_candidates)
                above = above[best]
            candidates, _, pair_scores = options.candidates(pair_scores[:, None])
            chosen.append(above[candidates] + start)
            chosen_scores.append(pair_scores)
            start += level.numel()
        pairs, best = torch.cat(chosen), torch.cat(chosen_scores)
        rows, labels = pairs // self.num_classes, pairs % self.num_classes
        boxes = clip(decode(offsets[rows], outputs.anchors[rows], deviations=DEVIATIONS), size)
        return boxes, best, labels


def _common_width(channels: Sequence[int], norm: bool) -> int:
    """Return the number of channels, which must be the same for all maps."""
    if len(set(channels)) != 1:
        raise ConfigError(
            f"RetinaNet shares its convolutions between levels, so all maps must have the same number of channels, but "
            f"they have {list(channels)}. Add a neck ({{name: fpn}}), or use a single backbone level."
        )
    if norm and channels[0] % NORM_WIDTH:
        raise ConfigError(
            f"'head.norm' uses groups of {NORM_WIDTH} channels, but the maps have {channels[0]} channels. Set the "
            f"'width' of the neck to a multiple of {NORM_WIDTH}."
        )
    return channels[0]


def _above(values: Tensor, bound: float) -> Tensor:
    """Return the indices (K,), ascending, of values (N,) above the bound or NaN; fast when few of millions are."""
    length = len(values) // PARTS
    peaks = values[: PARTS * length].view(PARTS, length).amax(0)  # strided, since high scores cluster
    peaks = (~(peaks <= bound)).nonzero().flatten()
    if PARTS * len(peaks) > length:
        return (~(values <= bound)).nonzero().flatten()
    parts = torch.arange(PARTS, device=values.device)[:, None] * length
    places = torch.cat(((parts + peaks).flatten(), torch.arange(PARTS * length, len(values), device=values.device)))
    return places[~(values[places] <= bound)]


def _tower(width: int, depth: int, norm: bool) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        norms = [nn.GroupNorm(width // NORM_WIDTH, width)] if norm else []
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        layers.append(nn.Sequential(convolution, *norms, nn.ReLU(inplace=True)))
    return nn.Sequential(*layers)


def _per_anchor(prediction: Tensor, values: int) -> Tensor:
    """Reshape (B, anchors * values, h, w) to (B, h * w * anchors, values)."""
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values)


def _default_anchors(strides: Sequence[int]) -> dict[str, Any]:
    """Return the paper's nine anchors (section 4): three sizes per octave, starting at 32 pixels for stride 8."""
    if min(strides) < 1:
        raise ConfigError(
            f"RetinaNet has no default anchors for a map pooled from the whole image (strides {list(strides)}). "
            f"Set 'head.anchors', or remove that map."
        )
    sizes = [[4 * stride * 2 ** (third / 3) for third in range(3)] for stride in strides]
    return {"name": "pyramid", "sizes": sizes}
