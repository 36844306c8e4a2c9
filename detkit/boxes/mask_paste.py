"""Pasting of the mask patches that a network predicts for its boxes into masks of the image (He et al. 2017, 3.1).

Equal to torchvision's `paste_masks_in_image(masks, boxes, size, padding=1) > threshold`, but probabilities are computed
only inside boxes, and boxes may lie outside the image at any distance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Clipped boxes cover less than this multiple of the image's area, even with the border around them. For larger boxes
# only the visible part is interpolated.
MOST_IMAGES = 4


def paste_masks(patches: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Paste mask patches into masks of the image.

    A patch is resized to its box bilinearly. Before that it is padded by one cell of zeros, and its box is expanded in
    proportion and truncated to whole pixels.

    Args:
        patches: (N, m, m) float32 probabilities.
        boxes: (N, 4) float32 xyxy pixels, on the same device. Boxes that are not finite or lie outside the image give
            empty masks.
        size: (height, width) of the image in pixels.
        threshold: pixels with a higher probability belong to the object.

    Returns:
        (N, height, width) bool.

    Raises:
        ValueError: the patches are not square, or their number differs from that of the boxes.
    """
    count, cells = patches.shape[0], patches.shape[-1]
    if tuple(patches.shape) != (len(boxes), cells, cells):
        raise ValueError(f"patches must be ({len(boxes)}, m, m) for {len(boxes)} boxes, but are {tuple(patches.shape)}")
    masks = torch.zeros(count, *size, dtype=torch.bool, device=patches.device)
    padded = F.pad(patches, (1, 1, 1, 1))
    for mask, patch, box in zip(masks, padded, _expanded(boxes, (cells + 2) / cells).tolist()):
        left, top, right, bottom = (int(side) for side in box)
        # As in torchvision, the pixel of the right and bottom edge belongs to the box.
        right, bottom = right + 1, bottom + 1
        first_row, last_row = max(top, 0), min(bottom, size[0])
        first_column, last_column = max(left, 0), min(right, size[1])
        if first_row >= last_row or first_column >= last_column:
            continue
        if (bottom - top) * (right - left) <= MOST_IMAGES * size[0] * size[1]:
            whole = F.interpolate(patch[None, None], (bottom - top, right - left), mode="bilinear")[0, 0]
            seen = whole[first_row - top : last_row - top, first_column - left : last_column - left]
        else:
            seen = _between_cells(patch, 1, first_column - left, last_column - left, right - left)
            seen = _between_cells(seen, 0, first_row - top, last_row - top, bottom - top)
        torch.gt(seen, threshold, out=mask[first_row:last_row, first_column:last_column])
    return masks


def _expanded(boxes: Tensor, scale: float) -> Tensor:
    """Expand boxes around their centres, in torchvision's order of operations; move non-finite ones outside."""
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    expanded = torch.cat([centre - half, centre + half], dim=1)
    return torch.where(torch.isfinite(expanded).all(dim=1, keepdim=True), expanded, -2.0)


def _between_cells(patch: Tensor, dim: int, first: int, last: int, length: int) -> Tensor:
    """Interpolate only the pixels `first` to `last` of a patch resized to `length` pixels along `dim`."""
    cells = patch.shape[dim]
    pixels = torch.arange(last - first, dtype=torch.float64, device=patch.device) + first
    position = ((pixels + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    before = position.long()
    after = (before + 1).clamp(max=cells - 1)
    weight = (position - before).to(patch.dtype)
    weight = weight if dim == 1 else weight[:, None]
    return torch.lerp(patch.index_select(dim, before), patch.index_select(dim, after), weight)
