"""What heads of other tasks than detection say of one image. Detections stand in detkit.types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


class Prediction(Protocol):
    """What every prediction, Detections among them, can do."""

    def to(self, device: torch.device | str) -> Self:
        """The same prediction with its tensors on `device`."""
        ...


@dataclass(frozen=True, eq=False)
class Classification:
    """The classes of a whole picture.

    Args:
        scores: (C,) float32 in 0..1; they sum to 1 where a picture has exactly one class.
        class_names: names by label; empty inside the network, filled by the predictor.
    """

    scores: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.scores, "scores", 1, torch.float32)

    def to(self, device: torch.device | str) -> Classification:
        """The same with its tensor on `device`."""
        return replace(self, scores=self.scores.to(device))


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """The class of every pixel.

    Args:
        labels: (H, W) uint8 in 0..C-1.
        class_names: names by label; empty inside the network, filled by the predictor.
    """

    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.labels, "labels", 2, torch.uint8)

    def to(self, device: torch.device | str) -> SemanticMap:
        """The same with its tensor on `device`."""
        return replace(self, labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Embedding:
    """A picture as a point; pictures of the same thing lie near one another.

    Args:
        vector: (D,) float32, of length 1.
    """

    vector: Tensor

    def __post_init__(self) -> None:
        _check(self.vector, "vector", 1, torch.float32)

    def to(self, device: torch.device | str) -> Embedding:
        """The same with its tensor on `device`."""
        return replace(self, vector=self.vector.to(device))


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of the one object that a picture shows.

    Args:
        points: (K, 2) float32, x and y in pixels.
    """

    points: Tensor

    def __post_init__(self) -> None:
        _check(self.points, "points", 2, torch.float32)

    def to(self, device: torch.device | str) -> Landmarks:
        """The same with its tensor on `device`."""
        return replace(self, points=self.points.to(device))


@dataclass(frozen=True, eq=False)
class Rendering:
    """A picture that a network made of the one it was given.

    Args:
        image: (3, H, W) float32 RGB in 0..1.
    """

    image: Tensor

    def __post_init__(self) -> None:
        _check(self.image, "image", 3, torch.float32)

    def to(self, device: torch.device | str) -> Rendering:
        """The same with its tensor on `device`."""
        return replace(self, image=self.image.to(device))


def _check(tensor: Tensor, name: str, dimensions: int, dtype: torch.dtype) -> None:
    if tensor.ndim != dimensions or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of {dimensions} dimensions, but got {tuple(tensor.shape)} {tensor.dtype}"
        )
