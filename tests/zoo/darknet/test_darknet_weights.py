"""Darknet's .weights files: written by a plain writer from the layers of the .cfg files, and read back.

The networks are listed here as their .cfg files have them, layer by layer, and run by plain functions; detkit's own
modules take no part in that.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import detkit
from detkit.config import experiment_from_dict, experiment_to_dict
from detkit.data.formats.shapes import Shapes
from detkit.errors import CheckpointError
from detkit.model import Model, build_model, load_model
from detkit.structures import ClassList
from detkit.zoo.darknet.converter import NETWORKS
from detkit.zoo.darknet.yolo_grid import predicted_boxes

Layer = tuple[Any, ...]


def conv(filters: int, size: int, stride: int = 1) -> Layer:
    return ("convolutional", filters, size, stride, True)


def linear(filters: int) -> Layer:
    return ("convolutional", filters, 1, 1, False)


def residuals(filters: int, count: int) -> list[Layer]:
    return [conv(filters, 3, 2)] + count * [conv(filters // 2, 1), conv(filters, 3), ("shortcut", -3)]


POOL = ("maxpool", 2, 2)
TINY = [
    conv(16, 3), POOL, conv(32, 3), POOL, conv(64, 3), POOL, conv(128, 3), POOL, conv(256, 3), POOL, conv(512, 3),
    ("maxpool", 2, 1), conv(1024, 3),
]  # fmt: skip
DARKNET19 = [
    conv(32, 3), POOL, conv(64, 3), POOL, conv(128, 3), conv(64, 1), conv(128, 3), POOL, conv(256, 3), conv(128, 1),
    conv(256, 3), POOL, conv(512, 3), conv(256, 1), conv(512, 3), conv(256, 1), conv(512, 3), POOL, conv(1024, 3),
    conv(512, 1), conv(1024, 3), conv(512, 1), conv(1024, 3),
]  # fmt: skip
DARKNET53 = [
    conv(32, 3), *residuals(64, 1), *residuals(128, 2), *residuals(256, 8), *residuals(512, 8), *residuals(1024, 4),
]  # fmt: skip
V2_ANCHORS = [0.57273, 0.677385, 1.87446, 2.06253, 3.33843, 5.47434, 7.88282, 3.52778, 9.77052, 9.16828]
V2_VOC_ANCHORS = [1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071]
V2_TINY_VOC_ANCHORS = [1.08, 1.19, 3.42, 4.41, 6.63, 11.38, 9.42, 5.11, 16.62, 10.52]
V3_ANCHORS = [10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326]
V3_TINY_ANCHORS = [10, 14, 23, 27, 37, 58, 81, 82, 135, 169, 344, 319]


def yolov2(outputs: int) -> list[Layer]:
    return [
        *DARKNET19, conv(1024, 3), conv(1024, 3), ("route", -9), conv(64, 1), ("reorg",), ("route", -1, -4),
        conv(1024, 3), linear(outputs), ("detection",),
    ]  # fmt: skip


def yolov3(outputs: int) -> list[Layer]:
    def five(filters: int) -> list[Layer]:
        return [conv(filters, 1), conv(2 * filters, 3)] * 2 + [conv(filters, 1)]

    return [
        *DARKNET53, *five(512), conv(1024, 3), linear(outputs), ("detection",),
        ("route", -4), conv(256, 1), ("upsample",), ("route", -1, 61), *five(256), conv(512, 3), linear(outputs),
        ("detection",),
        ("route", -4), conv(128, 1), ("upsample",), ("route", -1, 36), *five(128), conv(256, 3), linear(outputs),
        ("detection",),
    ]  # fmt: skip


LAYERS: dict[str, list[Layer]] = {
    "yolov2": yolov2(425),
    "yolov2-voc": yolov2(125),
    "yolov2-tiny": [*TINY, conv(512, 3), linear(425), ("detection",)],
    "yolov2-tiny-voc": [*TINY, conv(1024, 3), linear(125), ("detection",)],
    "yolov3": yolov3(255),
    "yolov3-voc": yolov3(75),
    "yolov3-tiny": [
        *TINY, conv(256, 1), conv(512, 3), linear(255), ("detection",),
        ("route", -4), conv(128, 1), ("upsample",), ("route", -1, 8), conv(256, 3), linear(255), ("detection",),
    ],
}  # fmt: skip
# (pixels that an anchor of 1 stands for, all anchors, those of each detection layer)
ANCHORS: dict[str, tuple[int, list[float], list[list[int]]]] = {
    "yolov2": (32, V2_ANCHORS, [[0, 1, 2, 3, 4]]),
    "yolov2-voc": (32, V2_VOC_ANCHORS, [[0, 1, 2, 3, 4]]),
    "yolov2-tiny": (32, V2_ANCHORS, [[0, 1, 2, 3, 4]]),
    "yolov2-tiny-voc": (32, V2_TINY_VOC_ANCHORS, [[0, 1, 2, 3, 4]]),
    "yolov3": (1, V3_ANCHORS, [[6, 7, 8], [3, 4, 5], [0, 1, 2]]),
    "yolov3-voc": (1, V3_ANCHORS, [[6, 7, 8], [3, 4, 5], [0, 1, 2]]),
    "yolov3-tiny": (1, V3_TINY_ANCHORS, [[3, 4, 5], [1, 2, 3]]),
}
SIZES = {name: 608 if name in ("yolov2", "yolov3") else 416 for name in LAYERS}
# bytes of the files at pjreddie.com, header and all
KNOWN_BYTES = {"yolov3": 248_007_048, "yolov3-tiny": 35_434_956}


def shapes(layers: list[Layer]) -> Iterator[tuple[int, int, int, bool]]:
    """(channels in, filters, size, batch norm) of each convolution, in order."""
    channels: list[int] = []
    current = 3
    for number, layer in enumerate(layers):
        if layer[0] == "convolutional":
            yield current, layer[1], layer[2], layer[4]
            current = layer[1]
        elif layer[0] == "route":
            current = sum(channels[source if source >= 0 else number + source] for source in layer[1:])
        elif layer[0] == "reorg":
            current *= 4
        channels.append(current)


def random_weights(layers: list[Layer], seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    found = []
    for channels, filters, size, norm in shapes(layers):
        part = {"biases": random.normal(0, 0.1, filters)}
        if norm:
            part["scales"] = random.uniform(0.7, 1.3, filters)
            part["means"] = random.normal(0, 0.1, filters)
            part["variances"] = random.uniform(0.5, 1.5, filters)
        spread = np.float32(math.sqrt(2 / (channels * size * size)))
        part["weights"] = random.standard_normal((filters, channels, size, size), dtype=np.float32) * spread
        found.append({name: values.astype(np.float32) for name, values in part.items()})
    return found


def write(path: Path, weights: list[dict[str, np.ndarray]], version: tuple[int, int] = (0, 2)) -> Path:
    with path.open("wb") as file:
        file.write(struct.pack("<3i", *version, 0))
        file.write(struct.pack("<Q" if version >= (0, 2) else "<I", 32_013_312))
        for part in weights:
            for name in ("biases", "scales", "means", "variances", "weights"):
                if name in part:
                    file.write(part[name].tobytes())
    return path


def reorg(features: Tensor) -> Tensor:
    """Darknet's src/blas.c: out[k, j, i] = in[k % part, 2 j + k / part / 2, 2 i + k / part % 2], memory taken flat."""
    _, channels, rows, columns = features.shape
    part = channels // 4
    wide = features.reshape(part, rows * 2, columns * 2)
    parts = [wide[:, offset // 2 :: 2, offset % 2 :: 2] for offset in range(4)]
    return torch.cat(parts).reshape(1, channels * 4, rows // 2, columns // 2)


def forward(layers: list[Layer], weights: list[dict[str, np.ndarray]], image: Tensor) -> list[Tensor]:
    """What enters each detection layer, (1, filters, h, w)."""
    outputs: list[Tensor] = []
    detections = []
    current = image
    convolutions = iter(weights)
    for number, layer in enumerate(layers):
        match layer[0]:
            case "convolutional":
                part = {name: torch.from_numpy(values) for name, values in next(convolutions).items()}
                current = F.conv2d(current, part["weights"], stride=layer[3], padding=layer[2] // 2)
                if layer[4]:
                    mean, variance, scale = (part[name].view(1, -1, 1, 1) for name in ("means", "variances", "scales"))
                    current = (current - mean) / torch.sqrt(variance + 1e-5) * scale
                current = current + part["biases"].view(1, -1, 1, 1)
                if layer[4]:
                    current = torch.where(current > 0, current, 0.1 * current)
            case "maxpool":
                padded = F.pad(current, (0, 1, 0, 1), value=-1e30) if layer[2] == 1 else current
                current = F.max_pool2d(padded, layer[1], layer[2])
            case "shortcut":
                current = current + outputs[number + layer[1]]
            case "route":
                current = torch.cat([outputs[source if source >= 0 else number + source] for source in layer[1:]], 1)
            case "upsample":
                current = current.repeat_interleave(2, 2).repeat_interleave(2, 3)
            case "reorg":
                current = reorg(current)
            case "detection":
                detections.append(current)
        outputs.append(current)
    return detections


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("name", ["yolov2-voc", "yolov2-tiny", "yolov2-tiny-voc", "yolov3", "yolov3-tiny"])
def test_outputs_equal_a_plain_forward(name: str, folder: Path) -> None:
    layers = LAYERS[name]
    weights = random_weights(layers, seed=len(name))
    size = (96, 64)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))
    # Of what the last convolutions see, 23 residual blocks make far too much for an exponential.
    last = [part for part in weights if "scales" not in part]
    for part, raw in zip(last, forward(layers, weights, image)):
        part["weights"] /= float(raw.std())
    path = write(folder / "any.weights", weights)
    assert name not in KNOWN_BYTES or path.stat().st_size == KNOWN_BYTES[name]
    model = load_model(path)
    path.unlink()  # pytest keeps the folders of three runs, and this is up to 250 MB
    with torch.no_grad():
        expected = forward(layers, weights, image)
        outputs = model(image, (size,))
    boxes = predicted_boxes(outputs.values[0], outputs.cells, outputs.anchors)
    unit, anchors, masks = ANCHORS[name]
    start = len(outputs.cells)
    # Darknet's coarsest level comes first, detkit's last.
    for raw, mask in zip(expected, masks):
        rows, columns = raw.shape[-2:]
        start -= rows * columns * len(mask)
        values = raw[0].reshape(len(mask), -1, rows, columns).permute(2, 3, 0, 1)
        assert 0.5 < values.std() < 2
        mine = outputs.values[0, start : start + rows * columns * len(mask)].reshape(values.shape)
        torch.testing.assert_close(mine, values, rtol=1e-3, atol=1e-3)
        for place, (row, column, a) in enumerate(np.ndindex(rows, columns, len(mask))):
            tx, ty, tw, th = values[row, column, a, :4].tolist()
            width = anchors[2 * mask[a]] * unit * math.exp(tw)
            height = anchors[2 * mask[a] + 1] * unit * math.exp(th)
            x = (column + 1 / (1 + math.exp(-tx))) * size[1] / columns
            y = (row + 1 / (1 + math.exp(-ty))) * size[0] / rows
            plain = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            torch.testing.assert_close(boxes[start + place], plain, rtol=1e-3, atol=2e-2)
    assert start == 0


def test_every_network_is_told_by_its_floats() -> None:
    """No two have the same number, and each has that of its .cfg file."""
    counts = {}
    for network in NETWORKS:
        units = [tuple(tensor.shape) for _, module in network.units() for tensor in module.parameters()]
        numbers = sum(math.prod(shape) for shape in units)
        # the running means and variances are no parameters
        numbers += sum(2 * filters for _, filters, _, norm in shapes(LAYERS[network.name]) if norm)
        counts[network.name] = numbers
    expected = {
        name: sum(
            filters * (channels * size**2 + (4 if norm else 1)) for channels, filters, size, norm in shapes(layers)
        )
        for name, layers in LAYERS.items()
    }
    assert counts == expected
    assert len(set(counts.values())) == len(counts)


@pytest.fixture(scope="module")
def tiny_file(folder: Path) -> Path:
    return write(folder / "yolov3-tiny.weights", random_weights(LAYERS["yolov3-tiny"], seed=1))


def test_a_predictor_from_a_file(tiny_file: Path) -> None:
    detector = detkit.load(tiny_file, device="cpu")
    found = detector.predict(Shapes("val", val_count=1, size=160)[0].image, conf=0.1)
    assert len(found) > 0
    assert detector.class_names[:3] == ("person", "bicycle", "car")
    assert len(detector.class_names) == 80
    classes = detector.model.classes
    assert classes.raw_ids[-1] == 90
    assert (classes.names[11], classes.raw_ids[11]) == ("stop sign", 13)
    assert (detector.model.fit.size, detector.model.fit.resize) == ((416, 416), "letterbox")


def test_command_line(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from detkit.cli import main

    image = tmp_path / "a.png"
    Image.fromarray(Shapes("val", val_count=1, size=96)[0].image).save(image)
    arguments = [
        "infer",
        str(tiny_file),
        "--source",
        str(image),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.json").is_file()


def test_old_header(tiny_file: Path, tmp_path: Path) -> None:
    """Before version 0.2 the images seen take 32 bits."""
    old = write(tmp_path / "old.weights", random_weights(LAYERS["yolov3-tiny"], seed=1), version=(0, 1))
    assert old.stat().st_size == tiny_file.stat().st_size - 4
    first, second = load_model(old), load_model(tiny_file)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_training_starts_from_a_file(tiny_file: Path) -> None:
    """On other classes from backbone and neck."""
    experiment = experiment_to_dict(load_model(tiny_file).experiment)
    experiment |= {"weights": str(tiny_file), "weights_parts": ["backbone", "neck"]}
    model = build_model(experiment_from_dict(experiment), ClassList.from_names(["cell"]))
    loaded = load_model(tiny_file)
    assert torch.equal(model.neck.blocks[1][0][0].weight, loaded.neck.blocks[1][0][0].weight)  # type: ignore
    assert model.head.predictors[0].weight.shape[0] == 18  # type: ignore


def test_a_model_from_a_file_can_be_saved(tiny_file: Path, tmp_path: Path) -> None:
    model = load_model(tiny_file)
    model.save(tmp_path / "model.safetensors")
    again: Model = load_model(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.classes == model.classes


def test_a_file_that_fits_none_is_refused(tmp_path: Path) -> None:
    one_class = [*LAYERS["yolov3-tiny"]]
    one_class[15], one_class[22] = linear(18), linear(18)
    path = write(tmp_path / "yolov3-tiny_cells.weights", random_weights(one_class, seed=0))
    with pytest.raises(
        CheckpointError, match=r"cells\.weights' holds 8676244 floats.*Nearest: yolov3-tiny with 8858734"
    ):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*missing\.weights"):
        load_model(tmp_path / "missing.weights")


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_experiments_are_those_of_the_cfg_files(network: Any) -> None:
    experiment = network.experiment()
    assert experiment_from_dict(experiment_to_dict(experiment)) == experiment
    assert experiment.input.size == (SIZES[network.name],) * 2
    assert len(network.class_list()) == (20 if "voc" in network.name else 80)
