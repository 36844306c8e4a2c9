"""Boxes for the tests of this folder."""

import torch
from torch import Tensor


def random_boxes(count: int, seed: int, extent: float = 100.0, whole: bool = False) -> Tensor:
    """(count, 4) boxes in a square of `extent` pixels, sides from 1 pixel to half of it; `whole` makes many ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * extent * 0.6
    sides = 1 + torch.rand(count, 2, generator=generator) * extent * 0.4
    if whole:
        corners, sides = (corners / 8).floor() * 8, (sides / 8).ceil() * 8
    return torch.cat((corners, corners + sides), dim=1)


DEGENERATE = torch.tensor(
    [
        [10.0, 10, 10, 10],  # a point
        [10, 10, 10, 30],  # no width
        [10, 10, 30, 10],  # no height
        [30, 10, 10, 30],  # left and right swapped
        [30, 30, 10, 10],  # both swapped
        [10, 10, 30, 30],  # an ordinary one
    ]
)
