"""ONNX export of `torch.ops.detkit.nms`, so that a model including NMS becomes one file that does not need Python.

    torch.onnx.export(model, args, "model.onnx", dynamo=True, custom_translation_table=translation_table())

It needs the extra `export`. The graph consists of standard operators of opset 18, including NonMaxSuppression, and
returns the same indices in the same order as `detkit.boxes.nms`: it sorts the boxes by score, stably and in the scores'
dtype, and passes their ranks to NonMaxSuppression instead.

Unlike `nms` the graph does not check its inputs: the result for values that are not finite is unspecified.

Memory: labels or image_index need a table of G groups (combinations of image and class) x N boxes above the
score_threshold, of 5 bytes per entry: 32 MB for 8 images of 80 classes with 10,000 boxes. max_detections with
image_index needs a table of images x kept boxes, of 17 bytes per entry. N is at most 2**24, float32's largest
consecutive integer.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from detkit.boxes import nms_operator  # noqa: F401  (registers the operator)
from detkit.errors import DetkitError


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the custom_translation_table of torch.onnx.export for a model that calls `nms`.

    The thresholds and max_detections become constants of the graph.

    Raises:
        DetkitError: the extra `export` is not installed.
    """
    if find_spec("onnxscript") is None or find_spec("onnx") is None:
        raise DetkitError("ONNX export needs the packages onnx and onnxscript: pip install 'detkit-vision[export]'.")
    return {torch.ops.detkit.nms.default: _translate}


def _translate(
    boxes: Any,
    scores: Any,
    iou_threshold: Any,
    labels: Any = None,
    image_index: Any = None,
    score_threshold: Any = None,
    max_detections: Any = None,
) -> Any:
    """Translate one `detkit::nms`, where tensors are values of the graph and other arguments numbers."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    labels, image_index = (
        None if key is None else op.Unsqueeze(op.Cast(key, to=ir.DataType.INT64), [1]) for key in (labels, image_index)
    )
    precision = ir.DataType.DOUBLE if scores.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    scores = op.Cast(scores, to=precision)
    scores, order = op.TopK(scores, op.Shape(scores))  # ties by index
    if score_threshold is not None:
        limit = score_threshold if precision == ir.DataType.DOUBLE else np.float32(score_threshold)
        threshold = op.Constant(value=ir.tensor(limit, dtype=precision))
        order = op.Compress(order, op.Greater(scores, threshold))
    count = op.Shape(order)
    ranks = op.Cast(op.Range(op.Squeeze(count), 0, -1), to=ir.DataType.FLOAT)  # N, N - 1, ..., 1
    columns = [column for column in (labels, image_index) if column is not None]
    if columns:
        # One row per group, in which boxes of other groups have rank 0, below the score threshold.
        ranks = op.Where(_members(op.Gather(op.Concat(*columns, axis=1), order)), ranks, 0.0)
    else:
        ranks = op.Unsqueeze(ranks, [0])
    low, high = op.Split(op.Cast(op.Gather(boxes, order), to=ir.DataType.FLOAT), num_outputs=2, axis=1)
    # NonMaxSuppression would reorder inverted corners; for `nms` such a box has no area.
    corners = op.Concat(low, op.Max(low, high), axis=1)
    chosen = op.NonMaxSuppression(
        op.Unsqueeze(corners, [0]), op.Unsqueeze(ranks, [0]), count, _round_down(iou_threshold), 0.5
    )
    positions = op.Gather(chosen, 2, axis=1)
    positions, _ = op.TopK(positions, op.Shape(positions), largest=0)  # from grouped order to descending score
    kept = op.Gather(order, positions)

    if max_detections is not None and image_index is None:
        kept = op.Slice(kept, [0], [max_detections])
    elif max_detections is not None:
        members = _members(op.Gather(image_index, kept))
        counts = op.CumSum(op.Cast(members, to=ir.DataType.INT64), 1)
        within = op.LessOrEqual(op.ReduceMax(op.Where(members, counts, 0), [0], keepdims=0), max_detections)
        kept = op.Compress(kept, within)
    return kept


def _members(keys: Any) -> Any:
    """(G, N) bool from (N, D) int64: row g marks the entries whose keys are the g-th distinct ones, in sorted order."""
    from onnxscript import opset18 as op

    distinct, _, group, _ = op.Unique(keys, axis=0)
    rows = op.Range(0, op.Squeeze(op.Shape(distinct, start=0, end=1)), 1)
    return op.Equal(op.Unsqueeze(group, [0]), op.Unsqueeze(rows, [1]))


def _round_down(threshold: float) -> float:
    """Return the largest float32 not above `threshold`: the same float32 numbers are above either."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))
