"""The prediction of a model that finds landmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detkit.structures import check_tensor


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of the one object that an image shows.

    Args:
        points: (K, 2) float32, x and y in pixels.
    """

    points: Tensor

    def __post_init__(self) -> None:
        check_tensor(self.points, "points", 2, torch.float32)

    def to(self, device: torch.device | str) -> Landmarks:
        """Return a copy with its tensor on `device`."""
        return replace(self, points=self.points.to(device))
