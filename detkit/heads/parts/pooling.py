"""A map as one vector a picture, without what lies in the padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.structures import Inputs


def pooled_pictures(feature: Tensor, inputs: Inputs, grid: int = 1) -> Tensor:
    """(B, C · grid²) means of each (B, C, h, w) map over grid x grid parts of its picture, row by row.

    A picture covers the cells that it reaches into; parts overlap where the cells cannot be divided evenly, as in
    torch's adaptive average pooling.
    """
    rows, columns = feature.shape[2:]
    covered = [(-(-h * rows // inputs.size[0]), -(-w * columns // inputs.size[1])) for h, w in inputs.sizes]
    if all(cells == (rows, columns) for cells in covered):
        return F.adaptive_avg_pool2d(feature, grid).flatten(1)
    pictures = zip(feature, covered)
    return torch.stack([F.adaptive_avg_pool2d(picture[:, :h, :w], grid).flatten() for picture, (h, w) in pictures])
