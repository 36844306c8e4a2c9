"""Non-maximum suppression: one call for every image and class of a batch."""

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

# The kernels, once they are loaded, and how many boxes the one for few takes.
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
    """Exact greedy non-maximum suppression, apart for each image and class.

    Takes the box with the highest score, removes all of the same image and class whose IoU with it is above
    `iou_threshold`, and repeats. Equal to torchvision.ops.nms on each image and class, equal scores included:
    there the box that comes first goes first. Boxes without area suppress nothing and are never suppressed.
    The work is bounded by nothing but the number of boxes; there is no time limit.

    On an NVIDIA GPU it is computed there, by torchvision's kernel. detkit's own, which need numba-cuda and do not wait
    for the device but for the number of kept boxes, are used if the environment variable DETKIT_GPU_KERNELS is 1: they
    have passed their tests in a simulator, but were not run on a GPU yet. On other devices it
    is computed on the CPU, and the result returns to the device. It passes through torch.compile and torch.export
    as the operator `detkit::nms`.

    Args:
        boxes: (N, 4) xyxy pixels of any float dtype, computed in float32.
        scores: (N,) of any float dtype.
        iou_threshold: in 0..1.
        labels: (N,) integers; boxes of different labels do not suppress each other. None: all one class.
        image_index: (N,) integers, which image of the batch each box is of. None: all one image.
        score_threshold: only scores above it (not equal to it) take part. None: all.
        max_detections: the most kept boxes of each image, those with the highest scores. None: all.

    Returns:
        (K,) int64 indices into `boxes` on its device, best score first over all images, ties by index.

    Raises:
        ValueError: for wrong shapes, dtypes, devices or thresholds, and for boxes or scores that are not
            finite, by name: "scores[17] is nan".
    """
    # A tracer's tensors, or of a subclass that knows torch's operators.
    if (
        type(boxes) is not Tensor or type(scores) is not Tensor
        or is_dynamo_compiling() or _len_torch_dispatch_stack() or _get_tracing_state()
    ):  # fmt: skip
        return _through_operator(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    # Of few boxes most of the time goes into the checks: the plainest call takes the shortest way.
    if (
        labels is None and image_index is None and score_threshold is None and max_detections is None
        and boxes.dtype is _FLOAT32 and scores.dtype is _FLOAT32 and boxes.is_cpu and scores.is_cpu
        and boxes.is_contiguous() and scores.is_contiguous()
        and type(iou_threshold) is float and 0.0 <= iou_threshold <= 1.0
    ):  # fmt: skip
        shape = scores.shape
        if len(shape) == 1 and (count := shape[0]) <= _few and boxes.shape == (count, 4):
            # NumPy makes an empty array, and shortens it, in a third of torch's time.
            result = _empty(count, _INT64)
            try:
                kept = _suppress_few(boxes.data_ptr(), scores.data_ptr(), iou_threshold, result)
            except RuntimeError:
                kept = -1  # in a transform of torch.func tensors have no memory
            if kept >= 0:
                return _from_numpy(result[:kept])
    if peek_interpreter_stack() is not None:  # a transform of torch.func
        return _through_operator(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    return eager_nms(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)


def _through_operator(boxes: Tensor, *arguments: Any) -> Tensor:
    if not (isinstance(boxes, Tensor) and isinstance(arguments[0], Tensor)):
        return eager_nms(boxes, *arguments)  # which says what is wrong
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
    """`nms` of tensors that hold values, of any dtype, layout and device; see there."""
    check_candidates(boxes, scores, labels=labels, image_index=image_index)
    check_thresholds(iou_threshold, max_detections, score_threshold)
    if boxes.is_cuda:
        return _on_gpu(boxes, scores, iou_threshold, labels, image_index, score_threshold, max_detections)
    device = boxes.device
    if device.type != "cpu":
        log.debug("nms of %d boxes on %s is computed on the CPU", len(boxes), device)
    boxes = _ready(boxes, torch.float32)
    # Not less precise than they are: rounding could make scores equal and change their order.
    scores = _ready(scores, torch.float64 if scores.dtype is torch.float64 else torch.float32)
    above_score = -math.inf if score_threshold is None else float(score_threshold)
    if scores.dtype == torch.float32:
        # Rounded, as torch does where it compares float32 scores with a number.
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
    """The kernel's call: contiguous float32 boxes and scores, int64 labels and images, all on the CPU."""
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
        # A slice would keep the memory of all.
        return torch.from_numpy(result[:kept] if 2 * kept > count else result[:kept].copy())
    check_finite(boxes, "boxes")
    check_finite(scores, "scores")
    # Labels or images such as 2^40: numbered anew. An image's limit is applied afterwards.
    groups = _dense_groups([key for key in (labels, image_index) if key is not None])
    found = _run_kernel(boxes, scores, iou_threshold, groups, None, above_score, len(boxes))
    return first_of_each_image(found, image_index, limit)


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as the kernel reads it: of this dtype, on the CPU, without gaps."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().to("cpu", dtype).contiguous().resolve_neg()


def _memory(count: int) -> np.ndarray:
    """What the kernel works in; kept by each thread from call to call, up to KEPT_WORDS."""
    from detkit.boxes.kernels.nms_numba import words_needed

    words = words_needed(count)
    memory: np.ndarray = getattr(_thread, "memory", _NO_MEMORY)
    if len(memory) < words:
        memory = np.empty(words, dtype=np.float32)
        if words <= KEPT_WORDS:
            _thread.memory = memory
    return memory


def _dense_groups(keys: list[Tensor]) -> Tensor:
    """(N,) int64 in 0..N-1, equal where all keys are equal."""
    groups = keys[0].unique(return_inverse=True)[1]
    for key in keys[1:]:
        numbered = key.unique(return_inverse=True)[1]
        groups = (groups * (numbered.max() + 1) + numbered).unique(return_inverse=True)[1]
    return groups


def _ranked(scores: Tensor, above_score: float) -> tuple[Tensor, float]:
    """Float32 scores in the same order as the float64 ones, and the threshold for them: consecutive float32 numbers."""
    order = scores.argsort(descending=True, stable=True)
    greatest = 0x7F7FFFFF  # the bits of the greatest float32; lesser positive ones have lesser bits
    bits = torch.empty(len(scores), dtype=torch.int32, device="cpu")
    bits[order] = greatest - torch.arange(len(scores), dtype=torch.int32, device="cpu")
    above = int((scores > above_score).sum())
    threshold = torch.tensor(greatest - above, dtype=torch.int32, device="cpu").view(torch.float32)
    return bits.view(torch.float32), float(threshold)


def _load_kernel() -> Callable[..., int]:
    # Numba takes half a second to import: whoever never suppresses does not wait for it.
    global _suppress, _suppress_few, _few
    log.debug("loading the NMS kernel for the CPU; without Numba's cache it is compiled, some ten seconds")
    started = time.perf_counter()
    # The import makes so many objects that the garbage collector would look through all of torch's again and again,
    # for a third of the time.
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
