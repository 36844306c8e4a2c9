"""MTCNN (Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks", 2016)."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.boxes.convert import clip
from detkit.boxes.nms import nms
from detkit.errors import ConfigError, check_range
from detkit.heads.base import ALL, DECODING, Head, Postprocess, check_count
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target
from detkit.zoo.faces import mtcnn_boxes as geometry
from detkit.zoo.faces.mtcnn_networks import POINTS, OutputNet, ProposalNet, RefineNet, Stage, StageOutputs
from detkit.zoo.faces.mtcnn_windows import Windows, draw_windows

WITHIN_SCALE, ACROSS_SCALES, REFINED = 0.5, 0.7, 0.7
"""NMS thresholds: within one scale of the pyramid, over all scales, and after the R-Net."""
WINDOWS_AT_ONCE = 512
HARD = 0.7
"""Fraction of the windows, those with the largest loss, that train face classification (section II.B)."""


class MTCNNOutputs(NamedTuple):
    """The images themselves, since the windows that the networks see depend on the targets or on earlier networks.

    Args:
        images: (B, 3, H, W) RGB in 0..1.
        sizes: (height, width) of each image, without padding.
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("mtcnn")
class MTCNN(Head):
    """A cascade of three networks, each refining the windows accepted by the previous one; the last finds five points.

    It reads the image itself: use it with the backbone `pixels` and with input.resize crop, which keeps images at
    their original size. The P-Net runs over an image pyramid, R-Net and O-Net over single windows. `decode` is the
    cascade of the authors' published model and of facenet-pytorch, which ships its weights; see
    detkit.zoo.faces.converter.

    The paper trains the networks one after another, each on the windows that the previous ones accepted, with separate
    data for each kind of output. Here all three are trained at once, on random windows around the objects and anywhere
    in the image. Points are trained on windows that show an object, with its visible points.

    Args:
        channels, strides: of the image: (3,) and (1,).
        num_classes: C, 1 for faces.
        min_size: side of the smallest objects to detect, in pixels of the network's input.
        factor: scale factor between consecutive levels of the pyramid.
        thresholds: score thresholds after P-Net, R-Net and O-Net. A detector's `conf` can only raise the last one.
        nms_threshold: of two final boxes whose intersection exceeds this fraction of the smaller one, the lower-scoring
            one is removed.
        windows: number of windows per image drawn for the loss.
        box_weight: factor of the box loss; default the paper's.
        point_weight: factor of the point loss; default the paper's for its last network.
    """

    task: ClassVar[str] = "detect"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "labels", "points"})
    decode_options: ClassVar[frozenset[str]] = DECODING
    # Scores of good windows differ in their last bits only, and the best decides where the box is.
    full_precision: ClassVar[bool] = True
    any_size: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        min_size: float = 20.0,
        factor: float = 0.709,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        nms_threshold: float = 0.7,
        windows: int = 48,
        box_weight: float = 0.5,
        point_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if tuple(channels) != (3,) or tuple(strides) != (1,):
            raise ConfigError(
                "The head 'mtcnn' has networks of its own and reads the image itself, but the backbone gives "
                f"{list(channels)} channels at strides {list(strides)}. Set backbone: {{name: pixels}}, and no neck."
            )
        check_range("head", geometry.CELL, min_size=min_size)
        check_range("head", 0.1, 0.95, factor=factor)
        check_range("head", 1, windows=windows)
        check_range("head", 0, box_weight=box_weight, point_weight=point_weight)
        for threshold in thresholds:
            check_range("head", 0, 1, thresholds=threshold)
        self.min_size, self.factor, self.thresholds = min_size, factor, thresholds
        self.windows, self.box_weight, self.point_weight = windows, box_weight, point_weight
        self.postprocess = Postprocess(0.01, nms_threshold, max_candidates=ALL)
        self.pnet = ProposalNet(num_classes)
        self.rnet = RefineNet(num_classes)
        self.onet = OutputNet(num_classes)

    def forward(self, features: list[Tensor], inputs: Inputs) -> MTCNNOutputs:
        """Return the images, given as the one feature map [(B, 3, H, W)]."""
        return MTCNNOutputs(features[0], inputs.sizes)

    def loss(self, outputs: MTCNNOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute for each network `face` (cross-entropy over the hardest 70 % of positive and negative windows) and
        `box` (squared differences over positive and part windows), and `points` of the O-Net.

        Each is the mean over its windows.

        Raises:
            ConfigError: the objects do not have five points.
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        for target in targets:
            if target.points is not None and len(target) and target.points.shape[1] != POINTS:
                raise ConfigError(
                    f"MTCNN finds {POINTS} points of each object, but the data has {target.points.shape[1]}. Use data "
                    "with five points, or the head 'landmarks'."
                )
        drawn = [draw_windows(target, size, self.windows) for target, size in zip(targets, outputs.sizes)]
        losses: dict[str, Tensor] = {}
        for name, network in (("pnet", self.pnet), ("rnet", self.rnet), ("onet", self.onet)):
            pixels = torch.cat(
                [
                    _pixels(image, size, windows.boxes, network.side)
                    for image, size, windows in zip(outputs.images, outputs.sizes, drawn)
                ]
            )
            found = network(pixels)
            losses |= {f"{name}_{part}": value for part, value in self._losses(found, drawn, targets).items()}
        return losses

    def _losses(self, found: StageOutputs, drawn: list[Windows], targets: tuple[Target, ...]) -> dict[str, Tensor]:
        ground_truths = [target[~target.ignored] for target in targets]
        labels = torch.cat([_labels(windows, ground_truth) for windows, ground_truth in zip(drawn, ground_truths)])
        classes = F.cross_entropy(found.logits.flatten(1)[labels >= 0], labels[labels >= 0], reduction="none")
        hard = classes.topk(round(HARD * len(classes))).values if len(classes) else classes
        show = torch.cat([windows.positive | windows.part for windows in drawn])
        offsets = torch.cat(
            [
                geometry.offsets_to(windows.boxes[some], ground_truth.boxes[windows.target_index[some]])
                for windows, ground_truth in zip(drawn, ground_truths)
                for some in [windows.positive | windows.part]
            ]
        )
        losses = {
            "face": hard.sum() / max(len(hard), 1),
            "box": self.box_weight * _mean_square(found.offsets.flatten(1)[show], offsets),
        }
        if found.points is not None:
            losses["points"] = self.point_weight * _point_loss(found.points, drawn, ground_truths)
        return losses

    @torch.no_grad()
    def decode(self, outputs: MTCNNOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return the objects of each image with their points, in pixels of the network's input."""
        options = options or self.postprocess
        pairs = zip(outputs.images, outputs.sizes)
        return [self._cascade(image[:, : size[0], : size[1]], options) for image, size in pairs]

    def _cascade(self, image: Tensor, options: Postprocess) -> Detections:
        """Decode one image (3, H, W) in 0..1."""
        pixels = image.float() * 255
        size = (image.shape[1], image.shape[2])
        boxes = self._propose(pixels)
        boxes = boxes[geometry.in_image(boxes, size)]
        found = _in_chunks(self.rnet, pixels, boxes)
        scores = _presence(found)
        passed = _above(scores, self.thresholds[1])
        passed = passed[nms(boxes[passed], scores[passed], REFINED)]
        boxes = geometry.squares(geometry.moved(boxes[passed], found.offsets[passed]))
        boxes = boxes[geometry.in_image(boxes, size)]
        return self._finish(boxes, _in_chunks(self.onet, pixels, boxes), size, options)

    def _propose(self, pixels: Tensor) -> Tensor:
        """Return the squares (N, 4) that the P-Net accepts at any scale."""
        height, width = pixels.shape[1:]
        candidates = [(pixels.new_zeros(0, 4), pixels.new_zeros(0), pixels.new_zeros(0, 4))]
        for scale in geometry.pyramid_scales((height, width), self.min_size, self.factor):
            shrunk = F.adaptive_avg_pool2d(pixels[None], (int(height * scale + 1), int(width * scale + 1)))
            found = self.pnet(_centred(shrunk))
            probabilities = _presence(found)[0]
            passed = _above(probabilities.flatten(), self.thresholds[0])
            boxes = geometry.cells(passed // probabilities.shape[1], passed % probabilities.shape[1], scale).to(pixels)
            scores = probabilities.flatten()[passed]
            kept = nms(boxes, scores, WITHIN_SCALE)
            offsets = found.offsets[0].flatten(1)[:, passed].T.float()
            candidates.append((boxes[kept], scores[kept], offsets[kept]))
        boxes, scores, offsets = (torch.cat(parts) for parts in zip(*candidates))
        kept = nms(boxes, scores, ACROSS_SCALES)
        boxes, offsets = boxes[kept], offsets[kept]
        # Not `moved`: the published model computes the sides of these boxes one pixel shorter than elsewhere.
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return geometry.squares(boxes + offsets * sides)

    def _finish(self, squares: Tensor, found: StageOutputs, size: tuple[int, int], options: Postprocess) -> Detections:
        """Return the detections of the O-Net for windows (N, 4)."""
        assert found.points is not None
        presence = _presence(found)
        scores, labels = found.logits.float().softmax(1)[:, 1:].max(1)
        boxes = geometry.moved(squares, found.offsets.float())
        sound = (presence > self.thresholds[2]) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        rows = options.candidates(scores[:, None])[0]
        rows = rows[sound[rows]]
        kept = rows[geometry.suppress_by_smaller(boxes[rows], scores[rows], options.iou_threshold)]
        kept = kept[: options.max_detections]
        points = geometry.points_in(squares[kept], found.points[kept].float())
        return Detections(clip(boxes[kept], size), scores[kept], labels[kept], points=points)


def _centred(pixels: Tensor) -> Tensor:
    """Normalize pixels in 0..255 to about -1..1, as the published networks read them.

    Applied after resizing, as in the published model; see full_precision.
    """
    return (pixels - 127.5) * 0.0078125


def _pixels(image: Tensor, size: tuple[int, int], boxes: Tensor, side: int) -> Tensor:
    """Cut windows (N, 4) out of an image of (height, width) inside its padding: (N, 3, side, side)."""
    return _centred(geometry.windows(image[:, : size[0], : size[1]].float() * 255, boxes, side))


def _in_chunks(network: Stage, pixels: Tensor, boxes: Tensor) -> StageOutputs:
    """Run a network on windows (N, 4) of an image, in chunks."""
    # At least one chunk, so that zero windows give outputs with zero rows.
    parts = [network(_centred(geometry.windows(pixels, some, network.side))) for some in boxes.split(WINDOWS_AT_ONCE)]
    points = None if parts[0].points is None else torch.cat([part.points for part in parts])
    return StageOutputs(
        torch.cat([part.logits for part in parts]).float(), torch.cat([part.offsets for part in parts]).float(), points
    )


def _presence(found: StageOutputs) -> Tensor:
    """Return the probability of an object of any class, (N, ...)."""
    return found.logits.float().softmax(1)[:, 1:].sum(1)


def _above(scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of scores (N,) above a threshold; NaN scores raise an error."""
    return Postprocess(threshold, max_candidates=ALL).candidates(scores[:, None])[0]


def _labels(windows: Windows, target: Target) -> Tensor:
    """Return the label (N,) of each window: 0 for background, class + 1 for an object, -1 for part of an object."""
    labels = torch.full_like(windows.target_index, -1)
    labels[windows.negative] = 0
    labels[windows.positive] = target.labels[windows.target_index[windows.positive]] + 1
    return labels


def _point_loss(found: Tensor, drawn: list[Windows], targets: list[Target]) -> Tensor:
    """Return the mean squared difference of the visible points in positive windows."""
    wanted, counted = [], []
    for windows, target in zip(drawn, targets):
        index = windows.target_index[windows.positive]
        if target.points is None or target.visible is None:
            raise ValueError("the targets have no points")
        wanted.append(geometry.fractions_of(windows.boxes[windows.positive], target.points[index]))
        counted.append(target.visible[index].repeat(1, 2))
    positive = torch.cat([windows.positive for windows in drawn])
    visible = torch.cat(counted)
    return _mean_square(found[positive][visible], torch.cat(wanted)[visible])


def _mean_square(values: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(values.float(), wanted, reduction="sum") / max(values.numel(), 1)
