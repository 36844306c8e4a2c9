"""Darknet weight files of YOLOv2, YOLOv3 and their tiny variants, with the matching experiment and classes.

Such a file contains no names and no classes; the number of floats, unique to each network here, identifies them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.data.formats.semantic_masks import VOC_NAMES
from detkit.errors import CheckpointError
from detkit.io.tensor_files import FORMATS, file_format
from detkit.published.classes import coco_classes_without_gaps
from detkit.registry import backbones, heads, necks, weight_files
from detkit.structures import ClassList
from detkit.zoo.darknet.weight_file import Unit, convolutions, count_floats, read_floats, take_tensors

CELL = 32
COCO_CLASSES = 80


@dataclass(frozen=True)
class Network:
    """A network published by Darknet, under the name of its .cfg file.

    Args:
        classes: number of classes, 80 (COCO) or 20 (VOC).
        size: height and width of the input in that file.
        backbone, neck, head: parts of the config.
    """

    name: str
    classes: int
    size: int
    backbone: dict[str, Any]
    head: dict[str, Any]
    neck: dict[str, Any] | None = None

    def units(self) -> list[Unit]:
        """Return all convolutions in file order, without allocating their values."""
        with torch.device("meta"):
            backbone = backbones.build(self.backbone, "backbone")
            given = {"channels": backbone.channels, "strides": backbone.strides}
            neck = None
            if self.neck is not None:
                neck = necks.build(self.neck, "neck", **given)
                given = {"channels": neck.channels, "strides": neck.strides}
            head = heads.build(self.head, "head", **given, num_classes=self.classes)
        units = convolutions(backbone, "backbone")
        if neck is None:
            return units + convolutions(head, "head")
        coarsest = len(head.towers) - 1
        for level in range(coarsest, -1, -1):
            if level < coarsest:
                units.append((f"neck.laterals.{level}", neck.laterals[level]))
            units += convolutions(neck.blocks[level], f"neck.blocks.{level}")
            units.append((f"head.towers.{level}", head.towers[level]))
            units.append((f"head.predictors.{level}", head.predictors[level]))
        return units

    def experiment(self) -> Experiment:
        """Return the experiment that would train the network."""
        return Experiment(
            data={"name": "coco" if self.classes == COCO_CLASSES else "voc"},
            backbone=self.backbone,
            neck=self.neck,
            head=self.head,
            input=InputOptions((self.size, self.size), "letterbox", trim_padding=False),
            name=self.name,
        )

    def class_list(self) -> ClassList:
        """Return the classes of COCO or VOC."""
        return coco_classes_without_gaps() if self.classes == COCO_CLASSES else ClassList.from_names(VOC_NAMES)


def _yolov2(*anchors: tuple[float, float], **options: Any) -> dict[str, Any]:
    """Create the options of a YOLOv2 head; its .cfg files give anchors in cells."""
    return {"name": "yolov2", "anchors": [[CELL * width, CELL * height] for width, height in anchors], **options}


DARKNET19 = {"name": "darknet19", "levels": [4, 5]}
DARKNET53 = {"name": "darknet53", "levels": [3, 4, 5]}
COCO_SHAPES = (0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778), (9.77052, 9.16828)
VOC_SHAPES = (1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)
TINY_VOC_SHAPES = (1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52)
# The published weights were trained with anchors 1, 2, 3 on the finer level, not 0, 1, 2 as the .cfg file says today:
# https://github.com/pjreddie/darknet/issues/851
TINY_ANCHORS = [[23, 27], [37, 58], [81, 82], [81, 82], [135, 169], [344, 319]]
NETWORKS = (
    Network("yolov2", 80, 608, DARKNET19, _yolov2(*COCO_SHAPES, reorg="darknet")),
    Network("yolov2-voc", 20, 416, DARKNET19, _yolov2(*VOC_SHAPES, reorg="darknet")),
    Network("yolov2-tiny", 80, 416, {"name": "darknet_tiny", "levels": [5]}, _yolov2(*COCO_SHAPES, width=512, depth=1)),
    Network("yolov2-tiny-voc", 20, 416, {"name": "darknet_tiny", "levels": [5]}, _yolov2(*TINY_VOC_SHAPES, depth=1)),
    Network("yolov3", 80, 608, DARKNET53, {"name": "yolov3"}, {"name": "yolov3_neck"}),
    Network("yolov3-voc", 20, 416, DARKNET53, {"name": "yolov3"}, {"name": "yolov3_neck"}),
    Network(
        "yolov3-tiny",
        80,
        416,
        {"name": "darknet_tiny", "levels": [4, 5]},
        {"name": "yolov3", "anchors": TINY_ANCHORS, "widths": [256, 512]},
        {"name": "yolov3_neck", "widths": [128, 256], "depths": [0, 1]},
    ),
)


@weight_files.register("darknet")
class DarknetFile:
    """A `.weights` file of Darknet's YOLOv2 or YOLOv3."""

    def matches(self, source: str) -> bool:
        """Recognize it by its content, or by its name if the content is not of another known format."""
        kind = file_format(source) if Path(source).expanduser().is_file() else "torch"
        return kind == "darknet" or (source.endswith(".weights") and kind not in FORMATS)

    def read(self, source: str) -> tuple[dict[str, Tensor], Experiment, ClassList]:
        """See `read_darknet`."""
        return read_darknet(source)


def read_darknet(path: str | Path) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Read a Darknet weight file of one of NETWORKS: tensors, experiment and classes.

    Images are letterboxed as usual in detkit, at the top left with grey 114; Darknet centres them on grey 127.

    Raises:
        CheckpointError: the file cannot be read, or its number of floats matches none of NETWORKS.
    """
    floats = read_floats(path)
    counts = {}
    for network in NETWORKS:
        units = network.units()
        counts[network.name] = count_floats(units)
        if counts[network.name] == len(floats):
            return take_tensors(units, floats, path), network.experiment(), network.class_list()
    close = min(counts, key=lambda name: abs(counts[name] - len(floats)))
    raise CheckpointError(
        f"'{path}' holds {len(floats)} floats, which matches no Darknet network that detkit supports. Nearest: "
        f"{close} with {counts[close]}. All of them: {', '.join(counts)}, with the 80 classes of COCO or (-voc) the 20 "
        f"of VOC. Is the file truncated, or was it trained on other classes? For weights of a backbone alone use "
        f"--backbone.weights."
    )
