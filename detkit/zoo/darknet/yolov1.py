"""YOLO: every cell of one grid predicts a few boxes and one class.

Redmon, Divvala, Girshick and Farhadi, "You Only Look Once: Unified, Real-Time Object Detection", 2016.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.convert import clip, cxcywh_to_xyxy, xyxy_to_cxcywh
from detkit.boxes.iou import elementwise_iou, intersection_over_area
from detkit.boxes.matching import IGNORED_COVER
from detkit.errors import ConfigError, check_range
from detkit.heads.base import DECODING, Head, Postprocess, check_count
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target


class YOLOv1Outputs(NamedTuple):
    """Raw outputs of the YOLO head; a tuple, so that device and precision wrappers can traverse it.

    Args:
        coordinates: (B, S * S, K, 4): x and y of the centre in cells from the cell's top left corner, then the square
            roots of width and height as fractions of the network's input. Cells are ordered row by row.
        confidences: (B, S * S, K): predicted IoU of each box.
        classes: (B, S * S, C): probabilities.
        size: (height, width) of the batched tensor in pixels.
        sizes: (height, width) of each image, without padding.
    """

    coordinates: Tensor
    confidences: Tensor
    classes: Tensor
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]


class Responsible(NamedTuple):
    """The assignment of predictions to the targets of one image.

    Args:
        cells: (M,) int64, unique.
        boxes: (M,) int64 in 0..K-1, the responsible box of each cell.
        targets: (M,) int64, the target of each cell.
        overlaps: (M,) IoU of that box and its target.
        ignored: (S * S,) bool, cells whose boxes do not count as background.
    """

    cells: Tensor
    boxes: Tensor
    targets: Tensor
    overlaps: Tensor
    ignored: Tensor


@heads.register("yolov1")
class YOLOv1(Head):
    """S * S * (K * 5 + C) values from the coarsest spatial map, pooled to S x S cells.

    The cell that contains an object's centre is responsible for it, with the box of the highest IoU (if all are 0, the
    one with the nearest coordinates, as in Darknet). A cell has one class and thus one object; of several objects with
    their centre in it only the first is learned, a known limitation of the method. The loss is equation 3 of the paper,
    squared errors throughout, summed over each image and averaged over the images.

    Args:
        channels, strides: of the feature maps.
        num_classes: C.
        grid: S, the number of cells per side.
        boxes: K, the number of boxes per cell.
        layers: linear for the paper's two fully connected layers, which see the whole image; convolution for two 1x1
            convolutions, which see their own cell.
        hidden: width of the first of them.
        dropout: dropout probability after it.
        coordinate_weight, background_weight: the paper's lambda_coord and lambda_noobj.
        score_threshold, nms_threshold, max_detections: default decoding options; see detkit.heads.base.Postprocess.

    Raises:
        ConfigError: no map is spatial, or an option is out of range.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels"})
    decode_options: ClassVar[frozenset[str]] = DECODING

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        grid: int = 7,
        boxes: int = 2,
        layers: Literal["linear", "convolution"] = "linear",
        hidden: int = 4096,
        dropout: float = 0.5,
        coordinate_weight: float = 5.0,
        background_weight: float = 0.5,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        max_detections: int = 200,
    ) -> None:
        super().__init__()
        check_range("head", 1, grid=grid, boxes=boxes, hidden=hidden)
        check_range("head", 0, 1, dropout=dropout)
        check_range("head", 0, coordinate_weight=coordinate_weight, background_weight=background_weight)
        with_places = [level for level, stride in enumerate(strides) if stride > 0]
        if not with_places:
            raise ConfigError(
                "The head 'yolov1' needs a spatial feature map, but all are pooled from the whole image (stride 0). "
                "Select other maps with the backbone's 'levels'."
            )
        self.level = with_places[-1]
        self.num_classes, self.grid, self.boxes = num_classes, grid, boxes
        self.coordinate_weight, self.background_weight = coordinate_weight, background_weight
        self.postprocess = Postprocess(score_threshold, nms_threshold, max_detections=max_detections)
        width, values = channels[self.level], boxes * 5 + num_classes
        activation = (nn.LeakyReLU(0.1, inplace=True), nn.Dropout(dropout))
        if layers == "linear":
            first = nn.Linear(width * grid * grid, hidden)
            self.layers = nn.Sequential(nn.Flatten(), first, *activation, nn.Linear(hidden, grid * grid * values))
        else:
            last = nn.Conv2d(hidden, values, 1)
            self.layers = nn.Sequential(nn.Conv2d(width, hidden, 1), *activation, last, _CellsLast())

    def forward(self, features: list[Tensor], inputs: Inputs) -> YOLOv1Outputs:
        """Compute the raw values of all cells from feature maps [(B, C_i, h_i, w_i)]."""
        pooled = F.adaptive_avg_pool2d(features[self.level], self.grid)
        values = self.layers(pooled).float().reshape(len(pooled), self.grid**2, -1)
        boxes = values[..., : self.boxes * 5].reshape(*values.shape[:2], self.boxes, 5)
        return YOLOv1Outputs(boxes[..., :4], boxes[..., 4], values[..., self.boxes * 5 :], inputs.size, inputs.sizes)

    def loss(self, outputs: YOLOv1Outputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `box`, `objectness` and `class`, each summed over an image and averaged over the batch.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        everything = outputs.coordinates.sum() + outputs.confidences.sum() + outputs.classes.sum()
        box = objectness = classes = everything * 0.0
        for image, target in enumerate(targets):
            found = self._responsible(outputs, image, target)
            cells, chosen = found.cells, found.boxes
            wanted = self._coordinates(target.boxes[found.targets], cells, outputs.size)
            box = box + (outputs.coordinates[image, cells, chosen] - wanted).square().sum()
            confidences = outputs.confidences[image]
            background = ~found.ignored[:, None].expand_as(confidences).clone()
            background[cells, chosen] = False
            objectness = objectness + (confidences[cells, chosen] - found.overlaps).square().sum()
            objectness = objectness + self.background_weight * confidences[background].square().sum()
            is_class = F.one_hot(target.labels[found.targets], self.num_classes).float()
            classes = classes + (outputs.classes[image, cells] - is_class).square().sum()
        return {
            "box": self.coordinate_weight * box / len(targets),
            "objectness": objectness / len(targets),
            "class": classes / len(targets),
        }

    @torch.no_grad()
    def decode(self, outputs: YOLOv1Outputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS; scores are confidence x class probability, each clipped to 0..1."""
        options = options or self.postprocess
        confidences, classes = outputs.confidences.clamp(0, 1), outputs.classes.clamp(0, 1)
        scores = (confidences[..., None] * classes[:, :, None]).flatten(1, 2)
        found = []
        for coordinates, image_scores, size in zip(outputs.coordinates, scores, outputs.sizes):
            rows, labels, best = options.candidates(image_scores)
            boxes = clip(self._predicted(coordinates, outputs.size).flatten(0, 1)[rows], size)
            found.append((boxes, best, labels))
        return options.detections(found)

    @torch.no_grad()
    def _responsible(self, outputs: YOLOv1Outputs, image: int, target: Target) -> Responsible:
        centres = xyxy_to_cxcywh(target.boxes)[:, :2]
        column, row = (
            (centres[:, axis] * self.grid / side).long().clamp(0, self.grid - 1)
            for axis, side in enumerate((outputs.size[1], outputs.size[0]))
        )
        cell_of = row * self.grid + column
        ignored = torch.zeros(self.grid**2, dtype=torch.bool, device=cell_of.device)
        if target.ignored.any():
            ignored[cell_of[target.ignored]] = True
            covered = intersection_over_area(self._cells(outputs), target.boxes[target.ignored]).amax(1)
            ignored |= covered >= IGNORED_COVER
        members = (~target.ignored).nonzero().flatten()
        cells, rows = cell_of[members].unique(return_inverse=True)
        first = torch.full_like(cells, len(members)).scatter_reduce_(
            0, rows, torch.arange(len(members), device=rows.device), reduce="amin"
        )
        targets = members[first]
        boxes, overlaps = self._best_boxes(outputs, image, cells, target.boxes[targets])
        return Responsible(cells, boxes, targets, overlaps, ignored)

    def _best_boxes(self, outputs: YOLOv1Outputs, image: int, cells: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the responsible box (M,) of each cell, and its IoU (M,) with the cell's target."""
        predicted = self._predicted(outputs.coordinates[image], outputs.size)[cells]
        repeated = targets.repeat_interleave(self.boxes, dim=0)
        overlap = elementwise_iou(predicted.flatten(0, 1), repeated).view(-1, self.boxes)
        side = targets.new_tensor((outputs.size[1], outputs.size[0]) * 2)
        difference = (xyxy_to_cxcywh(predicted) - xyxy_to_cxcywh(targets)[:, None]) / side
        nearness = torch.where(overlap.amax(1, keepdim=True) > 0, overlap, -difference.square().sum(-1))
        chosen = nearness.argmax(1)
        return chosen, overlap.gather(1, chosen[:, None])[:, 0]

    def _predicted(self, coordinates: Tensor, size: tuple[int, int]) -> Tensor:
        """Decode the raw coordinates of one image to boxes (S * S, K, 4) xyxy pixels."""
        side = coordinates.new_tensor((size[1], size[0]))
        centres = (self._corners(coordinates.device)[:, None] + coordinates[..., :2]) * side / self.grid
        return cxcywh_to_xyxy(torch.cat((centres, coordinates[..., 2:].square() * side), dim=-1))

    def _coordinates(self, boxes: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode boxes (M, 4) xyxy as regression targets (M, 4) of their cells."""
        side = boxes.new_tensor((size[1], size[0]))
        box = xyxy_to_cxcywh(boxes)
        centres = box[:, :2] * self.grid / side - self._corners(boxes.device)[cells]
        return torch.cat((centres, (box[:, 2:] / side).clamp(min=0).sqrt()), dim=1)

    def _corners(self, device: torch.device) -> Tensor:
        """Return the column and row of each cell, (S * S, 2) float32."""
        index = torch.arange(self.grid**2, device=device)
        return torch.stack((index % self.grid, index // self.grid), dim=1).float()

    def _cells(self, outputs: YOLOv1Outputs) -> Tensor:
        """Return the cells, (S * S, 4) xyxy pixels."""
        corners = self._corners(outputs.confidences.device)
        side = corners.new_tensor((outputs.size[1], outputs.size[0]) * 2)
        return torch.cat((corners, corners + 1), dim=1) * side / self.grid


class _CellsLast(nn.Module):
    """Reshape (B, values, S, S) to (B, S, S, values)."""

    def forward(self, prediction: Tensor) -> Tensor:
        return prediction.permute(0, 2, 3, 1)
