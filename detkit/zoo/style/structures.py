"""The prediction of a model that renders images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detkit.structures import check_tensor


@dataclass(frozen=True, eq=False)
class Rendering:
    """An image that a network made of the one it was given.

    Args:
        image: (3, H, W) float32 RGB in 0..1.
    """

    image: Tensor

    def __post_init__(self) -> None:
        check_tensor(self.image, "image", 3, torch.float32)

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        values: np.ndarray = (self.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return np.ascontiguousarray(values)

    def to(self, device: torch.device | str) -> Rendering:
        """Return a copy with its tensor on `device`."""
        return replace(self, image=self.image.to(device))
