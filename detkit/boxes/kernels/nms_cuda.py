"""Non-maximum suppression on a GPU, without synchronisation before the result is read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.candidates import check_candidates, check_finite, check_thresholds

log = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Return whether numba-cuda is installed with its compiler and finds a GPU, or Numba's simulator is enabled."""
    from numba import config

    if config.ENABLE_CUDASIM:
        return True
    if find_spec("numba_cuda") is None:
        return False
    from numba import cuda

    return bool(cuda.is_available())


def nms_on_gpu(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """`detkit.boxes.nms` for tensors on a GPU; synchronises once, for the number of kept boxes.

    Arguments and errors as for `detkit.boxes.nms`.

    Returns:
        (K,) int64 indices into `boxes` on its device, by descending score over all images, ties by index.
    """
    indices, status = nms_padded(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    kept, broken = status.tolist()
    if broken >= 0:
        check_finite(boxes.detach().to("cpu", torch.float32), "boxes")
        check_finite(scores.detach().to("cpu", _score_dtype(scores)), "scores")
    return indices[:kept]


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`detkit.boxes.nms` with a result of fixed size, which needs no synchronisation.

    After a first call, which compiles, calls can be captured in a CUDA graph. Besides some arrays of N entries it needs
    at most 512 bytes per box.

    Arguments as for `detkit.boxes.nms`, but on a GPU (on the CPU if Numba's simulator is enabled).

    Returns:
        (N,) int64, a permutation of the indices of the boxes: first the K kept boxes, by descending score over all
        images, ties by index; then the others, also by descending score. And (2,) int64, the status: K, and -1 if all
        boxes and scores are finite. Otherwise the second entry is the position of the first value that is not finite
        (as float32), in 0..4N-1 for boxes (row * 4 + column) and 4N..5N-1 for scores, and the result is undefined.

    Raises:
        ValueError: invalid shapes, dtypes, devices or thresholds.
    """
    check_candidates(boxes, scores, labels=labels, image_index=image_index)
    check_thresholds(iou_threshold, max_detections)
    _check_device(boxes.device)
    boxes = boxes.detach().to(torch.float32).contiguous()
    # Keep the precision: rounding could create ties and change the order.
    scores = scores.detach().to(_score_dtype(scores))
    status = torch.full((2,), -1, dtype=torch.int64, device=boxes.device)
    if len(boxes) == 0:
        status[0] = 0
        return torch.empty(0, dtype=torch.int64, device=boxes.device), status
    status[1] = _first_not_finite(boxes, scores)

    by_score = scores.argsort(descending=True, stable=True)
    boxes, scores = boxes[by_score], scores[by_score]
    # Keys of any integer dtype can be sorted as int64 and stay distinct.
    image = None if image_index is None else image_index[by_score].to(torch.int64)
    label = None if labels is None else labels[by_score].to(torch.int64)
    takes_part = None if score_threshold is None else scores > score_threshold
    kept = _suppress(boxes, [key for key in (label, image) if key is not None], takes_part, iou_threshold)
    if max_detections is not None:
        kept = _first_of_each_image(kept, image, max_detections)

    through = kept.cumsum(0)
    status[0] = through[-1]
    skipped = torch.arange(len(kept), device=kept.device) - through  # removed boxes before each removed one
    positions = torch.where(kept, through - 1, through[-1] + skipped)
    return torch.empty_like(by_score).scatter_(0, positions, by_score), status


def _score_dtype(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _check_device(device: torch.device) -> None:
    from detkit.boxes.kernels.nms_cuda_kernels import simulated

    needed = "cpu" if simulated else "cuda"
    if device.type != needed:
        why = " with NUMBA_ENABLE_CUDASIM" if simulated else "; use detkit.boxes.nms for other devices"
        raise ValueError(f"boxes must be on a device of type {needed}, but are on {device}{why}")


def _first_not_finite(boxes: Tensor, scores: Tensor) -> Tensor:
    """() int64; see the status of `nms_padded`."""
    finite = torch.cat((boxes.isfinite().flatten(), scores.isfinite()))
    positions = torch.arange(len(finite), device=finite.device)
    first = torch.where(finite, len(finite), positions).amin()
    return torch.where(first < len(finite), first, -1)


def _segments(keys: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Find runs of equal keys.

    Args:
        keys: each (N,), with equal keys adjacent; without keys there is one run.
        like: (N,) with N > 0, for the length and the device.

    Returns:
        (N,) int64 index of the run of each entry; and (N + 1,) int64 start of each run, N beyond the last.
    """
    begins = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    for key in keys:
        begins[1:] |= key[1:] != key[:-1]
    segments = begins.cumsum(0)
    return segments, torch.searchsorted(segments, torch.arange(len(like) + 1, device=like.device))


def _counts_before(flags: Tensor) -> Tensor:
    """(N + 1,) int64 from (N,): the number of flags set before each position, and in total."""
    counts = torch.zeros(len(flags) + 1, dtype=torch.int64, device=flags.device)
    torch.cumsum(flags, 0, out=counts[1:])
    return counts


def _first_of_each_image(kept: Tensor, image: Tensor | None, limit: int) -> Tensor:
    """(N,) bool: the entries of `kept`, (N,) bool, that are among the first `limit` of their image."""
    if image is None:
        return kept & (kept.cumsum(0) <= limit)
    order = image.argsort(stable=True)
    segments, starts = _segments([image[order]], kept)
    kept = kept[order]
    counts = _counts_before(kept)
    rank = counts[:-1] - counts[starts[segments]]
    return torch.empty_like(kept).scatter_(0, order, kept & (rank < limit))


def _suppress(boxes: Tensor, keys: list[Tensor], takes_part: Tensor | None, iou_threshold: float) -> Tensor:
    """Greedy NMS of boxes sorted by score, within groups of equal keys.

    Args:
        boxes: (N, 4) float32 xyxy by descending score, with N > 0.
        keys: each (N,) int64.
        takes_part: (N,) bool, false after the first false entry. None for all.
        iou_threshold: in 0..1.

    Returns:
        (N,) bool, true for the boxes that take part and are kept.
    """
    order = torch.arange(len(boxes), device=boxes.device)
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    groups, starts = _segments([key[order] for key in keys], order)
    if takes_part is None:
        keep = torch.ones_like(order, dtype=torch.uint8)
        ends = starts[1:]
    else:
        keep = takes_part[order].to(torch.uint8)
        ends = starts[:-1] + _counts_before(keep)[starts].diff()
    _launch(boxes[order], groups, starts, ends, keep, iou_threshold)
    return torch.empty_like(keep).scatter_(0, order, keep).to(torch.bool)


def _launch(boxes: Tensor, groups: Tensor, starts: Tensor, ends: Tensor, keep: Tensor, iou_threshold: float) -> None:
    """Launch the kernels, which clear `keep` for suppressed boxes. For the arguments see nms_cuda_kernels."""
    from detkit.boxes.kernels import nms_cuda_kernels as kernels

    count = len(keep)
    words = min(kernels.WORDS, -(-count // kernels.WORD))
    memory = torch.empty((count, words), dtype=torch.uint64, device=boxes.device)
    threshold = _float32_below(iou_threshold)
    with _stream(boxes.device) as stream:
        candidates = [_as_array(tensor) for tensor in (boxes, _areas(boxes), groups, starts)]
        begin, end, flags, masks = candidates[-1], _as_array(ends), _as_array(keep), _as_array(memory)
        for first in range(0, count, kernels.ROUND):
            grid = _blocks(count - first), words
            kernels.fill[grid, kernels.THREADS, stream](*candidates, end, flags, masks, first, threshold)
            kernels.resolve[kernels.RESOLVE_BLOCKS, kernels.RESOLVE_THREADS, stream](begin, end, flags, masks, first)
            later = count - first - kernels.ROUND
            if later > 0:
                grid = _blocks(later), kernels.ROUND // kernels.SLICE
                kernels.spread[grid, kernels.THREADS, stream](*candidates, flags, first, threshold)


def _blocks(threads: int) -> int:
    from detkit.boxes.kernels.nms_cuda_kernels import LEAST_BLOCKS, THREADS

    return max(-(-threads // THREADS), LEAST_BLOCKS)


def _areas(boxes: Tensor) -> Tensor:
    """(N,) float32; 0 for boxes whose intersections are 0, or whose IoUs are 0 or NaN, which are excluded."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    area = width * height
    return torch.where((width > 0) & (area > 0) & (area < torch.inf), area, 0.0)


def _float32_below(threshold: float) -> np.float32:
    """Return the largest float32 not above a threshold: the same float32 numbers are above either."""
    rounded = np.float32(threshold)
    return rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf))


@contextmanager
def _stream(device: torch.device) -> Iterator[Any]:
    """Torch's current stream of the device for Numba, with the device made current in both."""
    if device.type == "cpu":  # the simulator
        yield 0
        return
    from numba import cuda

    _announce(device)
    with torch.cuda.device(device), cuda.gpus[device.index]:
        yield cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)


@cache
def _announce(device: torch.device) -> None:
    log.debug("the first nms on %s compiles its kernels, which takes some seconds", device)


def _as_array(tensor: Tensor) -> Any:
    """The memory of a tensor as an array for Numba."""
    if tensor.device.type == "cpu":  # the simulator
        return tensor.numpy()
    from numba import cuda

    # No synchronisation is needed: the kernels run on torch's stream.
    return cuda.as_cuda_array(tensor, sync=False)
