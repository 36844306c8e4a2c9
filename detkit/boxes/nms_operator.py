"""`torch.ops.detkit.nms`: NMS as one opaque operator, for torch.compile, torch.export and make_fx.

Tracers cannot see into the kernels of `detkit.boxes.nms`. When traced, `nms` calls this operator, so that the graph
contains a single node with the same result on the same device. Eager calls do not use it, since torch's dispatcher
takes some microseconds.

A graph with this node needs Python and detkit: import this module before torch.export.load. For use without Python see
`detkit.boxes.nms_onnx`.
"""

import torch
from torch import Tensor

from detkit.boxes.candidates import check_thresholds
from detkit.boxes.nms import eager_nms

torch.library.define(
    "detkit::nms",
    "(Tensor boxes, Tensor scores, float iou_threshold, Tensor? labels=None, Tensor? image_index=None, "
    "float? score_threshold=None, int? max_detections=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Not `nms`, which may call the operator again: tracers also run it on tensors with values.
torch.library.impl("detkit::nms", "default", eager_nms)


@torch.library.register_fake("detkit::nms")
def _fake_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    image_index: Tensor | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Tensor:
    """(K,) int64 without values, where K is a new symbol in 0..N."""
    check_thresholds(iou_threshold, max_detections, score_threshold)
    if boxes.ndim != 2 or not boxes.is_floating_point():
        raise ValueError(f"boxes must be (N, 4) of a float dtype, but got {tuple(boxes.shape)} {boxes.dtype}")
    torch._check_value(boxes.shape[1] == 4, lambda: f"boxes must be (N, 4), but got {tuple(boxes.shape)}")
    for name, tensor in {"scores": scores, "labels": labels, "image_index": image_index}.items():
        if tensor is not None:
            _check_column(tensor, name, boxes)
    kept = torch.library.get_ctx().new_dynamic_size()
    torch._check(kept <= boxes.shape[0])
    return boxes.new_empty(kept, dtype=torch.int64)


def _check_column(tensor: Tensor, name: str, boxes: Tensor) -> None:
    """Raise ValueError unless scores, labels or image_index are (N,) of a valid dtype."""
    if tensor.ndim != 1 or tensor.is_floating_point() != (name == "scores"):
        what = "of a float dtype" if name == "scores" else "integers"
        raise ValueError(f"{name} must be (N,) {what}, but got {tuple(tensor.shape)} {tensor.dtype}")
    # Not an `if`, which fails for data-dependent lengths, such as those of masked tensors.
    torch._check_value(tensor.shape[0] == boxes.shape[0], lambda: f"{name} must be as long as boxes")
