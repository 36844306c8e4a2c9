"""`detkit infer` on a film: every frame is seen once, in order, and nothing but a few of them is in memory."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detkit.data.shapes import Shapes
from detkit.data.video import VideoReader, VideoWriter
from detkit.infer import infer
from detkit.model import build_model
from detkit.predict import Predictor

RATE = Fraction(30000, 1001)


@pytest.fixture
def predictor(tiny: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(tiny(), Shapes("val", val_count=1).classes), "cpu")


@pytest.fixture
def film(tmp_path: Path) -> Path:
    data = Shapes("val", val_count=7, size=96)
    with VideoWriter(tmp_path / "film.mp4", RATE) as writer:
        for index in range(7):
            writer.write(data[index].image)
    return tmp_path / "film.mp4"


@pytest.mark.parametrize("batch", [1, 3])
def test_detections_are_those_of_the_frames(predictor: Predictor, film: Path, tmp_path: Path, batch: int) -> None:
    out = tmp_path / "out"
    assert infer(predictor, str(film), out, batch=batch, conf=0.02, max_det=4, save_txt=True) == 0
    with VideoReader(film) as reader:
        frames = list(reader)
    records = json.loads((out / "predictions.json").read_text())
    assert [record["image_id"] for record in records] == [number for number in range(7) for _ in range(4)]
    for number, frame in enumerate(frames):
        found = predictor.predict(frame, conf=0.02, max_det=4)
        mine = [record for record in records if record["image_id"] == number]
        np.testing.assert_allclose([record["score"] for record in mine], found.scores, atol=1e-4)
    assert sorted(path.name for path in (out / "labels").iterdir()) == [f"film_{number:06d}.txt" for number in range(7)]
    with VideoReader(out / "film.mp4") as reader:
        drawn = list(reader)
    assert reader.rate == RATE
    assert len(drawn) == 7
    for mine, frame in zip(drawn, frames):
        expected = predictor.task.draw(frame, predictor.predict(frame, conf=0.02, max_det=4))
        assert np.abs(mine.astype(int) - expected).mean() < 12


def test_what_is_not_asked_for_is_not_written(predictor: Predictor, film: Path, tmp_path: Path) -> None:
    infer(predictor, str(film), tmp_path / "a", save_images=False)
    infer(predictor, str(film), tmp_path / "b", save_json=False)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["predictions.json"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["film.mp4"]


def test_no_more_frames_than_a_batch_are_read_ahead(
    predictor: Predictor, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = VideoReader.__iter__

    def counted(self: VideoReader) -> Any:
        for number, frame in enumerate(original(self)):
            read.append(number)
            yield frame

    seen: list[int] = []
    draw = predictor.task.draw
    monkeypatch.setattr(VideoReader, "__iter__", counted)
    monkeypatch.setattr(predictor.task, "draw", lambda *a: (seen.append(len(read)), draw(*a))[1])
    infer(predictor, str(film), tmp_path / "out", batch=2)
    assert seen == [2, 2, 4, 4, 6, 6, 7]


def test_damage_is_reported(
    predictor: Predictor, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(film.read_bytes())
    start = content.index(b"mdat") + 2000
    content[start : start + 500] = bytes([255]) * 500
    film.write_bytes(content)
    infer(predictor, str(film), tmp_path / "out")
    output = capsys.readouterr().out
    assert f"{film} is broken" in output
    assert json.loads((tmp_path / "out/predictions.json").read_text()) is not None
