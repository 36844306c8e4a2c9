"""`detkit bench RUN`: the time of a model of the user's."""

import json
import re
from pathlib import Path

import pytest
from cli_runs import Run, fails

from detkit.cli import bench
from detkit.model import load_model


def test_figures_are_printed_and_written(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    given = ("--batch", 2, "--images", 5, "--device", "cpu", "--precision", "fp32", "--json", tmp_path / "time.json")
    status, output, error = run("bench", checkpoint, *given)
    assert status == 0, error
    figures = json.loads((tmp_path / "time.json").read_text())
    assert figures["images"] == 6
    assert 0 < figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"]
    assert 1000 / figures["p90_ms"] / 2 < figures["images_per_second"]
    assert figures["parameters"] == sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
    assert (figures["input"], figures["device"], figures["precision"]) == ([64, 64], "cpu", "fp32")
    assert figures["processor"] in output
    assert f"{figures['median_ms']:.2f} ms per image" in output
    assert f"{figures['images_per_second']:.1f} images per second" in output
    assert re.search(r"0\.0\d M parameters, input 64 x 64", output)
    assert run("bench", checkpoint, *given)[0] == 0  # its own results may be replaced


def test_times_are_of_an_image_without_warm_up(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batches take a second each, the others 1, 2, ... 10 seconds."""
    clock = iter([second for length in (*[1] * bench.WARM_UP, *range(1, 11)) for second in (0.0, float(length))])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    file = tmp_path / "time.json"
    assert run("bench", checkpoint, "--batch", 4, "--images", 40, "--json", file)[0] == 0
    figures = json.loads(file.read_text())
    assert figures["median_ms"] == pytest.approx(5.5e3 / 4)
    assert figures["p10_ms"] == pytest.approx(1.9e3 / 4)
    assert figures["p90_ms"] == pytest.approx(9.1e3 / 4)
    assert figures["images_per_second"] == pytest.approx(40 / 55)


def test_images_of_the_user_are_repeated_in_turn(
    run: Run, checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    from detkit.data.image import read_image

    monkeypatch.setattr("detkit.data.image.read_image", lambda path: (read.append(path.name), read_image(path))[1])
    status, _, error = run("bench", checkpoint, "--source", images, "--images", 4)
    assert status == 0, error
    assert len(read) == bench.WARM_UP + 4
    assert read[:3] == read[3:6]
    assert len(set(read)) == 3


def test_mistakes(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    fails(run("bench"), "'--checkpoint' is missing")
    fails(run("bench", "nms"), "There is no checkpoint 'nms'")
    fails(run("bench", "quickstart.yaml"), "takes a run folder or a checkpoint")
    fails(run("bench", checkpoint, "--images", "0"), "'images' must be at least 1")
    fails(run("bench", checkpoint, "--imags", "3"), "'--imags'", "Did you mean 'images'")
    fails(run("bench", checkpoint, "--source", tmp_path / "nowhere"), "nowhere")
    fails(run("bench", checkpoint, "--device", "cpu", "--precision", "fp16"), "fp16 is for GPUs")
    (tmp_path / "notes.json").write_text('{"my": "notes"}')
    fails(run("bench", checkpoint, "--json", tmp_path / "notes.json"), "notes.json", "Give --json another name")
    assert (tmp_path / "notes.json").read_text() == '{"my": "notes"}'
