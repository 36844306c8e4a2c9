"""Landmarks and MTCNN through training, evaluation and the command line, on drawn faces."""

import json
from pathlib import Path

import pytest
import torch

import detkit
from detkit.cli import main
from detkit.tasks.drawing import write_image
from detkit.zoo.faces.dataset import Faces


def test_landmarks_are_trained_scored_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "points.yaml"
    config.write_text(
        "data: {name: faces, train_count: 24, val_count: 12, size: 64}\n"
        "backbone: {name: small_ssd, widths: [4, 8, 8], level_channels: 8}\n"
        "head: {name: landmarks, points: 5, width: 8}\ninput: {size: [64, 64]}\naugment: [{name: flip}]\n"
        "train: {epochs: 2, batch_size: 8, workers: 0, lr: 0.01, ema_decay: 0.9, validate_every: 2}\n"
        f"name: tiny\nruns: {tmp_path / 'runs'}\n"
    )
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "landmarks" / "tiny"
    image = Faces("val", size=128)[0].image
    write_image(tmp_path / "face.png", image)
    assert main(["infer", str(run), "--source", str(tmp_path / "face.png"), "--output", str(tmp_path / "out")]) == 0
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    points = detkit.load(run, "cpu").predict(image).points
    assert points.shape == (5, 2)
    assert record["keypoints"][:2] == pytest.approx(points[0].tolist(), abs=0.02)
    # The points are those of the image as it is, not as it goes into the network.
    small = detkit.load(run, "cpu").predict(image[::2, ::2]).points
    assert torch.allclose(small * 2, points, atol=8)
    assert main(["train", str(config), "--head.points", "4"]) == 1
    assert "'head.points' is 4, but the data has 5 points" in capsys.readouterr().err


def test_mtcnn_is_trained_and_scored(tmp_path: Path) -> None:
    config = tmp_path / "mtcnn.yaml"
    config.write_text(
        "data: {name: faces, train_count: 4, val_count: 2, size: 64, max_faces: 2}\nbackbone: {name: pixels}\n"
        "head: {name: mtcnn, windows: 12, thresholds: [0.1, 0.1, 0.1]}\ninput: {size: [64, 64], resize: crop}\n"
        "augment: [{name: flip}]\ntrain: {epochs: 1, batch_size: 2, workers: 0, lr: 0.01}\n"
        f"name: tiny\nruns: {tmp_path / 'runs'}\n"
    )
    assert main(["train", str(config)]) == 0
    image = Faces("val", size=100, max_faces=3)[1].image
    found = detkit.load(tmp_path / "runs" / "detect" / "tiny", "cpu").predict(image, conf=0.0)
    assert found.points is not None
    assert found.points.shape == (len(found), 5, 2)
