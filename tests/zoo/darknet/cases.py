"""Darknet's networks and YOLOv1 to v3 in the tests of the core."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Generator, Tensor, randn

from detkit.zoo.darknet.yolo_grid import GridOutputs, lay_grid, predicted_boxes
from detkit.zoo.darknet.yolov2 import YOLOv2
from detkit.zoo.darknet.yolov3 import YOLOv3

HEAD_MAPS = dict.fromkeys(("yolov1", "yolov2", "yolov3"), ((8, 12), (8, 16)))
HEAD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "yolov1": [
        {"hidden": 32, "dropout": 0.0},
        {"grid": 4, "boxes": 3, "layers": "convolution", "hidden": 16, "dropout": 0.0},
    ],
    "yolov2": [
        {"width": 16, "passthrough": 4},
        {
            "width": 16,
            "passthrough": 4,
            "reorg": "darknet",
            "depth": 1,
            "rescore": False,
            "anchors": [[9, 9], [40, 20]],
        },
    ],
    "yolov3": [{}, {"anchors": [[9, 9], [40, 20]], "widths": [12, 20], "ignore_above": 0.3}],
}

# Backbone, neck and head for raw outputs through ONNX.
TWO_MAPS = "{name: darknet_tiny, levels: [3, 4], widths: [4, 8, 8, 8, 16, 8, 8]}"
ONE_MAP = "{name: darknet_tiny, levels: [4], widths: [4, 8, 8, 8, 16, 8, 8]}"
EXPORTED = {
    "yolov1": (ONE_MAP, None, "{name: yolov1, grid: 2, hidden: 16}"),
    "yolov1 of an uneven grid": (ONE_MAP, None, "{name: yolov1, grid: 5, layers: convolution, hidden: 16}"),
    "yolov2": (TWO_MAPS, None, "{name: yolov2, width: 8, passthrough: 4}"),
    "yolov2 as in darknet": (TWO_MAPS, None, "{name: yolov2, width: 8, passthrough: 4, reorg: darknet}"),
    "yolov3": (TWO_MAPS, "{name: yolov3_neck, widths: [8, 8], depths: [1]}", "{name: yolov3, widths: [8, 8]}"),
}

# Backbone, neck and head that learn eight images of blood cells.
CELLS = "{name: darknet_tiny, levels: [3, 4], widths: [12, 24, 48, 64, 96, 96, 96]}"
LEARNING = {
    "yolov1": (
        "{name: darknet_tiny, levels: [4], widths: [12, 24, 48, 64, 96, 8, 8]}",
        "null",
        "{name: yolov1, grid: 7, hidden: 512, dropout: 0.0}",
    ),
    "yolov2": (CELLS, "null", "{name: yolov2, width: 96, passthrough: 16, anchors: [[20, 20], [50, 50], [80, 80]]}"),
    "yolov3": (
        CELLS,
        "{name: yolov3_neck, widths: [48, 64], depths: [1]}",
        "{name: yolov3, anchors: [[15, 15], [25, 25], [40, 40], [50, 50], [65, 65], [90, 90]]}",
    ),
    "retinanet on darknet": (
        CELLS,
        "{name: fpn, width: 64, norm: true}",
        "{name: retinanet, depth: 1, norm: true, anchors: {name: pyramid, sizes: [[16, 24, 36], [48, 64, 90]]}}",
    ),
}

# Options of models whose head allows padding to be trimmed.
TRIMMED = {
    "yolov2": ["--backbone", "{name: darknet_tiny, levels: [3, 4], widths: [4, 8, 8, 8, 8, 8, 8]}"],
    "yolov3": [
        *("--backbone", "{name: darknet_tiny, levels: [3, 4, 5], widths: [4, 8, 8, 8, 8, 8, 8]}"),
        *("--neck", "{name: yolov3_neck, widths: [8, 8, 8], depths: [1]}"),
    ],
}
OPTIMISED = {"yolov2": ["--backbone", "{name: darknet_tiny}", "--head", "{name: yolov2}"]}

WEIGHT_READERS = {"darknet": "detkit.zoo.darknet.backbones.read_floats"}


def weights_file(path: Path) -> tuple[Path, tuple[bytes, ...]]:
    """Where a file of Darknet's weights is fuzzed, and the beginnings of two valid ones."""
    floats = np.zeros(300, dtype="<f4").tobytes()
    seeds = (struct.pack("<3iq", 0, 2, 0, 32013312) + floats, struct.pack("<3ii", 0, 1, 0, 0) + floats)
    return path / "yolov3.weights", seeds


FUZZED_WEIGHTS = {"darknet": weights_file}

SIZE = (64, 96)


def grid(head: Any, regime: float, generator: Generator) -> GridOutputs:
    maps = ((2, 3),) if isinstance(head, YOLOv2) else ((8, 12), (4, 6))
    cells, anchors = lay_grid(maps, SIZE, head.anchors)
    values = 2 * randn(2, len(cells), 10, generator=generator)
    values[..., 4] -= regime
    return GridOutputs(values, cells, anchors, maps, SIZE, (SIZE, (60, 80)))


def yolov2(regime: float, generator: Generator) -> tuple[YOLOv2, Any, Callable[..., Any]]:
    head = YOLOv2([4], [32], 5, width=4)

    def plain(o: GridOutputs, i: int) -> tuple[Tensor, Tensor]:
        scores = o.values[i, :, 4:5].sigmoid() * o.values[i, :, 5:].softmax(1)
        return scores, predicted_boxes(o.values[i], o.cells, o.anchors)

    return head, grid(head, regime, generator), plain


def yolov3(regime: float, generator: Generator) -> tuple[YOLOv3, Any, Callable[..., Any]]:
    head = YOLOv3([4, 4], [16, 32], 5, widths=(4, 4))

    def plain(o: GridOutputs, i: int) -> tuple[Tensor, Tensor]:
        scores = o.values[i, :, 4:5].sigmoid() * o.values[i, :, 5:].sigmoid()
        return scores, predicted_boxes(o.values[i], o.cells, o.anchors)

    return head, grid(head, regime, generator), plain


# Heads with random outputs and a plain computation of their scores and boxes; the field of their logits.
POSTPROCESSED = {"yolov2": (yolov2, "values"), "yolov3": (yolov3, "values")}
