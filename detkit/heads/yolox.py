"""The YOLOX head: anchor-free and decoupled (separate class and box branches), with SimOTA label assignment.

Ge, Liu, Wang, Li and Sun, "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.backbones.csp_darknet import Convolution, convolution
from detkit.boxes.convert import clip, cxcywh_to_xyxy, xyxy_to_cxcywh
from detkit.boxes.iou import elementwise_iou
from detkit.boxes.sim_ota import match_sim_ota
from detkit.errors import ConfigError, check_range
from detkit.heads.base import ALL, DECODING, Head, Postprocess, check_count
from detkit.heads.parts.losses import weigh_background
from detkit.heads.parts.size_cache import PerSize
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Match, Target

PRIOR = 0.01
"""Initial probability of each class and of an object, as in RetinaNet."""
LARGEST_LOG_SIDE = 10.0
"""Upper bound of the logarithm of predicted sides in cells, against overflow; no box is larger than 20,000 cells."""
SMALLEST_SIDE = 1e-8


class YOLOXOutputs(NamedTuple):
    """Raw outputs of the YOLOX head.

    Args:
        class_logits: (B, A, C).
        objectness: (B, A) logits.
        offsets: (B, A, 4), the centre relative to the cell's corner and the logarithms of width and height, in cells.
        corners: (A, 2), left and top of the cells in pixels of the network's input.
        strides: (A,), sides of the cells in pixels.
        sizes: (height, width) of each image, without padding.
    """

    class_logits: Tensor
    objectness: Tensor
    offsets: Tensor
    corners: Tensor
    strides: Tensor
    sizes: tuple[tuple[int, int], ...]

    def boxes(self) -> Tensor:
        """Decode the boxes, (B, A, 4) xyxy pixels."""
        return _decode(self.offsets, self.corners, self.strides)


@heads.register("yolox")
class YOLOX(Head):
    """On each level a 1x1 convolution, then two 3x3 convolutions for classes and two for box and objectness.

    Layers are named as in the published weights.

    Args:
        channels, strides: of the feature maps.
        num_classes: C.
        width: channels of the convolutions; null for those of the finest map, as published.
        depthwise: whether to replace 3x3 convolutions by depthwise and pointwise ones.
        centre_radius: half the side, in cells, of the square around the centre of a ground-truth box in which cells may
            be positive.
        candidates: number of predictions whose summed IoUs determine how many cells are assigned to a ground-truth box
            (see detkit.boxes.sim_ota).
        box_weight: factor of the box loss, 1 - IoU².
        l1_weight: factor of the L1 loss of the offsets, which counts only in epochs without mosaic and mixup
            (train.unmixed_epochs); 1 in the paper, for the last 15 of 300 epochs.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.

    Raises:
        ConfigError: an option is out of range, or a map has no stride.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels"})
    decode_options: ClassVar[frozenset[str]] = DECODING
    trims_padding: ClassVar[bool] = True
    unmixed_losses: ClassVar[frozenset[str]] = frozenset({"l1"})

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int | None = None,
        depthwise: bool = False,
        centre_radius: float = 2.5,
        candidates: int = 10,
        box_weight: float = 5.0,
        l1_weight: float = 0.0,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.65,
        max_detections: int = 300,
    ) -> None:
        super().__init__()
        check_range("head", 1, width=1 if width is None else width, candidates=candidates)
        check_range("head", 0, centre_radius=centre_radius, box_weight=box_weight, l1_weight=l1_weight)
        if min(strides) < 1:
            raise ConfigError(
                f"The head 'yolox' has no cells on a map pooled from the whole image (strides {list(strides)}). "
                f"Select other maps with the backbone's 'levels'."
            )
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.cells = PerSize(_cells)
        self.centre_radius, self.candidates = centre_radius, candidates
        self.box_weight, self.l1_weight = box_weight, l1_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, ALL, max_detections)
        width = channels[0] if width is None else width
        self.stems = nn.ModuleList(Convolution(count, width, 1) for count in channels)
        self.cls_convs = nn.ModuleList(_tower(width, depthwise) for _ in channels)
        self.reg_convs = nn.ModuleList(_tower(width, depthwise) for _ in channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for _ in channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in channels)
        self.obj_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        for predictor in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(predictor.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features: list[Tensor], inputs: Inputs) -> YOLOXOutputs:
        """Compute logits and offsets of all cells from feature maps [(B, C_i, h_i, w_i)]."""
        classes, objects, offsets = [], [], []
        for level, feature in enumerate(features):
            stem = self.stems[level](feature)
            box_features = self.reg_convs[level](stem)
            classes.append(_per_cell(self.cls_preds[level](self.cls_convs[level](stem))))
            objects.append(_per_cell(self.obj_preds[level](box_features)))
            offsets.append(_per_cell(self.reg_preds[level](box_features)))
        map_sizes = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        corners, strides = self.cells(features[0].device, map_sizes, self.strides)
        # Half precision is not accurate enough for sigmoids and exponentials.
        return YOLOXOutputs(
            torch.cat(classes, 1).float(),
            torch.cat(objects, 1).squeeze(-1).float(),
            torch.cat(offsets, 1).float(),
            corners,
            strides,
            inputs.sizes,
        )

    def loss(self, outputs: YOLOXOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `box`, `objectness`, `class` and, with an `l1_weight`, `l1`, each divided by the number of positives
        in the batch.

        The class target of a positive is its IoU with the ground-truth box. Images without objects are weighted by
        detkit.heads.parts.losses.weigh_background.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        boxes = outputs.boxes()
        matches = [self._match(outputs, boxes, image, target) for image, target in enumerate(targets)]
        positive = torch.stack([match.positive for match in matches])
        negative = torch.stack([match.negative for match in matches])
        owners = [match.target_index[match.positive] for match in matches]
        ground_truths = torch.cat([target.boxes[owner] for target, owner in zip(targets, owners)])
        labels = torch.cat([target.labels[owner] for target, owner in zip(targets, owners)])
        normaliser = positive.sum().clamp(min=1)
        iou = elementwise_iou(boxes[positive], ground_truths)
        class_targets = F.one_hot(labels, self.num_classes) * iou.detach()[:, None]
        objectness = _cross_entropy(outputs.objectness, positive.float(), reduction="none")
        objectness = weigh_background(objectness, positive, negative)
        losses = {
            "box": self.box_weight * (1 - iou.square()).sum(),
            "objectness": objectness[positive | negative].sum(),
            "class": _cross_entropy(outputs.class_logits[positive], class_targets),
        }
        if self.l1_weight:
            distance = F.l1_loss(outputs.offsets[positive], _encode(ground_truths, outputs, positive), reduction="sum")
            losses["l1"] = self.l1_weight * distance
        return {name: value / normaliser for name, value in losses.items()}

    def _match(self, outputs: YOLOXOutputs, boxes: Tensor, image: int, target: Target) -> Match:
        return match_sim_ota(
            outputs.corners + outputs.strides[:, None] / 2,
            outputs.strides,
            boxes[image].detach(),
            outputs.class_logits[image].detach(),
            outputs.objectness[image].detach(),
            target.boxes,
            target.labels,
            target.ignored,
            self.centre_radius,
            self.candidates,
        )

    @torch.no_grad()
    def decode(self, outputs: YOLOXOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input; each cell has its best class."""
        options = options or self.postprocess
        return options.detections([_candidates(outputs, image, options) for image in range(len(outputs.sizes))])


def _candidates(outputs: YOLOXOutputs, image: int, options: Postprocess) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes, scores and labels of one image that enter NMS."""
    classes, objectness = outputs.class_logits[image], outputs.objectness[image]
    # The added term is NaN if any class logit is not finite, so that `candidates` reports it.
    cells = options.above_threshold(objectness + 0 * classes.sum())
    scores, labels = (classes[cells].sigmoid() * objectness[cells, None].sigmoid()).max(1)
    chosen, _, scores = options.candidates(scores[:, None])
    cells, labels = cells[chosen], labels[chosen]
    boxes = _decode(outputs.offsets[image, cells], outputs.corners[cells], outputs.strides[cells])
    return clip(boxes, outputs.sizes[image]), scores, labels


def _tower(width: int, depthwise: bool) -> nn.Sequential:
    return nn.Sequential(*(convolution(width, width, depthwise=depthwise) for _ in range(2)))


def _per_cell(prediction: Tensor) -> Tensor:
    """Reshape (B, values, h, w) to (B, h * w, values)."""
    return prediction.permute(0, 2, 3, 1).flatten(1, 2)


def _cells(map_sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the top left corners (A, 2) of the cells of all levels in pixels, row by row, and their sides (A,)."""
    corners, sides = [], []
    for (height, width), stride in zip(map_sizes, strides):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        corners.append(torch.stack((columns, rows), -1).flatten(0, 1).float() * stride)
        sides.append(torch.full((height * width,), float(stride)))
    return torch.cat(corners), torch.cat(sides)


def _decode(offsets: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
    """Decode offsets (..., A, 4) of cells to boxes (..., A, 4) xyxy pixels; see YOLOXOutputs."""
    centres = corners + offsets[..., :2] * strides[:, None]
    sides = offsets[..., 2:].clamp(max=LARGEST_LOG_SIDE).exp() * strides[:, None]
    return cxcywh_to_xyxy(torch.cat((centres, sides), dim=-1))


def _encode(targets: Tensor, outputs: YOLOXOutputs, positive: Tensor) -> Tensor:
    """Encode the targets (P, 4) xyxy of the P positive cells of (B, A) as offsets (P, 4)."""
    cells = positive.nonzero()[:, 1]
    strides = outputs.strides[cells, None]
    boxes = xyxy_to_cxcywh(targets)
    centres = (boxes[:, :2] - outputs.corners[cells]) / strides
    return torch.cat((centres, (boxes[:, 2:] / strides + SMALLEST_SIDE).log()), dim=1)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
