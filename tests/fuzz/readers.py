"""Every entrance for a file: how to lay out a valid case, which file of it to damage, and how detkit reads it."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo_cases import zoo_cases

from detkit.data.image import check_image, read_image
from detkit.registry import datasets

Read = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One file that is damaged.

    Args:
        path: the file.
        seeds: valid contents of it.
        read: reads it as a user's command would; raises a DetkitError where it is not valid.
    """

    path: Path
    seeds: tuple[bytes, ...]
    read: Read


def encoded(format_name: str, mode: str = "RGB", side: int = 24, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (side, side + 8, 3), dtype=np.uint8)).convert(mode)
    stream = BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def with_exif(format_name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(format_name, exif=exif)


def images(folder: Path) -> Case:
    formats = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "TGA", "PPM", "JPEG2000", "ICO", "DDS", "EPS", "PCX", "SGI"]
    seeds = [encoded(name) for name in formats]
    seeds += [encoded("PNG", "P"), encoded("PNG", "I;16"), encoded("PNG", "LA"), encoded("JPEG", "CMYK")]
    seeds += [with_exif("JPEG"), with_exif("PNG"), with_exif("TIFF"), encoded("JPEG", progressive=True)]
    path = folder / "image"

    def read() -> None:
        size = check_image(path, decode=True)
        image = read_image(path)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8

    return Case(path, tuple(seeds), read)


def visit(dataset: Any) -> None:
    for index in range(len(dataset)):
        sample = dataset[index]
        boxes, size = sample.target.boxes, sample.image.shape[:2]
        assert torch.isfinite(boxes).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([size[1], size[0]])).all()
        assert (sample.target.labels < len(dataset.classes)).all()
    dataset.problems.summary()


def reader(options: dict[str, Any], policies: tuple[str, ...] = ("fail", "repair", "skip"), **injected: Any) -> Read:
    """Opens a data set under each policy; an error of one does not keep the next from being tried."""

    def read() -> None:
        errors = []
        for policy in policies:
            try:
                visit(datasets.build({**options, "broken": policy}, "data", split="train", **injected))
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return read


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


XML = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE annotation [<!ENTITY lol "cat">]>
<annotation><filename>a.jpg</filename><size><width>32</width><height>24</height><depth>3</depth></size>
<object><name>&lol;</name><difficult>0</difficult>
<bndbox><xmin>2</xmin><ymin>3.5</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult><truncated>0</truncated>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>24</ymax></bndbox></object></annotation>
"""


PLAIN_XML = XML.replace('<!DOCTYPE annotation [<!ENTITY lol "cat">]>\n', "").replace("&lol;", "cat")


def voc(folder: Path) -> Case:
    write(folder / "JPEGImages" / "a.jpg", encoded("JPEG"))
    write(folder / "ImageSets" / "Main" / "train.txt", "a\n")
    path = folder / "Annotations" / "a.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Case(path, (PLAIN_XML.encode(), XML.encode()), reader({"name": "voc", "root": str(folder)}))


def voc_list(folder: Path) -> Case:
    voc(folder)
    write(folder / "Annotations" / "a.xml", PLAIN_XML)
    path = folder / "ImageSets" / "Main" / "train.txt"
    return Case(path, (b"a\n", b"a 1\nb -1\n", b"a\r\n"), reader({"name": "voc", "root": str(folder)}))


def coco_content() -> dict[str, Any]:
    annotation = {"image_id": 1, "category_id": 7, "iscrowd": 0, "area": 90.5, "bbox": [2, 3, 10, 9.5]}
    points = {"keypoints": [3, 4, 2, 0, 0, 0], "num_keypoints": 1}
    crowd = {**annotation, "iscrowd": 1, "segmentation": {"counts": [100, 60, 608], "size": [24, 32]}}
    counts = pycocotools.mask.frPyObjects(crowd["segmentation"], 24, 32)["counts"]
    packed = {**annotation, "segmentation": {"counts": counts.decode(), "size": [24, 32]}}
    return {
        "info": {},
        "images": [{"id": 1, "file_name": "a.jpg", "width": 32, "height": 24}],
        "categories": [{"id": 7, "name": "cat", "keypoints": ["nose", "tail"]}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, **annotation, **points, "segmentation": [[2, 3, 12, 3, 12, 12.5, 2, 12.5]]},
            {"id": 2, **crowd, **points},
            {"id": 3, **packed, **points, "attributes": {"rotation": 30.0}},
        ],
    }


def coco(folder: Path, **needs: bool) -> Case:
    write(folder / "train" / "a.jpg", encoded("JPEG"))
    path = folder / "annotations" / "instances_train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    read = reader({"name": "coco", "root": str(folder)}, **needs)
    return Case(path, (json.dumps(coco_content()).encode(),), read)


def coco_masks(folder: Path) -> Case:
    return coco(folder, masks=True)


def coco_points(folder: Path) -> Case:
    case = coco(folder, points=True)
    content = coco_content()
    content["categories"] = content["categories"][:1]
    return Case(case.path, (json.dumps(content).encode(),), case.read)


DATA_YAML = "path: .\ntrain: images/train\nval: images/train\nnc: 2\nnames: {0: cat, 1: dog}\n"


def yolo(folder: Path) -> Case:
    write(folder / "images" / "train" / "a.jpg", encoded("JPEG"))
    write(folder / "data.yaml", DATA_YAML)
    path = folder / "labels" / "train" / "a.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = (b"0 0.5 0.5 0.25 0.5\n1 0.2 0.2 0.1 0.1\n", b"1 0.1 0.1 0.5 0.1 0.5 0.6 0.2 0.6\n0 0.5 0.5 0.2 0.2\n")
    return Case(path, seeds, reader({"name": "yolo", "root": str(folder)}))


def data_yaml(folder: Path) -> Case:
    yolo(folder)
    write(folder / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.5\n")
    write(folder / "train.txt", "images/train/a.jpg\n")
    pose = b"train: images/train\nnames: [cat]\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n"
    listed = b"path: .\ntrain: train.txt\nval: [images/train, train.txt]\nnc: 1\nnames:\n  - 'yes'\n"
    return Case(folder / "data.yaml", (DATA_YAML.encode(), pose, listed), reader({"name": "yolo", "root": str(folder)}))


def yolo_list(folder: Path) -> Case:
    data_yaml(folder)
    write(folder / "data.yaml", "train: train.txt\nval: train.txt\nnames: [cat]\n")
    seeds = (b"images/train/a.jpg\n", b"./images/train/a.jpg\r\n# x\n")
    return Case(folder / "train.txt", seeds, reader({"name": "yolo", "root": str(folder)}))


def masks(folder: Path) -> Case:
    write(folder / "images" / "train" / "a.jpg", encoded("JPEG"))
    path = folder / "masks" / "train" / "a.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 3)
    streams = []
    for mode in ("L", "P"):
        stream = BytesIO()
        image.convert(mode).save(stream, "PNG")
        streams.append(stream.getvalue())
    options = {"name": "masks", "root": str(folder), "class_names": ["background", "cat", "dog"]}
    return Case(path, tuple(streams), reader(options))


def config(folder: Path) -> Case:
    from detkit.config import experiment_to_dict, load_experiment

    path = folder / "config.yaml"
    configs = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

    def read() -> None:
        experiment_to_dict(load_experiment([str(path)]))

    return Case(path, tuple(file.read_bytes() for file in configs), read)


TINY = {
    "data": {"name": "shapes", "train_count": 4, "val_count": 2, "size": 64},
    "backbone": {"name": "small_ssd", "widths": [4, 8, 8], "level_channels": 8},
    "head": {"name": "ssd"},
    "input": {"size": [64, 64]},
}


def tiny_model() -> Any:
    from detkit.config import experiment_from_dict
    from detkit.model import build_model
    from detkit.structures import ClassList

    return build_model(experiment_from_dict(TINY), ClassList.from_names(["cat", "dog"]))


def metadata(folder: Path) -> Case:
    """The metadata of a checkpoint, as JSON; its tensors are whole, and the checksum is made anew."""
    from safetensors.torch import load_file, save_file

    from detkit.model import load_model

    tiny_model().save(folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    tensors = load_file(folder / "whole.safetensors")
    nested = {key: json.loads(value) if value[:1] in "[{" else value for key, value in header.items()}
    nested = {key: value for key, value in nested.items() if key not in ("checksum", "sha256")}
    path = folder / "metadata.json"

    def read() -> None:
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            values = {"experiment": path.read_bytes().decode(errors="replace"), "format": header["format"]}
        values = values if isinstance(values, dict) else {"experiment": values}
        flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        valid = {key: value.encode(errors="replace").decode() for key, value in flat.items()}
        save_file(tensors, folder / "model.safetensors", metadata=valid)
        load_model(folder / "model.safetensors")

    return Case(path, (json.dumps(nested).encode(),), read)


def checkpoint(folder: Path) -> Case:
    from detkit.model import load_model

    path = folder / "model.safetensors"
    tiny_model().save(path)
    return Case(path, (path.read_bytes(),), lambda: load_model(path))


def pth(folder: Path) -> Case:
    from detkit.model import load_model

    path = folder / "model.pth"
    state = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3), "conv1.weight": torch.zeros(2, 3, 1, 1)}
    seeds = []
    for content, zipped in ((state, True), ({"model": state, "ap": np.float64(0.5)}, False), (state, False)):
        stream = BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        seeds.append(stream.getvalue())
    return Case(path, tuple(seeds), lambda: load_model(path))


def zoo_weights(name: str, folder: Path) -> Case:
    from detkit.model import load_model

    path, seeds = zoo_cases("FUZZED_WEIGHTS")[name](folder)
    return Case(path, seeds, lambda: load_model(path))


def proposals(folder: Path) -> Case:
    from detkit.registry import proposal_sources

    path = folder / "proposals.json"
    flat = [{"image_id": 1, "bbox": [1, 2, 30, 20], "score": 0.5}, {"image_id": "b", "bbox": [0, 0, 5, 5], "score": 1}]
    whole = {"images": [{"id": 1, "width": 32, "height": 24}], "proposals": flat[:1]}
    options = {"name": "file", "path": str(path)}
    seeds = (json.dumps(flat).encode(), json.dumps(whole).encode())
    return Case(path, seeds, lambda: proposal_sources.build(options, "proposals", split="train"))


def state(folder: Path) -> Case:
    from detkit.config import experiment_from_dict
    from detkit.engine.run_folder import RunFolder

    run = RunFolder.create(experiment_from_dict({**TINY, "runs": str(folder)}), "detect")
    run.save_state({"epoch": 1, "random": torch.arange(20, dtype=torch.uint8), "optimizer": {"lr": 0.1}})
    return Case(run.state, (run.state.read_bytes(),), run.load_state)


def video(folder: Path) -> Case:
    from fractions import Fraction

    from detkit.data.video import VideoReader, VideoWriter

    path = folder / "a.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(path, Fraction(25)) as writer:
        for _ in range(3):
            writer.write(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))

    def read() -> None:
        with VideoReader(path) as reader:
            for _ in reader:
                pass

    return Case(path, (path.read_bytes(),), read)


READERS: dict[str, Callable[[Path], Case]] = {
    case.__name__: case
    for case in (
        *(images, voc, voc_list, coco, coco_masks, coco_points, yolo, data_yaml, yolo_list, masks, proposals),
        *(config, metadata, checkpoint, state, pth, video),
    )
} | {name: partial(zoo_weights, name) for name in zoo_cases("FUZZED_WEIGHTS")}
