"""`detkit infer` on a video: every frame is seen once, in order, and nothing but a few of them is in memory."""

import json
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detkit.data.formats.shapes import Shapes
from detkit.data.video import VideoReader, VideoWriter
from detkit.errors import DetkitError
from detkit.inference.images import infer
from detkit.inference.predictor import Predictor
from detkit.inference.video import READ_AHEAD, WRITE_BEHIND
from detkit.model import build_model
from detkit.tasks.options import PredictOptions

RATE = Fraction(30000, 1001)


@pytest.fixture
def predictor(tiny: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(tiny(), Shapes("val", val_count=1).classes), "cpu")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    data = Shapes("val", val_count=7, size=96)
    with VideoWriter(tmp_path / "video.mp4", RATE) as writer:
        for index in range(7):
            writer.write(data[index].image)
    return tmp_path / "video.mp4"


@pytest.mark.parametrize("batch", [1, 3])
def test_detections_are_those_of_the_frames(predictor: Predictor, video: Path, tmp_path: Path, batch: int) -> None:
    out = tmp_path / "out"
    assert infer(predictor, str(video), out, PredictOptions(conf=0.02, max_det=4, save_txt=True), batch=batch) == 0
    with VideoReader(video) as reader:
        frames = list(reader)
    records = json.loads((out / "predictions.json").read_text())
    assert [record["image_id"] for record in records] == [number for number in range(7) for _ in range(4)]
    for number, frame in enumerate(frames):
        found = predictor.predict(frame, conf=0.02, max_det=4)
        mine = [record for record in records if record["image_id"] == number]
        np.testing.assert_allclose([record["score"] for record in mine], found.scores, atol=1e-4)
    assert sorted(path.name for path in (out / "labels").iterdir()) == [
        f"video_{number:06d}.txt" for number in range(7)
    ]
    with VideoReader(out / "video.mp4") as reader:
        drawn = list(reader)
    assert reader.rate == RATE
    assert len(drawn) == 7
    for mine, frame in zip(drawn, frames):
        expected = predictor.task.draw(frame, predictor.predict(frame, conf=0.02, max_det=4))
        assert np.abs(mine.astype(int) - expected).mean() < 12


def test_what_is_not_asked_for_is_not_written(predictor: Predictor, video: Path, tmp_path: Path) -> None:
    infer(predictor, str(video), tmp_path / "a", save_images=False)
    infer(predictor, str(video), tmp_path / "b", save_json=False)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["predictions.json"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("batch", [1, 4])
def test_only_some_frames_are_in_memory(
    predictor: Predictor, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    read, written, held = 0, 0, []

    def frames(self: VideoReader) -> Iterator[tuple[np.ndarray, Fraction]]:
        nonlocal read
        for number in range(60):
            read += 1
            yield np.zeros((32, 32, 3), dtype=np.uint8), number / RATE

    def write(self: VideoWriter, image: np.ndarray, shown_at: Fraction) -> None:
        nonlocal written
        time.sleep(0.005)  # so that all before it waits for it
        held.append(read - written)
        written += 1

    monkeypatch.setattr(VideoReader, "timed", frames)
    monkeypatch.setattr(VideoWriter, "write", write)
    infer(predictor, str(video), tmp_path / "out", PredictOptions(max_det=1), batch=batch)
    assert written == 60
    assert max(held) <= 3 * batch + READ_AHEAD + WRITE_BEHIND + 1


def interrupted_at(whose: Any, name: str, call: int, error: BaseException) -> Any:
    """The method of that name, but its `call`-th call ends in `error`."""
    original = getattr(whose, name)
    calls = count(1)

    def method(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return original(*arguments, **options)

    return method


def whole(out: Path, frames: int) -> None:
    """The video and predictions.json have the same first `frames`."""
    with VideoReader(out / "video.mp4") as reader:
        assert len(list(reader)) == frames
        assert not reader.problem
    records = json.loads((out / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == set(range(frames))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_was_predicted_before_an_interruption_is_whole(
    predictor: Predictor, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(predictor, "_run", interrupted_at(predictor, "_run", 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        infer(predictor, str(video), tmp_path / "out", PredictOptions(conf=0.0), batch=batch)
    whole(tmp_path / "out", frames=2 * batch)


def test_what_was_written_before_an_error_of_the_writer_is_whole(
    predictor: Predictor, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor.task, "draw", interrupted_at(predictor.task, "draw", 4, DetkitError("disk full")))
    with pytest.raises(DetkitError, match="disk full"):
        infer(predictor, str(video), tmp_path / "out", PredictOptions(conf=0.0), batch=2)
    whole(tmp_path / "out", frames=3)


def test_what_was_read_before_an_error_of_the_reader_is_whole(
    predictor: Predictor, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = VideoReader.timed

    def cut(self: VideoReader) -> Iterator[tuple[np.ndarray, Fraction]]:
        if self.path != video:
            return frames(self)
        return (frame if number < 5 else self.no_such for number, frame in enumerate(frames(self)))

    monkeypatch.setattr(VideoReader, "timed", cut)
    with pytest.raises(AttributeError, match="no_such"):
        infer(predictor, str(video), tmp_path / "out", PredictOptions(conf=0.0))
    whole(tmp_path / "out", frames=5)


def test_damage_is_reported(
    predictor: Predictor, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + 2000
    content[start : start + 2000] = bytes([255]) * 2000
    video.write_bytes(content)
    infer(predictor, str(video), tmp_path / "out")
    output = capsys.readouterr().out
    assert f"{video} is broken" in output
    assert json.loads((tmp_path / "out/predictions.json").read_text()) is not None


def test_times_and_pixel_aspect_are_those_of_the_source(predictor: Predictor, tmp_path: Path) -> None:
    times = [Fraction(n, 90) for n in (0, 3, 4, 40, 41, 130)]
    with VideoWriter(tmp_path / "in.mp4", Fraction(25), Fraction(4, 3)) as writer:
        for time_shown in times:
            writer.write(np.full((32, 48, 3), 99, dtype=np.uint8), time_shown)
    infer(predictor, str(tmp_path / "in.mp4"), tmp_path / "out", batch=2)
    with VideoReader(tmp_path / "out" / "in.mp4") as reader:
        assert [time_shown for _, time_shown in reader.timed()] == times
        assert reader.aspect == Fraction(4, 3)
