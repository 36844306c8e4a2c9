"""Embeddings and landmarks through training, evaluation and the command line, on drawn faces."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import detkit
from detkit.cli import main
from detkit.errors import ConfigError, DataError
from detkit.tasks.drawing import write_image
from detkit.zoo.embedding.gallery import Gallery
from detkit.zoo.embedding.structures import Embedding
from detkit.zoo.faces.dataset import Faces

CONFIG = """
data: {name: faces, train_count: 24, val_count: 12, size: 64, persons: 3}
backbone: {name: small_ssd, widths: [4, 8, 8], level_channels: 8}
head: {name: embed, dimensions: 8, loss: {name: arcface}}
input: {size: [64, 64]}
train: {epochs: 2, batch_size: 8, per_class: 4, workers: 0, lr: 0.01, ema_decay: 0.9, validate_every: 2}
name: tiny
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation has other persons than its training."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "tiny.yaml").write_text(f"{CONFIG}runs: {folder / 'runs'}\n")
    assert main(["train", str(folder / "tiny.yaml")]) == 0
    return folder / "runs" / "embed" / "tiny"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Ada and Ben, twice each, and a third person."""
    data = Faces("val", val_count=12, size=64, persons=3)
    names = {0: "Ada", 1: "Ben", 2: "Eve"}
    for index in range(12):
        name = names[int(data.target(index).image_labels)]  # type: ignore[arg-type]
        write_image(tmp_path / name / f"{index}.png", data[index].image)
    return tmp_path


def test_a_run_is_scored_on_persons_that_it_never_saw(run: Path) -> None:
    rows = (run / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(",")))
    assert last["val_embed"] == ""  # there is no loss for classes without a vector
    assert 0 <= float(last["auc"]) <= 1
    model = detkit.load(run, "cpu").model
    assert float(model.head.threshold) == pytest.approx(float(last["threshold"]))  # type: ignore[arg-type]
    assert main(["eval", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--train.epochs", "3"]) == 0
    assert len(list((run / "images").glob("val_*.jpg"))) > 0


def test_the_command_line_names_what_is_in_a_gallery(
    run: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["infer", str(run), "--source", str(faces / "Ada"), "--gallery", str(faces), "--precision", "fp32"]
    assert main([*arguments, "--threshold", "0.001", "--output", str(faces / "out")]) == 0
    records = json.loads((faces / "out" / "predictions.json").read_text())
    # Every image is in the gallery itself, at a distance of 0.
    assert {record["identity"] for record in records} == {"Ada"}
    assert all(record["distance"] == pytest.approx(0, abs=1e-3) for record in records)
    assert "Ada 0.00" in capsys.readouterr().out
    assert main([*arguments, "--threshold", "0", "--output", str(faces / "none")]) == 0
    assert {record["identity"] for record in json.loads((faces / "none" / "predictions.json").read_text())} == {None}
    assert "unknown 0.00" in capsys.readouterr().out


def test_a_gallery_of_files_is_named_by_them_and_has_the_run_s_threshold(run: Path, faces: Path) -> None:
    predictor = detkit.load(run, "cpu", precision="fp32")
    image = next((faces / "Ben").iterdir())
    (faces / "files").mkdir()
    (faces / "files" / "Ben.png").write_bytes(image.read_bytes())
    gallery = Gallery.read(predictor, faces / "files")
    assert gallery.names == ("Ben",)
    assert gallery.threshold == pytest.approx(float(predictor.model.head.threshold))  # type: ignore[arg-type]
    found = predictor.predict(image, gallery=gallery)
    assert found.distance == pytest.approx(0, abs=1e-3)
    assert found.distance_to(predictor.predict(image)) == pytest.approx(0, abs=1e-3)


def test_the_nearest_image_of_a_gallery_gives_its_name() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    gallery = Gallery(("Ada", "Ben", "Ada"), vectors, 0.5)
    found = gallery.recognise(Embedding(F.normalize(torch.tensor([[-1.0, 0.2]]))[0]))
    assert found.identity == "Ada"
    assert found.distance == pytest.approx(float((found.vector - vectors[2]).norm()))
    assert gallery.recognise(Embedding(F.normalize(torch.tensor([[1.0, -1.0]]))[0])).identity is None


def test_mistakes_about_galleries_are_explained(run: Path, faces: Path, tiny: Any) -> None:
    predictor = detkit.load(run, "cpu")
    with pytest.raises(DataError, match="is not a folder"):
        Gallery.read(predictor, faces / "nowhere")
    with pytest.raises(ConfigError, match=r"0\.\.2, but is 3"):
        Gallery.read(predictor, faces, 3.0)
    predictor.model.head.threshold.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(ConfigError, match="--threshold"):
        Gallery.read(predictor, faces)
    assert main(["infer", str(run), "--source", str(faces), "--threshold", "0.5"]) == 1


def test_landmarks_are_trained_scored_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "points.yaml"
    config.write_text(
        CONFIG.replace(", persons: 3", "")
        .replace("{name: embed, dimensions: 8, loss: {name: arcface}}", "{name: landmarks, points: 5, width: 8}")
        .replace("per_class: 4, ", "")
        + f"augment: [{{name: flip}}]\nruns: {tmp_path / 'runs'}\n"
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
