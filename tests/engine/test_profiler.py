"""Where the time of training goes."""

import csv
import time
from typing import Any

import pytest

from detkit.config import TrainOptions
from detkit.engine import profiler as stages
from detkit.engine.profiler import BACKWARD, FORWARD, IMAGES, STEP, VALIDATION, Stopwatch, verdict
from detkit.engine.train import train


def watch_of(**seconds: float) -> Stopwatch:
    watch = Stopwatch(detailed=True)
    watch.seconds.update({getattr(stages, name.upper()): value for name, value in seconds.items()})
    return watch


def test_laps_go_to_their_stages_and_what_is_before_the_start_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 6.0, 8.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(detailed=True)
    watch.start()
    for stage in (IMAGES, FORWARD, BACKWARD, FORWARD):
        watch.lap(stage)
    assert watch.seconds == {IMAGES: 1.0, FORWARD: 3.0, BACKWARD: 4.0}
    assert list(watch.shares().items()) == [(BACKWARD, 0.5), (FORWARD, 0.375), (IMAGES, 0.125)]


def test_on_a_gpu_the_parts_of_the_network_are_one() -> None:
    watch = Stopwatch(detailed=False)
    for stage in (IMAGES, FORWARD, BACKWARD, STEP, VALIDATION):
        watch.lap(stage)
    assert set(watch.seconds) == {IMAGES, "network", VALIDATION}


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        (
            {"images": 4, "forward": 31, "backward": 58, "step": 7},
            {},
            "58% backward, 31% forward and loss, 7% step, 4% waiting for images; the network limits this run",
        ),
        (
            {"images": 20, "forward": 80},
            {"workers": 1},
            "images limit this run: raise train.workers from 1, or set train.cache, which keeps decoded images",
        ),
        ({"images": 20, "forward": 80}, {"workers": 2}, "this run: set train.cache, which keeps decoded images"),
        ({"images": 20, "forward": 80}, {"cache": "memory"}, "run: use smaller image files or fewer augmentations"),
        ({"images": 1, "forward": 9, "validation": 20}, {}, "limits this run: raise train.validate_every from 1"),
    ],
)
def test_the_verdict_names_the_slower_side_and_what_helps(
    seconds: dict[str, float], options: dict[str, Any], expected: str
) -> None:
    assert verdict(watch_of(**seconds), TrainOptions(**options), cores=2).endswith(expected)


def test_a_run_says_where_its_time_went(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tiny("--train.epochs", "1"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("time ")
    assert line.count("limit") == 1
    assert "backward" in line
    with folder.metrics.open() as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row["seconds_waiting"]) < float(row["seconds"])


def test_reading_in_the_training_process_is_no_limit_while_the_network_takes_longer() -> None:
    watch = Stopwatch(detailed=True)
    watch.seconds.update({FORWARD: 50.0, BACKWARD: 30.0, IMAGES: 20.0})
    line = verdict(watch, TrainOptions(workers=0), 2)
    assert line.endswith("the network limits this run, but train.workers 1 would read images meanwhile")
    watch.seconds[IMAGES] = 90.0
    assert "images limit this run" in verdict(watch, TrainOptions(workers=0), 2)
