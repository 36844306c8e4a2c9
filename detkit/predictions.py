"""What heads of other tasks than detection say of one image. Detections stand in detkit.structures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
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
        logits: (C, H, W) float32, what the labels are the largest of: what a network predicts, and a task's `undo`
            turns into `labels` of the source's size. None elsewhere.
        class_names: names by label; empty inside the network, filled by the predictor.
    """

    labels: Tensor
    logits: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.labels, "labels", 2, torch.uint8)
        if self.logits is not None:
            _check(self.logits, "logits", 3, torch.float32)

    def to(self, device: torch.device | str) -> SemanticMap:
        """The same with its tensors on `device`."""
        logits = None if self.logits is None else self.logits.to(device)
        return replace(self, labels=self.labels.to(device), logits=logits)


@dataclass(frozen=True, eq=False)
class Embedding:
    """A picture as a point; pictures of the same thing lie near one another.

    Args:
        vector: (D,) float32, of length 1.
        identity: the name of what the picture shows, by a gallery; None for what is not in it, and without one.
        distance: to the nearest picture of the gallery, in 0..2; None without one.
    """

    vector: Tensor
    identity: str | None = None
    distance: float | None = None

    def distance_to(self, other: Embedding) -> float:
        """0 (the same point) to 2 (opposite): two pictures show the same where it is below a threshold, such as the one
        that `detkit eval` finds the best."""
        return float(torch.linalg.vector_norm(self.vector - other.vector))

    def __post_init__(self) -> None:
        _check(self.vector, "vector", 1, torch.float32)

    def to(self, device: torch.device | str) -> Embedding:
        """The same with its tensor on `device`."""
        return replace(self, vector=self.vector.to(device))


class Recogniser(Protocol):
    """What names the things in pictures by their embeddings, such as a gallery."""

    def recognise(self, embedding: Embedding) -> Embedding:
        """The embedding with what it shows."""
        ...


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

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        values: np.ndarray = (self.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return np.ascontiguousarray(values)

    def to(self, device: torch.device | str) -> Rendering:
        """The same with its tensor on `device`."""
        return replace(self, image=self.image.to(device))


def _check(tensor: Tensor, name: str, dimensions: int, dtype: torch.dtype) -> None:
    if tensor.ndim != dimensions or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of {dimensions} dimensions, but got {tuple(tensor.shape)} {tensor.dtype}"
        )
