"""RoIAlign on the CPU with its gradient (He et al. 2017, section 3)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_REGIONS_PER_THREAD = 32
MIN_CHANNELS_PER_THREAD = 64


def roi_align(feature: Tensor, rows: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> Tensor:
    """Equal to torchvision.ops.roi_align up to float32 rounding, in a fraction of its time on a CPU.

    Args:
        feature: (B, C, h, w) float32 on the CPU, fastest in channels_last.
        rows: (R, 5) float32: image index, then xyxy in pixels; may reach outside the image.
        size: output cells per side.
        scale: map locations per pixel.
        sampling: samples per side of a cell; 0 for one per map location in the cell.
        aligned: shift by half a location, so that locations are pixel centres.

    Returns:
        (R, C, size, size) float32 in channels_last; once differentiable with respect to the feature map. Zeros for
        regions whose coordinates are not finite.

    Raises:
        ValueError: an image index is not in 0..B-1.
    """
    if len(rows) and not 0 <= rows[:, 0].min() <= rows[:, 0].max() < len(feature):
        raise ValueError(f"the first column of rows must be an image index in 0..{len(feature) - 1}")
    cells: Tensor = _RoiAlign.apply(feature, rows, size, scale, sampling, aligned)
    return cells


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, feature: Tensor, rows: Tensor, size: int, scale: float, sampling: int, aligned: bool
    ) -> Tensor:
        import numpy as np

        from detkit.boxes.kernels.roi_align_numba import pool

        maps, rows = _channels_last(feature), rows.detach().contiguous()
        context.save_for_backward(rows)
        context.shape, context.options = maps.shape, (np.float32(scale), sampling, aligned)
        cells = torch.empty(len(rows), size, size, maps.shape[3])
        arrays = maps.numpy(), rows.numpy(), *context.options, cells.numpy()
        _in_threads(lambda first, last: pool(*arrays, first, last), len(rows), MIN_REGIONS_PER_THREAD)
        return cells.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from detkit.boxes.kernels.roi_align_numba import spread

        (rows,) = context.saved_tensors
        maps = torch.zeros(context.shape)
        arrays = _channels_last(gradient).numpy(), rows.numpy(), *context.options, maps.numpy()
        _in_threads(lambda first, last: spread(*arrays, first, last), maps.shape[3], MIN_CHANNELS_PER_THREAD)
        return maps.permute(0, 3, 1, 2), None, None, None, None, None


def _channels_last(tensor: Tensor) -> Tensor:
    """Convert (N, C, h, w) to contiguous (N, h, w, C)."""
    return tensor.detach().permute(0, 2, 3, 1).contiguous()


def _in_threads(work: Callable[[int, int], None], count: int, least: int) -> None:
    """Run `work` on consecutive ranges of 0..count in up to torch's number of threads, each of at least `least`."""
    threads = max(1, min(torch.get_num_threads(), count // least))
    if threads == 1:
        work(0, count)
        return
    edges = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
