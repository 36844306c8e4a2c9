"""Sliding windows in one pass: a window classifier whose fully connected layers are convolutions.

Sermanet, Eigen, Zhang, Mathieu, Fergus and LeCun, "OverFeat: Integrated Recognition, Localization and Detection using
Convolutional Networks", 2013, section 3.5.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.convert import area, clip
from detkit.boxes.matching import match_two_thresholds
from detkit.boxes.sampling import sample_balanced
from detkit.errors import ConfigError, check_range
from detkit.heads.base import DECODING, Head, Postprocess, check_count
from detkit.registry import heads
from detkit.structures import Detections, Inputs, Target


class SlidingWindowOutputs(NamedTuple):
    """Raw outputs of the sliding window.

    Args:
        logits: (B, A, C + 1), column 0 is background.
        windows: (A, 4) xyxy pixels of the network's input; they may reach into the padding.
        sizes: (height, width) of each image, without padding.
    """

    logits: Tensor
    windows: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("sliding_window")
class SlidingWindow(Head):
    """Classifies windows of fixed sizes at every location of every feature map; the box of an object is its window.

    A classifier of h x w cells has two hidden fully connected layers. Implemented as one h x w and two 1x1
    convolutions, they run over the whole map at once and share computation between windows. Each level and each window
    size has its own classifier. Windows are one cell, i.e. one stride, apart.

    Args:
        channels, strides: of the feature maps.
        num_classes: C, without background.
        windows: (height, width) of each window in cells of the feature map, the same on all levels: a window of 4
            cells on a map of stride 16 is 64 pixels wide.
        width: channels of the hidden layers.
        foreground_from: IoU with a ground-truth box from which a window is positive; the best window of each box is
            positive too.
        background_below: maximum IoU below which a window is negative; windows between the two are ignored.
        samples: number of windows per image that take part in the loss.
        positive_fraction: maximum fraction of positives among them.
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
        windows: tuple[tuple[int, int], ...] = ((2, 2), (4, 4)),
        width: int = 256,
        foreground_from: float = 0.5,
        background_below: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.25,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.3,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        check_range("head", 1, width=width, samples=samples)
        check_range("head", 0, 1, foreground_from=foreground_from, background_below=background_below)
        check_range("head", 0, 1, positive_fraction=positive_fraction)
        if background_below > foreground_from:
            raise ConfigError(
                f"'head.background_below' must not be above 'head.foreground_from', but they are {background_below} "
                f"and {foreground_from}."
            )
        if not windows or min(min(window) for window in windows) < 1:
            raise ConfigError(f"'head.windows' must hold sizes of 1 cell at least, but is {list(map(list, windows))}.")
        if min(strides) < 1:
            raise ConfigError(
                f"A window cannot slide over a map pooled from the whole image (strides {list(strides)}). Leave that "
                f"map out."
            )
        self.strides, self.windows = tuple(strides), tuple(windows)
        self.foreground_from, self.background_below = foreground_from, background_below
        self.samples, self.positive_fraction = samples, positive_fraction
        self.postprocess = Postprocess(score_threshold, nms_threshold, max_detections=max_detections)
        self.classifiers = nn.ModuleList(
            nn.ModuleList(_classifier(count, window, width, num_classes + 1) for window in windows)
            for count in channels
        )

    def forward(self, features: list[Tensor], inputs: Inputs) -> SlidingWindowOutputs:
        """Logits of every window, for feature maps [(B, C_i, h_i, w_i)].

        Raises:
            ConfigError: a map is smaller than a window.
        """
        logits, windows = [], []
        for feature, stride, classifiers in zip(features, self.strides, self.classifiers):
            for window, classifier in zip(self.windows, classifiers):  # type: ignore[call-overload]
                _check_fits(window, feature, stride, inputs.size)
                scores = classifier(feature)
                logits.append(scores.flatten(2).transpose(1, 2))
                windows.append(_window_boxes(scores.shape[2:], window, stride))
        return SlidingWindowOutputs(
            torch.cat(logits, 1).float(), torch.cat(windows).to(features[0].device), inputs.sizes
        )

    def loss(self, outputs: SlidingWindowOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """`class`: the mean cross-entropy of the windows that were sampled, objects and background.

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        logits, classes = [], []
        for image, target in enumerate(targets):
            match = match_two_thresholds(
                outputs.windows, target.boxes, target.ignored, low=self.background_below, high=self.foreground_from
            )
            positive, negative = sample_balanced(match, self.samples, self.positive_fraction)
            logits.append(outputs.logits[image, torch.cat((positive, negative))])
            classes += [target.labels[match.target_index[positive]] + 1, torch.zeros_like(negative)]
        flat = torch.cat(logits)
        return {"class": F.cross_entropy(flat, torch.cat(classes), reduction="sum") / max(len(flat), 1)}

    @torch.no_grad()
    def decode(self, outputs: SlidingWindowOutputs, options: Postprocess | None = None) -> list[Detections]:
        """Return detections after per-class NMS, in pixels of the network's input."""
        scores = outputs.logits.softmax(-1)[..., 1:]
        options = options or self.postprocess
        return options.detections(
            [_candidates(image, outputs.windows, size, options) for image, size in zip(scores, outputs.sizes)]
        )


def _candidates(
    scores: Tensor, windows: Tensor, size: tuple[int, int], options: Postprocess
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes, scores and labels of one image that enter NMS."""
    boxes = clip(windows, size)
    inside = area(boxes) > 0  # the others lie in the padding
    boxes, scores = boxes[inside], scores[inside]
    candidates, labels, candidate_scores = options.candidates(scores)
    return boxes[candidates], candidate_scores, labels


def _classifier(channels: int, window: tuple[int, int], width: int, outputs: int) -> nn.Sequential:
    """Three fully connected layers of a window of cells, as convolutions without padding."""
    return nn.Sequential(
        nn.Conv2d(channels, width, window),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, outputs, 1),
    )


def _window_boxes(places: Sequence[int], window: tuple[int, int], stride: int) -> Tensor:
    """(places, 4) xyxy pixels of a window of (height, width) cells at (rows, columns) places, row by row."""
    rows, columns = torch.meshgrid(torch.arange(places[0]), torch.arange(places[1]), indexing="ij")
    corners = torch.stack((columns, rows), dim=-1).reshape(-1, 2)
    sides = torch.tensor((window[1], window[0]))
    return torch.cat((corners, corners + sides), dim=1).float() * stride


def _check_fits(window: tuple[int, int], feature: Tensor, stride: int, size: tuple[int, int]) -> None:
    rows, columns = feature.shape[2:]
    if window[0] > rows or window[1] > columns:
        raise ConfigError(
            f"A window of {window[0]}x{window[1]} cells of 'head.windows' does not fit on the map of stride {stride}, "
            f"which has {rows}x{columns} for an input of {size[0]}x{size[1]} pixels. Choose smaller windows, a larger "
            f"'input.size', or finer 'levels' of the backbone."
        )
