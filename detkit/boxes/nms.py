"""Non-maximum suppression of all images and classes of a batch in one call."""

import gc
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from detkit.boxes.candidates import (
    check_candidates,
    check_finite,
    check_thresholds,
    first_of_each_image,
)

log = logging.getLogger(__name__)

KEPT_WORDS = 2**24
"""The most memory, in words of 4 bytes, that a thread keeps for its next call: 64 MB, enough for 700,000 boxes."""
GPU_KERNELS = "DETKIT_GPU_KERNELS"
_thread = threading.local()
_NO_MEMORY = np.empty(0, dtype=np.float32)

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # they are private; without them every call takes the longer way through the operator

    def _len_torch_dispatch_stack() -> int:
        return 1


# A look-up less in each call.
_FLOAT32, _INT64 = torch.float32, np.int64
_empty, _from_numpy = np.empty, torch.from_numpy

# The kernels once loaded, and the maximum number of boxes of the one for few boxes.
_suppress: Callable[..., int] | None = None
_suppress_few: Callable[..., int] = NotImplemented
_few = -1


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """Exact greedy non-maximum suppression per image and class.

    Keeps the box with the highest score, removes all boxes of the same image and class whose IoU with it is above
    `iou_threshold`, and repeats. Equal to torchvision.ops.nms on each image and class, including ties of scores, which
    are broken by index. Boxes without area neither suppress nor are suppressed. There is no time limit.

    On an NVIDIA GPU it is computed there, by torchvision's kernel. detkit's own, which need numba-cuda and do not wait
    for the device but for the number of kept boxes, are used if the environment variable DETKIT_GPU_KERNELS is 1: they
    have passed their tests in a simulator, but were not run on a GPU yet. On other devices it
    is computed on the CPU, and the result returns to the device. It passes through torch.compile and torch.export
    as the operator `detkit::nms`.

    Args:
        boxes: (N, 4) xyxy pixels of any float dtype, computed in float32.
        scores: (N,) of any float dtype.
        iou_threshold: in 0..1.
        labels: (N,) integers; boxes of different labels do not suppress each other. None for a single class.
        image_index: (N,) integers, the image of the batch that each box belongs to. None for a single image.
        score_threshold: boxes with a score of at most this value are discarded. None keeps all.
        max_detections: maximum number of kept boxes per image, those with the highest scores. None for no limit.

    Returns:
        (K,) int64 indices into `boxes` on its device, by descending score over all images, ties by index.

    Raises:
        ValueError: invalid shapes, dtypes, devices or thresholds, or boxes or scores that are not finite, naming the
            entry: "scores[17] is nan".
    """
    # Tensors of a tracer, or of a subclass that overrides torch's operators.
    if (
        type(boxes) is not Tensor or type(scores) is not Tensor
        or is_dynamo_compiling() or _len_torch_dispatch_stack() or _get_tracing_state()
    ):  # fmt: skip
        return _through_operator(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    # For few boxes most of the time goes into the checks, so the simplest call has a fast path.
    if (
        labels is None and image_index is None and score_threshold is None and max_detections is None
        and boxes.dtype is _FLOAT32 and scores.dtype is _FLOAT32 and boxes.is_cpu and scores.is_cpu
        and boxes.is_contiguous() and scores.is_contiguous()
        and type(iou_threshold) is float and 0.0 <= iou_threshold <= 1.0
    ):  # fmt: skip
        shape = scores.shape
        if len(shape) == 1 and (count := shape[0]) <= _few and boxes.shape == (count, 4):
            # NumPy allocates and slices an array in a third of torch's time.
            result = _empty(count, _INT64)
            try:
                kept = _suppress_few(boxes.data_ptr(), scores.data_ptr(), iou_threshold, result)
            except RuntimeError:
                kept = -1  # tensors inside a torch.func transform have no memory
            if kept >= 0:
                return _from_numpy(result[:kept])
    if peek_interpreter_stack() is not None:  # a transform of torch.func
        return _through_operator(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    return eager_nms(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)


def _through_operator(boxes: Tensor, *arguments: Any) -> Tensor:
    if not (isinstance(boxes, Tensor) and isinstance(arguments[0], Tensor)):
        return eager_nms(boxes, *arguments)  # raises the error
    import detkit.boxes.nms_operator  # noqa: F401  (registers the operator)

    return torch.ops.detkit.nms(boxes, *arguments)


def eager_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """`nms` for tensors with values (not traced), of any dtype, layout and device."""
    check_candidates(boxes, scores, labels=labels, image_index=image_index)
    check_thresholds(iou_threshold, max_detections, score_threshold)
    if boxes.is_cuda:
        return _on_gpu(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    device = boxes.device
    if device.type != "cpu":
        log.debug("nms of %d boxes on %s is computed on the CPU", len(boxes), device)
    boxes = _ready(boxes, torch.float32)
    # Keep the precision: rounding could create ties and change the order.
    scores = _ready(scores, torch.float64 if scores.dtype is torch.float64 else torch.float32)
    above_score = -math.inf if score_threshold is None else float(score_threshold)
    if scores.dtype == torch.float32:
        # Rounded to float32, as torch does when comparing float32 scores with a number.
        above_score = float(torch.tensor(above_score, dtype=torch.float32, device="cpu"))
    else:
        check_finite(scores, "scores")
        scores, above_score = _ranked(scores, above_score)
    labels = None if labels is None else _ready(labels, torch.int64)
    image_index = None if image_index is None else _ready(image_index, torch.int64)
    limit = len(boxes) if max_detections is None else min(max_detections, len(boxes))
    kept = _run_kernel(boxes, scores, float(iou_threshold), labels, image_index, above_score, limit)
    return kept if device.type == "cpu" else kept.to(device)


def _on_gpu(boxes: Tensor, *arguments: Any) -> Tensor:
    from detkit.boxes.kernels import nms_cuda

    if os.environ.get(GPU_KERNELS) == "1":
        if nms_cuda.available():
            return nms_cuda.nms_on_gpu(boxes, *arguments)
        _say_once(
            f"{GPU_KERNELS}=1, but NMS on this GPU goes through torchvision's kernel: numba-cuda is not installed or "
            "finds no GPU. Install it with `pip install 'detkit-vision[cuda]'`."
        )
    from detkit.boxes.nms_torchvision import nms_by_torchvision

    return nms_by_torchvision(boxes, *arguments)


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _run_kernel(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None,
    image_index: Tensor | None,
    above_score: float,
    limit: int,
) -> Tensor:
    """Call the kernel with contiguous float32 boxes and scores, int64 labels and image indices, all on the CPU."""
    suppress = _suppress or _load_kernel()
    count = boxes.shape[0]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (boxes, scores, labels, image_index)]
    for name, tensor, address in zip(
        ("boxes", "scores", "labels", "image_index"), (boxes, scores, labels, image_index), addresses
    ):
        if tensor is not None and count and not address:
            raise ValueError(f"{name} is a tensor without memory, such as a tracer's: nms needs its values")
    result = np.empty(count, dtype=np.int64)
    kept = suppress(*addresses, iou_threshold, above_score, limit, _memory(count), result)
    if kept >= 0:
        # A slice would keep all of the memory.
        return torch.from_numpy(result[:kept] if 2 * kept > count else result[:kept].copy())
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")
    # Sparse labels or image indices, such as 2^40, are renumbered; the limit per image is applied afterwards.
    groups = _dense_groups([key for key in (labels, image_index) if key is not None])
    found = _run_kernel(boxes, scores, iou_threshold, groups, None, above_score, len(boxes))
    return first_of_each_image(found, image_index, limit)


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to this dtype, on the CPU and contiguous."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().to("cpu", dtype).contiguous().resolve_neg()


def _memory(count: int) -> np.ndarray:
    """Working memory of the kernel; each thread keeps it between calls, up to KEPT_WORDS."""
    from detkit.boxes.kernels.nms_numba import words_needed

    words = words_needed(count)
    memory: np.ndarray = getattr(_thread, "memory", _NO_MEMORY)
    if len(memory) < words:
        memory = np.empty(words, dtype=np.float32)
        if words <= KEPT_WORDS:
            _thread.memory = memory
    return memory


def _dense_groups(keys: list[Tensor]) -> Tensor:
    """(N,) int64 in 0..N-1, equal if and only if all keys are equal."""
    groups = keys[0].unique(return_inverse=True)[1]
    for key in keys[1:]:
        numbered = key.unique(return_inverse=True)[1]
        groups = (groups * (numbered.max() + 1) + numbered).unique(return_inverse=True)[1]
    return groups


def _ranked(scores: Tensor, above_score: float) -> tuple[Tensor, float]:
    """Replace float64 scores by consecutive float32 numbers in the same order, and convert the threshold."""
    order = scores.argsort(descending=True, stable=True)
    greatest = 0x7F7FFFFF  # bits of the largest float32; smaller positive numbers have smaller bits
    bits = torch.empty(len(scores), dtype=torch.int32, device="cpu")
    bits[order] = greatest - torch.arange(len(scores), dtype=torch.int32, device="cpu")
    above = int((scores > above_score).sum())
    threshold = torch.tensor(greatest - above, dtype=torch.int32, device="cpu").view(torch.float32)
    return bits.view(torch.float32), float(threshold)


def _load_kernel() -> Callable[..., int]:
    # Imported on first use: Numba takes half a second to import.
    global _suppress, _suppress_few, _few
    log.debug("loading the NMS kernel for the CPU; without Numba's cache it is compiled, which takes about ten seconds")
    started = time.perf_counter()
    # The import creates so many objects that the garbage collector would repeatedly scan all of torch's, which takes
    # a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        from detkit.boxes.kernels.nms_numba import RANK_SORT, suppress, suppress_few
    finally:
        if collecting:
            gc.enable()

    how = "loaded from Numba's cache" if suppress.stats.cache_hits else "compiled"
    log.debug("NMS kernel %s in %.1f s", how, time.perf_counter() - started)
    _suppress, _suppress_few, _few = suppress, suppress_few, RANK_SORT
    return suppress
