"""YOLOv2: five anchors in every cell of one grid (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2016)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.iou import elementwise_iou
from detkit.errors import ConfigError, check_range
from detkit.heads.base import DECODING, Head, Postprocess, check_count
from detkit.heads.parts.size_cache import PerSize
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target
from detkit.zoo.darknet.weight_file import DarknetConvolution
from detkit.zoo.darknet.yolo_grid import (
    Anchors,
    GridOutputs,
    anchors_by_level,
    assign,
    decode_places,
    flatten_places,
    lay_grid,
    predicted_boxes,
    size_weights,
    true_coordinates,
)

COCO_ANCHORS: Anchors = (
    (18.32736, 21.67632), (59.98272, 66.00096), (106.82976, 175.17888), (252.25024, 112.88896), (312.65664, 293.38496),
)  # fmt: skip
"""The anchors of yolov2.cfg, which gives them in cells of 32 pixels."""
OBJECT_PRIOR = 0.01
"""Initial objectness."""


@heads.register("yolov2")
class YOLOv2(Head):
    """3x3 convolutions, then A * (5 + C) values for every cell of the coarsest map.

    It reads one map, or two whose strides differ by a factor of 2: the finer one then passes through a 1x1 convolution
    and a space-to-depth rearrangement of 2x2 neighbours (the paper's passthrough layer), and the last convolution reads
    both.

    The loss has the gradients of Darknet's region layer: half the squared errors of the centres (after the sigmoid),
    of the logarithms of the sides and of the objectness (after the sigmoid), cross-entropy of the classes, summed over
    each image and averaged over the images. Unlike in Darknet, objectness is initialized to 0.01, not 0.5, and boxes
    are not pulled to their anchors during the first 12,800 images.

    Args:
        channels, strides: of the feature maps.
        num_classes: C.
        anchors: [width, height] of each anchor, in pixels of the network's input; `detkit check CONFIG --anchors 5`
            proposes them.
        width: channels of the 3x3 convolutions.
        depth: number of 3x3 convolutions; with a passthrough, one of them comes after it. 3 in the paper, 1 in
            yolov2-tiny.
        passthrough: channels of the finer map before the rearrangement.
        reorg: the rearrangement: space_to_depth as in the paper, or darknet as in Darknet's code, which mixes channels
            and locations and is required by the published weights.
        ignore_above: IoU with a target above which a predicted box is not background.
        rescore: whether the objectness target is the IoU of the predicted box instead of 1.
        object_weight, background_weight, box_weight, class_weight: factors of the parts of the loss.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.

    Raises:
        ConfigError: the maps do not fit, or an option is out of range.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels"})
    decode_options: ClassVar[frozenset[str]] = DECODING
    trims_padding: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        anchors: Anchors = COCO_ANCHORS,
        width: int = 1024,
        depth: int = 3,
        passthrough: int = 64,
        reorg: Literal["space_to_depth", "darknet"] = "space_to_depth",
        ignore_above: float = 0.6,
        rescore: bool = True,
        object_weight: float = 5.0,
        background_weight: float = 1.0,
        box_weight: float = 1.0,
        class_weight: float = 1.0,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        max_detections: int = 200,
    ) -> None:
        super().__init__()
        _check_maps(strides)
        check_range("head", 1, width=width, depth=depth, passthrough=passthrough)
        check_range("head", 0, 1, ignore_above=ignore_above)
        check_range("head", 0, object_weight=object_weight, background_weight=background_weight)
        check_range("head", 0, box_weight=box_weight, class_weight=class_weight)
        if reorg == "darknet" and passthrough % 4:
            raise ConfigError(
                f"'head.passthrough' must be a multiple of 4 with head.reorg darknet, but is {passthrough}."
            )
        self.num_classes = num_classes
        self.anchors = anchors_by_level(anchors, 1, "head.anchors")
        self.grid = PerSize(partial(lay_grid, anchors=self.anchors))
        self.reorg = space_to_depth if reorg == "space_to_depth" else darknet_reorg
        self.ignore_above, self.rescore = ignore_above, rescore
        self.object_weight, self.background_weight = object_weight, background_weight
        self.box_weight, self.class_weight = box_weight, class_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, max_detections=max_detections)
        # Built in the order of Darknet's files.
        two = len(channels) == 2
        self.before = nn.Sequential(
            *(DarknetConvolution(width if index else channels[-1], width, 3) for index in range(depth - two))
        )
        if two:
            joined = 4 * passthrough + (width if depth > 1 else channels[-1])
            self.passthrough = DarknetConvolution(channels[0], passthrough, 1)
            self.behind = DarknetConvolution(joined, width, 3)
        self.predictor = nn.Conv2d(width, len(anchors) * (5 + num_classes), 1)
        start_objectness(self.predictor, len(anchors))

    def forward(self, features: list[Tensor], inputs: Inputs) -> GridOutputs:
        """Compute the raw values of all places from feature maps [(B, C_i, h_i, w_i)]."""
        coarse = self.before(features[-1])
        if len(features) == 2:
            fine = self.passthrough(features[0])
            rows, columns = coarse.shape[-2:]
            # A map whose size was rounded down loses, one rounded up gains its last row or column.
            fine = F.pad(fine, (0, 2 * columns - fine.shape[3], 0, 2 * rows - fine.shape[2]))
            coarse = self.behind(torch.cat((self.reorg(fine), coarse), dim=1))
        prediction = self.predictor(coarse)
        maps = ((prediction.shape[2], prediction.shape[3]),)
        cells, anchors = self.grid(features[0].device, maps, inputs.size)
        values = flatten_places(prediction, 5 + self.num_classes)
        return GridOutputs(values, cells, anchors, maps, inputs.size, inputs.sizes)

    def loss(self, outputs: GridOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `box`, `objectness` and `class`, each summed over an image and averaged over the batch.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        box = objectness = classes = outputs.values.sum() * 0.0
        for image, target in enumerate(targets):
            assigned = assign(outputs, image, target, self.anchors, self.ignore_above)
            places, ground_truths = assigned.places, target.boxes[assigned.targets]
            values, cells, anchors = outputs.values[image, places], outputs.cells[places], outputs.anchors[places]
            wanted = true_coordinates(ground_truths, cells, anchors)
            found = torch.cat((values[:, :2].sigmoid(), values[:, 2:4]), dim=1)
            box = box + 0.5 * (size_weights(ground_truths, outputs.size)[:, None] * (found - wanted).square()).sum()
            confidence = torch.ones_like(values[:, 4])
            if self.rescore:
                confidence = elementwise_iou(predicted_boxes(values, cells, anchors), ground_truths).detach()
            background = outputs.values[image, assigned.negative, 4].sigmoid()
            objectness = objectness + 0.5 * self.background_weight * background.square().sum()
            objectness = objectness + 0.5 * self.object_weight * (values[:, 4].sigmoid() - confidence).square().sum()
            classes = classes + F.cross_entropy(values[:, 5:], target.labels[assigned.targets], reduction="sum")
        return {
            "box": self.box_weight * box / len(targets),
            "objectness": objectness / len(targets),
            "class": self.class_weight * classes / len(targets),
        }

    @torch.no_grad()
    def decode(self, outputs: GridOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS; a score is objectness times class probability."""
        return decode_places(outputs, partial(torch.softmax, dim=-1), options or self.postprocess)


def space_to_depth(features: Tensor) -> Tensor:
    """Rearrange (B, C, h, w) to (B, 4 * C, h / 2, w / 2), with 2x2 neighbours as channels; h and w are even."""
    return F.pixel_unshuffle(features, 2)


def darknet_reorg(features: Tensor) -> Tensor:
    """Rearrange (B, C, h, w) to (B, 4 * C, h / 2, w / 2) in the order of Darknet's [reorg] layer; C is a multiple of 4.

    Darknet reinterprets the memory as a map of C / 4 channels and twice the size, rearranges the neighbours of that map
    to channels, giving C channels of h x w, and reinterprets the result as 4 * C channels of half the size.
    """
    batch, channels, rows, columns = features.shape
    enlarged = features.reshape(batch, channels // 4, rows, 2, columns, 2)
    return enlarged.permute(0, 3, 5, 1, 2, 4).reshape(batch, 4 * channels, rows // 2, columns // 2)


def start_objectness(predictor: nn.Conv2d, anchors: int) -> None:
    """Initialize a predictor of `anchors` x (5 + C) values to an objectness of 0.01.

    Otherwise thousands of background places would make the first steps far larger than all later ones.
    """
    with torch.no_grad():
        bias = predictor.get_parameter("bias").view(anchors, -1)
        bias.zero_()
        bias[:, 4] = -math.log((1 - OBJECT_PRIOR) / OBJECT_PRIOR)


def _check_maps(strides: Sequence[int]) -> None:
    if len(strides) == 1 or (len(strides) == 2 and strides[0] > 0 and strides[1] == 2 * strides[0]):
        return
    raise ConfigError(
        f"The head 'yolov2' reads one feature map, or two of which the second has twice the stride of the first, but "
        f"their strides are {list(strides)}. Select them with the backbone's 'levels', for example [4, 5]."
    )
