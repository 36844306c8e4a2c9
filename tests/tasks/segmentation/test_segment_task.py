"""The task of semantic segmentation: pixels of the source, files, data with nothing to learn from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detkit.cli import main
from detkit.data.formats.shapes import Shapes
from detkit.data.transforms import Fit
from detkit.errors import ConfigError, DataError
from detkit.registry import heads
from detkit.structures import IGNORED_PIXEL, ClassList, Meta, Sample, SemanticMap, Target
from detkit.tasks.options import PredictOptions
from detkit.tasks.segmentation.task import Segment, enlarged_labels

TINY = """
data: {name: shapes, train_count: 8, val_count: 4, size: 80}
backbone: {name: small_ssd, widths: [4, 8, 8], level_channels: 8}
head: {name: fcn}
input: {size: [64, 64], resize: crop}
augment: [{name: random_scale}, {name: flip}, {name: photometric}]
train: {epochs: 1, batch_size: 4, workers: 0, lr: 0.01, warmup_epochs: 0}
name: tiny
"""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(40, 60), (7, 9), (20, 20)])
def test_labels_of_another_size_are_those_of_the_interpolated_logits(seed: int, size: tuple[int, int]) -> None:
    logits = torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(seed))
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    found = enlarged_labels(logits, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side", "crop"])
def test_a_map_returns_to_the_pixels_of_its_source(resize: Any) -> None:
    """A step edge in the network's logits is found where it is in the image."""
    size = (90, 120)
    fit = Fit((64, 96), resize)
    semantic = torch.zeros(size, dtype=torch.uint8)
    semantic[30:, 50:] = 1
    target = replace(Target.empty(), semantic=semantic)
    fitted = fit(Sample(np.zeros((*size, 3), dtype=np.uint8), target, Meta(1, "a", size)))
    assert fitted.target.semantic is not None
    inside = fitted.target.semantic[: fitted.size[0], : fitted.size[1]]
    assert (fitted.target.semantic[fitted.size[0] :] == IGNORED_PIXEL).all()
    assert (fitted.target.semantic[:, fitted.size[1] :] == IGNORED_PIXEL).all()
    logits = F.one_hot(inside.long(), 2).permute(2, 0, 1).float()
    found = Segment().undo(SemanticMap(inside, logits), fitted.meta, ("a", "b"))
    assert tuple(found.labels.shape) == size
    assert found.class_names == ("a", "b")
    assert found.logits is None
    assert (found.labels == semantic).float().mean() > 0.98


def test_maps_that_cannot_return_are_refused() -> None:
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="augmented at random"):
        Segment().undo(SemanticMap(labels), Meta(1, "a", (4, 4), matrix=None), ())
    with pytest.raises(ValueError, match="has no logits"):
        Segment().undo(SemanticMap(labels), Meta(1, "a", (8, 8)), ())


def test_what_is_found_is_described_by_its_share() -> None:
    labels = torch.tensor([[0, 0, 0, 2]], dtype=torch.uint8)
    assert Segment().describe(SemanticMap(labels, class_names=("sky", "sea", "cat"))) == "sky 75.0 %, cat 25.0 %"
    many = torch.arange(9, dtype=torch.uint8)[None]
    assert Segment().describe(SemanticMap(many)).endswith("5 11.1 % and 3 more")


def test_enlarged_maps_repeat_their_pixels() -> None:
    found = Segment().enlarged(SemanticMap(torch.tensor([[1, 2]], dtype=torch.uint8)), 2)
    assert found.labels.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_data_with_nothing_to_tell_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Shapes("val", val_count=3, size=32, semantic=True)
    Segment().check_data(dataset, "val")
    of_pixel: dict[str, int] = {}

    def target(index: int) -> Target:
        return replace(Target.empty(), semantic=torch.tensor([[of_pixel["value"], IGNORED_PIXEL]], dtype=torch.uint8))

    monkeypatch.setattr(dataset, "target", target)
    of_pixel["value"] = 0
    with pytest.raises(
        DataError, match=r"split 'val' the pixels that count are of 'background'.*0 and 255 must become"
    ):
        Segment().check_data(dataset, "val")
    of_pixel["value"] = IGNORED_PIXEL
    with pytest.raises(DataError, match="the pixels that count are of none"):
        Segment().check_data(dataset, "val")
    monkeypatch.setattr(dataset, "classes", ClassList.from_names(["only"]))
    of_pixel["value"] = 0
    Segment().check_data(dataset, "val")


def test_options_of_detectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="'conf' does not apply to this model, which gives masks of classes"):
        Segment().check_options(heads.get("fcn"), PredictOptions(conf=0.5))


def test_a_run_trains_evaluates_and_predicts_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY + f"runs: {tmp_path / 'runs'}\n")
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "segment" / "tiny"
    assert "mIoU" in (run / "metrics.csv").read_text().splitlines()[0]
    assert (run / "images" / "training_batch.jpg").is_file()
    assert (run / "images" / "val_00000.jpg").is_file()
    records = tmp_path / "val.json"
    assert main(["eval", str(run), "--save-json", str(records)]) == 0
    assert "mean over classes" in capsys.readouterr().out
    assert {item["image_id"] for item in json.loads(records.read_text())} == {0, 1, 2, 3}
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("7.png", (150, 90)), ("small.png", (20, 30))):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / name)
    output = tmp_path / "out"
    assert main(["infer", str(run), "--source", str(images), "--output", str(output)]) == 0
    with Image.open(output / "labels" / "7.png") as labels:
        assert labels.mode == "P"
        assert labels.size == (150, 90)
        assert np.asarray(labels).max() < 5
    assert (output / "images" / "small.jpg").is_file()
    found = json.loads((output / "predictions.json").read_text())
    assert sum(item["fraction"] for item in found if item["image_id"] == 7) == pytest.approx(1, abs=1e-4)
    assert all(item["segmentation"]["size"] == [90, 150] for item in found if item["image_id"] == 7)
    assert main(["infer", str(run), "--source", str(images), "--conf", "0.5"]) == 1
    assert "'conf' does not apply to this model" in capsys.readouterr().err


def test_detectors_refuse_to_be_trained_on_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY + f"runs: {tmp_path / 'runs'}\n")
    assert main(["train", str(config), "--head", "{name: ssd}", "--augment", "[]"]) == 1
    assert "'input.resize' crop is for heads that predict for each pixel" in capsys.readouterr().err


def test_mixes_are_refused_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY + f"runs: {tmp_path / 'runs'}\n")
    assert main(["train", str(config), "--augment", "[{name: mosaic, probability: 0.1}]"]) == 1
    assert "is not supported for semantic maps" in capsys.readouterr().err
