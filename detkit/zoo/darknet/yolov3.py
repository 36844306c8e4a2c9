"""YOLOv3: three anchors in every cell of three grids.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    size_weights,
    true_coordinates,
)
from detkit.zoo.darknet.yolov2 import start_objectness

COCO_ANCHORS: dict[int, Anchors] = {
    2: ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)),
    3: ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)),
}
"""Default anchors by the number of levels, from yolov3-tiny.cfg and yolov3.cfg."""


@heads.register("yolov3")
class YOLOv3(Head):
    """On every feature map a 3x3 convolution, then A * (5 + C) values for every cell; with the neck yolov3_neck.

    Classes are predicted independently (a box can have several), and one place over all levels is assigned to each
    target. The loss has the gradients of Darknet's yolo layer: cross-entropy of the centres (after the sigmoid),
    the objectness and the classes, half the squared errors of the logarithms of the sides, summed over each image and
    averaged over the images. As in Darknet, but unlike the paper's description, the IoU of the predicted box, not the
    anchor, with a target decides which places are not background. Objectness is initialized to 0.01; in Darknet it is
    0.5.

    Args:
        channels, strides: of the feature maps.
        num_classes: C.
        anchors: [width, height] of each anchor, in pixels of the network's input, the same number for each map, finest
            map first; null for COCO's, defined for two and three maps. `detkit check CONFIG --anchors 9` proposes
            them.
        widths: channels of the 3x3 convolutions, finest map first; null for twice `channels`.
        ignore_above: IoU with a target above which a predicted box is not background.
        box_weight: factor of the box loss.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.

    Raises:
        ConfigError: the anchors or widths do not fit the maps, or an option is out of range.
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
        anchors: Anchors | None = None,
        widths: tuple[int, ...] | None = None,
        ignore_above: float = 0.5,
        box_weight: float = 1.0,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        max_detections: int = 200,
    ) -> None:
        super().__init__()
        levels = len(channels)
        check_range("head", 0, 1, ignore_above=ignore_above)
        check_range("head", 0, box_weight=box_weight)
        widths = tuple(2 * width for width in channels) if widths is None else widths
        if len(widths) != levels or min(widths) < 1:
            raise ConfigError(f"'head.widths' must be {levels} positive numbers, one for each map, not {list(widths)}.")
        if anchors is None:
            if levels not in COCO_ANCHORS:
                raise ConfigError(
                    f"The head 'yolov3' has no default anchors for {levels} feature maps, only for 2 and 3. Give "
                    f"'head.anchors'; `detkit check CONFIG --anchors {3 * levels}` proposes them from the data."
                )
            anchors = COCO_ANCHORS[levels]
        self.num_classes = num_classes
        self.anchors = anchors_by_level(anchors, levels, "head.anchors")
        self.grid = PerSize(partial(lay_grid, anchors=self.anchors))
        self.ignore_above, self.box_weight = ignore_above, box_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, max_detections=max_detections)
        per_cell = len(anchors) // levels
        self.towers = nn.ModuleList(DarknetConvolution(count, width, 3) for count, width in zip(channels, widths))
        predictors = [nn.Conv2d(width, per_cell * (5 + num_classes), 1) for width in widths]
        for predictor in predictors:
            start_objectness(predictor, per_cell)
        self.predictors = nn.ModuleList(predictors)

    def forward(self, features: list[Tensor], inputs: Inputs) -> GridOutputs:
        """Compute the raw values of all places from feature maps [(B, C_i, h_i, w_i)], finest first."""
        predictions = [
            predictor(tower(feature)) for tower, predictor, feature in zip(self.towers, self.predictors, features)
        ]
        maps = tuple((prediction.shape[2], prediction.shape[3]) for prediction in predictions)
        cells, anchors = self.grid(features[0].device, maps, inputs.size)
        values = torch.cat([flatten_places(prediction, 5 + self.num_classes) for prediction in predictions], dim=1)
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
            values = outputs.values[image, places]
            wanted = true_coordinates(ground_truths, outputs.cells[places], outputs.anchors[places])
            centres = F.binary_cross_entropy_with_logits(values[:, :2], wanted[:, :2], reduction="none")
            sides = 0.5 * (values[:, 2:4] - wanted[:, 2:]).square()
            box = box + (size_weights(ground_truths, outputs.size)[:, None] * (centres + sides)).sum()
            counted = torch.cat((values[:, 4], outputs.values[image, assigned.negative, 4]))
            is_object = (torch.arange(len(counted), device=counted.device) < len(values)).float()
            objectness = objectness + F.binary_cross_entropy_with_logits(counted, is_object, reduction="sum")
            is_class = torch.zeros_like(values[:, 5:])
            is_class[assigned.rows, target.labels[assigned.members]] = 1.0
            classes = classes + F.binary_cross_entropy_with_logits(values[:, 5:], is_class, reduction="sum")
        return {
            "box": self.box_weight * box / len(targets),
            "objectness": objectness / len(targets),
            "class": classes / len(targets),
        }

    @torch.no_grad()
    def decode(self, outputs: GridOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS; a score is objectness times class probability."""
        return decode_places(outputs, torch.sigmoid, options or self.postprocess)
