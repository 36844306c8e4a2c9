"""A map as one vector an image, without what lies in the padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.structures import Inputs


def pooled_images(feature: Tensor, inputs: Inputs, grid: int = 1) -> Tensor:
    """(B, C · grid²) means of each (B, C, h, w) map over grid x grid parts of its image, row by row.

    An image covers the cells that it reaches into; parts overlap where the cells cannot be divided evenly, as in
    torch's adaptive average pooling.
    """
    rows, columns = feature.shape[2:]
    covered = [(-(-h * rows // inputs.size[0]), -(-w * columns // inputs.size[1])) for h, w in inputs.sizes]
    if all(cells == (rows, columns) for cells in covered):
        return F.adaptive_avg_pool2d(feature, grid).flatten(1)
    images = zip(feature, covered)
    return torch.stack([F.adaptive_avg_pool2d(image[:, :h, :w], grid).flatten() for image, (h, w) in images])
