"""Classification with localization: presence, class and box of at most one object per image.

Andrew Ng, "Convolutional Neural Networks", lectures on object localization; the outputs of one cell of YOLO.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.convert import area, clip, cxcywh_to_xyxy, xyxy_to_cxcywh
from detkit.errors import check_range
from detkit.heads.base import Head, Postprocess, check_count
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target

BETA = 1 / 9  # of smooth L1, whose parabola would otherwise reach over the whole image


class LocalizeOutputs(NamedTuple):
    """Raw outputs of the localisation head.

    Args:
        presence: (B,) logits of the presence of an object.
        logits: (B, C) of its class.
        boxes: (B, 4) centre x and y, width and height, as fractions of the image's sides, unbounded.
        sizes: (height, width) of each image, without padding.
    """

    presence: Tensor
    logits: Tensor
    boxes: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("localize")
class Localize(Head):
    """Average pooling of the coarsest map, excluding the padding, and a linear layer.

    The target of an image is its object with the largest box, excluding ignored ones. An image whose objects are all
    ignored does not contribute to the loss.

    Args:
        channels, strides: of the feature maps; only the last one is read, so the backbone should have one level.
        num_classes: C.
        box_loss: l2 (squared differences) or smooth_l1 of centre, width and height, as fractions of the image's sides.
        box_weight: factor of the box loss.
        score_threshold: minimum score of a detection: the probability of presence times that of its class.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels"})
    decode_options: ClassVar[frozenset[str]] = frozenset({"conf"})
    reads_sizes: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        box_loss: Literal["l2", "smooth_l1"] = "l2",
        box_weight: float = 5.0,
        score_threshold: float = 0.01,
    ) -> None:
        super().__init__()
        check_range("head", 0, box_weight=box_weight)
        self.num_classes = num_classes
        self.box_loss, self.box_weight = box_loss, box_weight
        self.postprocess = Postprocess(score_threshold, max_detections=1)
        self.predictor = nn.Linear(channels[-1], 1 + num_classes + 4)

    def forward(self, features: list[Tensor], inputs: Inputs) -> LocalizeOutputs:
        """Presence, class and box of each image, for feature maps [(B, C_i, h_i, w_i)]."""
        values = self.predictor(_image_mean(features[-1], inputs)).float()
        presence, logits, boxes = values.split((1, self.num_classes, 4), dim=1)
        return LocalizeOutputs(presence[:, 0], logits, boxes, inputs.sizes)

    def loss(self, outputs: LocalizeOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """`presence` (binary cross-entropy), and `class` (cross-entropy) and `box` of the images with an object.

        Each is the mean over the images that it counts.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        ground_truths = [_largest(target) for target in targets]
        found = [image for image, ground_truth in enumerate(ground_truths) if len(ground_truth)]
        counted = [
            image
            for image, (ground_truth, target) in enumerate(zip(ground_truths, targets))
            if len(ground_truth) or not len(target)
        ]
        present = outputs.presence.new_tensor([float(len(ground_truths[image])) for image in counted])
        presence = F.binary_cross_entropy_with_logits(outputs.presence[counted], present, reduction="sum")
        labels = torch.cat([ground_truths[image].labels for image in found] or [targets[0].labels[:0]])
        classes = F.cross_entropy(outputs.logits[found], labels, reduction="sum")
        boxes = torch.cat(
            [_fractions(ground_truths[image].boxes, outputs.sizes[image]) for image in found]
            or [outputs.boxes[:0].detach()]
        )
        return {
            "presence": presence / max(len(counted), 1),
            "class": classes / max(len(found), 1),
            "box": self.box_weight * self._box_loss(outputs.boxes[found], boxes) / max(len(found), 1),
        }

    def _box_loss(self, boxes: Tensor, targets: Tensor) -> Tensor:
        if self.box_loss == "l2":
            return F.mse_loss(boxes, targets, reduction="sum")
        return F.smooth_l1_loss(boxes, targets, reduction="sum", beta=BETA)

    @torch.no_grad()
    def decode(self, outputs: LocalizeOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return at most one detection per image, in pixels of the network's input."""
        scores = outputs.presence.sigmoid()[:, None] * outputs.logits.softmax(-1)
        options = options or self.postprocess
        return [_decode_image(*image, options) for image in zip(scores, outputs.boxes, outputs.sizes)]


def _decode_image(scores: Tensor, box: Tensor, size: tuple[int, int], options: Postprocess) -> Detections:
    _, labels, candidates = options.candidates(scores[None])
    best = candidates.argsort(descending=True)[:1]
    height, width = size
    sides = box.new_tensor((width, height, width, height))
    corners = clip(cxcywh_to_xyxy(torch.cat((box[:2], box[2:].clamp(min=0))) * sides), size)
    return Detections(corners.expand(len(best), 4), candidates[best], labels[best])


def _image_mean(feature: Tensor, inputs: Inputs) -> Tensor:
    """(B, C) the mean of each (B, C, h, w) map over the cells that its image reaches into."""
    rows, columns = feature.shape[2:]
    weights = feature.new_zeros(len(inputs.sizes), rows, columns)
    for image, (height, width) in enumerate(inputs.sizes):
        inside_rows, inside_columns = -(-height * rows // inputs.size[0]), -(-width * columns // inputs.size[1])
        weights[image, :inside_rows, :inside_columns] = 1 / (inside_rows * inside_columns)
    return (feature * weights[:, None]).sum((2, 3))


def _largest(target: Target) -> Target:
    """The one object that the image is about, or none."""
    candidates = target[~target.ignored]
    return candidates[area(candidates.boxes).argsort(descending=True, stable=True)[:1]]


def _fractions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) centre, width and height of xyxy pixels, as parts of an image of (height, width) pixels."""
    height, width = size
    return xyxy_to_cxcywh(boxes) / boxes.new_tensor((width, height, width, height))
