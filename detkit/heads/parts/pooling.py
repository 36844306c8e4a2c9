"""Average pooling of a feature map to one vector per image, excluding the padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.structures import Inputs


def pooled_images(feature: Tensor, inputs: Inputs, grid: int = 1) -> Tensor:
    """Average-pool maps (B, C, h, w) over a grid x grid partition of each image to (B, C · grid²), row by row.

    An image covers every cell that it intersects; as in torch's adaptive average pooling, parts overlap if the cells
    cannot be divided evenly.
    """
    rows, columns = feature.shape[2:]
    covered = [(-(-h * rows // inputs.size[0]), -(-w * columns // inputs.size[1])) for h, w in inputs.sizes]
    if all(cells == (rows, columns) for cells in covered):
        return F.adaptive_avg_pool2d(feature, grid).flatten(1)
    images = zip(feature, covered)
    return torch.stack([F.adaptive_avg_pool2d(image[:, :h, :w], grid).flatten() for image, (h, w) in images])
