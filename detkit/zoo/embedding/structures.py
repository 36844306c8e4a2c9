"""The prediction of a model that embeds images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from detkit.structures import check_tensor


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of an image; images of the same class have nearby vectors.

    Args:
        vector: (D,) float32 unit vector.
        identity: name found in a gallery; None if unknown, or without a gallery.
        distance: distance to the nearest image of the gallery, in 0..2; None without a gallery.
    """

    vector: Tensor
    identity: str | None = None
    distance: float | None = None

    def distance_to(self, other: Embedding) -> float:
        """0 (the same point) to 2 (opposite): two images show the same where it is below a threshold, such as the one
        that `detkit eval` finds the best."""
        return float(torch.linalg.vector_norm(self.vector - other.vector))

    def __post_init__(self) -> None:
        check_tensor(self.vector, "vector", 1, torch.float32)

    def to(self, device: torch.device | str) -> Embedding:
        """Return a copy with its tensor on `device`."""
        return replace(self, vector=self.vector.to(device))


class Recogniser(Protocol):
    """Names the things in images by their embeddings, as a gallery does."""

    def recognise(self, embedding: Embedding) -> Embedding:
        """The embedding with what it shows."""
        ...
