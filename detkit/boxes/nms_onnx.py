"""ONNX for `torch.ops.detkit.nms`, so that a model and its suppression become one file that needs no Python.

    torch.onnx.export(model, args, "model.onnx", dynamo=True, custom_translation_table=translation_table())

It needs the extra `export`. The graph is made of standard operators of opset 18, NonMaxSuppression among them, and
gives what `detkit.boxes.nms` gives, equal in indices and order: it sorts the boxes by their scores first, in the
dtype they have and stably, and shows NonMaxSuppression their ranks instead.

Unlike `nms` the graph checks nothing: what is not finite has an unspecified result instead of an error.

Memory: labels or image_index make a table of G groups, the images and classes that occur, times N boxes above the
score_threshold, of 5 bytes an entry: 8 images of 80 classes with 10,000 boxes need 32 MB. max_detections with
image_index makes one of images times kept boxes, of 17 bytes. N is at most 2**24, up to which float32 counts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from detkit.boxes import nms_operator  # noqa: F401  (registers the operator)
from detkit.errors import DetkitError


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom_translation_table that torch.onnx.export needs for a model that calls `nms`.

    The thresholds and max_detections become constants of the graph.

    Raises:
        DetkitError: where the extra `export` is not installed.
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
    """The nodes of one `detkit::nms`: tensors are values of the graph, the others numbers. The value of its result."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    labels, image_index = (
        None if key is None else op.Unsqueeze(op.Cast(key, to=ir.DataType.INT64), [1]) for key in (labels, image_index)
    )
    precision = ir.DataType.DOUBLE if scores.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    scores = op.Cast(scores, to=precision)
    scores, order = op.TopK(scores, op.Shape(scores))  # equal scores come by index
    if score_threshold is not None:
        limit = score_threshold if precision == ir.DataType.DOUBLE else np.float32(score_threshold)
        threshold = op.Constant(value=ir.tensor(limit, dtype=precision))
        order = op.Compress(order, op.Greater(scores, threshold))
    count = op.Shape(order)
    ranks = op.Cast(op.Range(op.Squeeze(count), 0, -1), to=ir.DataType.FLOAT)  # N, N - 1, ..., 1
    columns = [column for column in (labels, image_index) if column is not None]
    if columns:
        # A row for each group, in which the boxes of others have rank 0: below the threshold, they take no part.
        ranks = op.Where(_members(op.Gather(op.Concat(*columns, axis=1), order)), ranks, 0.0)
    else:
        ranks = op.Unsqueeze(ranks, [0])
    low, high = op.Split(op.Cast(op.Gather(boxes, order), to=ir.DataType.FLOAT), num_outputs=2, axis=1)
    # NonMaxSuppression would put swapped corners in order; for `nms` such a box has no area.
    corners = op.Concat(low, op.Max(low, high), axis=1)
    chosen = op.NonMaxSuppression(
        op.Unsqueeze(corners, [0]), op.Unsqueeze(ranks, [0]), count, _round_down(iou_threshold), 0.5
    )
    places = op.Gather(chosen, 2, axis=1)
    places, _ = op.TopK(places, op.Shape(places), largest=0)  # from group by group to best first
    kept = op.Gather(order, places)

    if max_detections is not None and image_index is None:
        kept = op.Slice(kept, [0], [max_detections])
    elif max_detections is not None:
        members = _members(op.Gather(image_index, kept))
        counts = op.CumSum(op.Cast(members, to=ir.DataType.INT64), 1)
        within = op.LessOrEqual(op.ReduceMax(op.Where(members, counts, 0), [0], keepdims=0), max_detections)
        kept = op.Compress(kept, within)
    return kept


def _members(keys: Any) -> Any:
    """(G, N) bool of (N, D) int64: row g is true for those whose keys are the g-th of those that occur, in order."""
    from onnxscript import opset18 as op

    distinct, _, group, _ = op.Unique(keys, axis=0)
    rows = op.Range(0, op.Squeeze(op.Shape(distinct, start=0, end=1)), 1)
    return op.Equal(op.Unsqueeze(group, [0]), op.Unsqueeze(rows, [1]))


def _round_down(threshold: float) -> float:
    """The largest float32 not above it: a float32 is above the one just when it is above the other."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))
