"""Landmarks: K points of the one object that an image shows."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.boxes.convert import area
from detkit.errors import ConfigError, check_range
from detkit.heads.base import Head, Postprocess, check_count
from detkit.heads.parts.pooling import pooled_images
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.faces.structures import Landmarks as Prediction


class LandmarksOutputs(NamedTuple):
    """Raw outputs of the landmarks head.

    Args:
        places: (B, K, 2) x and y, as fractions of the image's sides, unbounded.
        sizes: (height, width) of each image, without padding.
    """

    places: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("landmarks")
class Landmarks(Head):
    """K points regressed from the coarsest map: average pooling over a grid, a hidden layer and a linear layer.

    The targets of an image are the visible points of its object with the largest box, excluding ignored ones.

    Args:
        channels, strides: of the feature maps; only the last one is read.
        num_classes: number of classes of the data; the points do not depend on the class.
        points: K, the number of points in the data.
        grid: rows and columns of the pooling grid; 1 for global pooling, which keeps positions only in the channels.
        width: width of the hidden layer; 0 for none.
        loss: smooth_l1, or wing (Feng et al. 2018, equation 5), which penalizes small errors more.
        normalise: normalizer of the errors in the metrics: the diagonal of the object's box or of the image, or the
            distance between the two points `normalise_points` (the eyes, in most papers on faces).
        normalise_points: indices of these points, from 0.
    """

    task: ClassVar[str] = "landmarks"
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "points"})
    reads_sizes: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        points: int,
        grid: int = 4,
        width: int = 256,
        loss: Literal["smooth_l1", "wing"] = "smooth_l1",
        normalise: Literal["box", "image", "points"] = "box",
        normalise_points: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        check_range("head", 1, points=points, grid=grid)
        check_range("head", 0, width=width)
        if normalise == "points" and not (0 <= min(normalise_points) < max(normalise_points) < points):
            raise ConfigError(
                f"'head.normalise_points' are two different points of {points}, from 0 on, but are "
                f"{list(normalise_points)}."
            )
        self.points, self.grid, self.loss_kind = points, grid, loss
        self.normalise, self.normalise_points = normalise, normalise_points
        incoming = channels[-1] * grid**2
        hidden = [nn.Linear(incoming, width), nn.ReLU()] if width else []
        self.predictor = nn.Sequential(*hidden, nn.Linear(width or incoming, 2 * points))

    def forward(self, features: list[Tensor], inputs: Inputs) -> LandmarksOutputs:
        """Compute the points of each image from feature maps [(B, C_i, h_i, w_i)]."""
        values = self.predictor(pooled_images(features[-1], inputs, self.grid)).float()
        # A zero output is the centre of the image.
        return LandmarksOutputs(values.unflatten(1, (self.points, 2)) + 0.5, inputs.sizes)

    def loss(self, outputs: LandmarksOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `points`: the mean over all visible points of the sum over x and y.

        Raises:
            ConfigError: the data has another number of points.
            ValueError: the number of targets differs from the number of images.
        """
        check_count(targets, outputs.sizes)
        differences = [
            _differences(places, object_of(target), size, self.points)
            for places, target, size in zip(outputs.places, targets, outputs.sizes)
        ]
        every = torch.cat(differences)
        losses = wing(every) if self.loss_kind == "wing" else _smooth_l1(every)
        return {"points": losses.sum() / max(len(every), 1)}

    @torch.no_grad()
    def decode(self, outputs: LandmarksOutputs, options: Postprocess | None = None) -> list[Prediction]:
        """Return the points of each image, in pixels of the network's input."""
        return [Prediction(places * _sides(places, size)) for places, size in zip(outputs.places, outputs.sizes)]


def object_of(target: Target) -> Target:
    """Return the largest object that is not ignored, or none."""
    candidates = target[~target.ignored]
    return candidates[area(candidates.boxes).argsort(descending=True, stable=True)[:1]]


def wing(differences: Tensor, width: float = 0.15, curvature: float = 0.03) -> Tensor:
    """width · ln(1 + |x| / curvature) for |x| below `width`, beyond it a line (Feng et al. 2018, equation 5).

    Args:
        differences: of any shape, as parts of the image's sides.
        width, curvature: the paper's w = 10 and epsilon = 2, of images of 64 pixels.
    """
    distance = differences.abs()
    line = distance - (width - width * math.log(1 + width / curvature))
    return torch.where(distance < width, width * torch.log1p(distance / curvature), line)


def _smooth_l1(differences: Tensor, beta: float = 0.05) -> Tensor:
    return F.smooth_l1_loss(differences, torch.zeros_like(differences), reduction="none", beta=beta)


def _differences(places: Tensor, target: Target, size: tuple[int, int], points: int) -> Tensor:
    """(V, 2) predicted less true place of the visible points of one image."""
    if target.points is None or target.visible is None:
        raise ValueError("the target has no points")
    if not len(target):
        return places[:0]
    if target.points.shape[1] != points:
        raise ConfigError(
            f"'head.points' is {points}, but the data has {target.points.shape[1]} points. Set it to that."
        )
    visible = target.visible[0]
    return (places - target.points[0] / _sides(places, size))[visible]


def _sides(places: Tensor, size: tuple[int, int]) -> Tensor:
    """(2,) width and height."""
    return places.new_tensor([size[1], size[0]])
