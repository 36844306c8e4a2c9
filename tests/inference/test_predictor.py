"""Predicting: any kind of image, its own pixels, strict options."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_cases import zoo_cases

import detkit
from detkit.boxes import pairwise_iou
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.heads.base import Postprocess
from detkit.heads.ssd import SSD, SSDOutputs
from detkit.inference.predictor import Predictor
from detkit.model import build_model
from detkit.structures import ClassList, Detections

CLASSES = ClassList.from_names(["red", "green", "blue"])


@pytest.fixture
def predictor(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A predictor whose network finds one box of each class, at fixed fractions of the image."""

    def decode(self: SSD, outputs: SSDOutputs, options: Postprocess | None = None) -> list[Detections]:
        limits, found = options or self.postprocess, []
        for height, width in outputs.sizes:
            boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.75, 1.0]])
            scores = torch.tensor([0.9, 0.6, 0.3])
            kept = (scores > limits.score_threshold) & (torch.arange(3) < limits.max_detections)
            scale = torch.tensor([width, height] * 2)
            found.append(Detections(boxes * scale, scores, torch.arange(3))[kept])
        return found

    monkeypatch.setattr(SSD, "decode", decode)
    return Predictor(build_model(tiny("--input.resize", "letterbox"), CLASSES), "cpu")


def picture(height: int = 40, width: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_boxes_are_in_the_pixels_of_the_image(predictor: Predictor) -> None:
    found = predictor.predict(picture())
    torch.testing.assert_close(
        found.boxes,
        torch.tensor([[10.0, 8, 50, 24], [0, 0, 100, 40], [50, 20, 75, 40]]),
        rtol=0,
        atol=1e-3,
    )
    assert found.class_names == CLASSES.names
    assert [name for _, _, name in found] == ["red", "green", "blue"]
    assert found.to_supervision().data["class_name"].tolist() == ["red", "green", "blue"]


def test_paths_arrays_and_pil_images_are_the_same(predictor: Predictor, tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    image.save(tmp_path / "a b é.png")
    for given in (str(tmp_path / "a b é.png"), tmp_path / "a b é.png", image, np.asarray(image)):
        assert torch.equal(predictor.predict(given).boxes, predictor.predict(picture()).boxes)
    grey = picture()[..., 0]
    assert len(predictor.predict(grey)) == 3


def test_exif_rotation_is_applied(predictor: Predictor, tmp_path: Path) -> None:
    image = Image.fromarray(picture(40, 100))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    found = predictor.predict(tmp_path / "turned.jpg")
    assert found.boxes[1].round().tolist() == [0, 0, 40, 100]


def test_options(predictor: Predictor) -> None:
    assert len(predictor.predict(picture(), conf=0.5)) == 2
    assert len(predictor.predict(picture(), max_det=1)) == 1
    assert predictor.predict(picture(), classes=["blue"]).labels.tolist() == [2]
    assert predictor.predict(picture(), classes=["blue", 0], max_det=1).labels.tolist() == [0]
    before = predictor.model.head.postprocess
    predictor.predict(picture(), conf=0.9, iou=0.1)
    assert predictor.model.head.postprocess == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conf": 1.5}, r"'conf' must be in 0\.\.1"),
        ({"iou": -0.1}, r"'iou' must be in 0\.\.1"),
        ({"max_det": 0}, "'max_det' must be at least 1"),
        ({"classes": ["gren"]}, "'gren' is not a class of this model. Did you mean 'green'"),
        ({"classes": [7]}, "'7' is not a class"),
    ],
)
def test_senseless_options_are_refused(predictor: Predictor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predictor.predict(picture(), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (3, "a path, an array, a tensor or a PIL image"),
        ("no/such/picture.jpg", "no/such/picture.jpg"),
    ],
)
def test_what_is_no_image_is_refused(predictor: Predictor, image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        predictor.predict(image)


def test_tiny_and_long_images(predictor: Predictor) -> None:
    for size in ((1, 1), (1, 3000), (2000, 2)):
        found = predictor.predict(picture(*size))
        assert found.boxes[1].round().tolist() == [0, 0, size[1], size[0]]


def test_batches_equal_single_images(tiny: Any) -> None:
    torch.manual_seed(0)
    predictor = Predictor(build_model(tiny(), CLASSES), "cpu")
    images = [picture(30 + 10 * index, 50) for index in range(5)]
    together = list(predictor.predict_all(images, conf=0.0, batch_size=4))
    for image, found in zip(images, together):
        alone = predictor.predict(image, conf=0.0)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-5)
        assert pairwise_iou(found.boxes, alone.boxes).amax(1).min() > 0.99


def test_save_and_load_give_the_same_detections(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build_model(tiny(), CLASSES)
    model.save(tmp_path / "model.safetensors")
    loaded = detkit.load(tmp_path / "model.safetensors", "cpu", precision="fp32")
    assert loaded.class_names == CLASSES.names
    expected = Predictor(model, "cpu").predict(picture(), conf=0.0)
    assert torch.equal(loaded.predict(picture(), conf=0.0).boxes, expected.boxes)


def test_broken_checkpoints_are_named(tiny: Any, tmp_path: Path) -> None:
    model = build_model(tiny(), CLASSES)
    path = tmp_path / "model.safetensors"
    model.save(path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint.*Did you mean.*model\.safetensors"):
        detkit.load(tmp_path / "modle.safetensors")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read"):
        detkit.load(path)
    with pytest.raises(CheckpointError, match="contains no checkpoints/best"):
        detkit.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="nor a detkit checkpoint"):
        detkit.load(path)


def test_an_unknown_device_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="device 'gpu7'"):
        Predictor(build_model(tiny(), CLASSES), "gpu7")


YOLO = {
    **zoo_cases("TRIMMED"),
    "yolox": [
        *("--backbone", "{name: csp_darknet, depth: 0.33, width: 0.125}"),
        *("--neck", "{name: pafpn, depth: 0.33}"),
    ],
}


@pytest.mark.parametrize("name", YOLO)
def test_heads_that_trim_padding_find_the_same_in_what_is_left(name: str, tiny: Any) -> None:
    """A trimmed image is to the network what the same model sees of an input of that size."""
    options = ["--input.resize", "letterbox", *YOLO[name], "--head", f"{{name: {name}}}"]
    model = build_model(tiny(*options, "--input.size", "[128, 128]"), CLASSES)
    assert model.fit.trim
    again = build_model(tiny(*options, "--input.size", "[64, 128]"), CLASSES)
    again.load_state_dict(model.state_dict())
    again.fit = again.fit.untrimmed()
    found = Predictor(model, "cpu").predict(picture(40, 100), conf=0.0)
    expected = Predictor(again, "cpu").predict(picture(40, 100), conf=0.0)
    assert len(found) == len(expected) > 0
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_padding_is_kept_where_it_is_asked_for_and_where_the_head_depends_on_the_size(tiny: Any) -> None:
    options = ["--input.resize", "letterbox", *YOLO["yolox"], "--head", "{name: yolox}"]
    assert not build_model(tiny(*options, "--input.trim_padding", "false"), CLASSES).fit.trim
    assert not build_model(tiny("--input.resize", "letterbox"), CLASSES).fit.trim  # SSD


@pytest.mark.parametrize("name", YOLO)
def test_padding_is_kept_where_cells_would_change_their_size(name: str, tiny: Any) -> None:
    options = ["--input.resize", "letterbox", *YOLO[name], "--head", f"{{name: {name}}}"]
    assert not build_model(tiny(*options, "--input.size", "[128, 150]"), CLASSES).fit.trim


def test_threads_get_what_they_asked_for(tiny: Any) -> None:
    predictor = Predictor(build_model(tiny(), CLASSES), "cpu")
    before, image = predictor.model.head.postprocess, picture(40, 50)
    expected = {conf: len(predictor.predict(image, conf=conf)) for conf in (0.0, 0.99)}
    assert expected[0.0] > expected[0.99]
    with ThreadPoolExecutor(4) as pool:
        asked = [0.0, 0.99] * 20
        found = list(pool.map(lambda conf: len(predictor.predict(image, conf=conf)), asked))
    assert found == [expected[conf] for conf in asked]
    assert predictor.model.head.postprocess == before
