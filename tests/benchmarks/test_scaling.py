"""How time and memory grow: through the command line, on tiny sizes; and the exponents on made-up times."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.harness import Case, Row, peak_rise
from benchmarks.options import ScalingOptions
from benchmarks.scaling import BOXES_AN_OBJECT, Axis, Setting, calls, coco_data, data_peak, exponents
from detkit.data.formats.coco import Coco

AXES = (
    Axis("pixels of an image", "side", (64,), (64, 96)),
    Axis("classes", "classes", (2,), (2, 5)),
    Axis("images of a data set", None, (2,), (2, 6)),
)


def test_it_prints_a_table_for_each_axis_and_writes_the_exponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "AXES", AXES)
    found = {"'training step'": 3_000_000, "'prediction'": 2_000_000, "'post-processing'": 0, "data_peak(": 1000}
    monkeypatch.setattr(scaling, "run_python", lambda code: next(found[name] for name in found if name in code))
    monkeypatch.setattr(scaling, "keep_freed_memory", lambda: None)  # it would be for this whole process
    output = tmp_path / "result.json"
    arguments = ["--quick", "--rounds", "1", "--seconds", "0.01", "--device", "cpu", "--output", str(output)]
    assert main(["scaling", *arguments]) == 0
    printed = capsys.readouterr().out
    for part in ("pixels of an image, on cpu", "64 x 64", "96 x 96", "training step, time", "opening, memory"):
        assert part in printed
    report = json.loads(output.read_text())
    assert [case["work"] for case in report["cases"]] == [64**2, 96**2, 2, 5, 2, 6]
    assert report["cases"][3]["facts"]["classes"] == 5
    growth = report["growth"]
    assert set(growth) == {f"{axis.name}, cpu" for axis in AXES}
    assert growth["classes, cpu"]["training step"]["memory"] == {"all": 0.0, "last": 0.0}
    assert "memory" not in growth["classes, cpu"]["post-processing"]


def test_an_exponent_is_the_power_by_which_time_grows() -> None:
    cases = [
        Case("", "cpu", "", size, [Row("a", 1e-3 * size**1.5, peak_bytes=700_000 * size), Row("b", 1000.0 + size)])
        for size in (10, 100, 1000, 10**6)
    ]
    found = exponents(cases)
    assert found["a"]["time"] == {"all": pytest.approx(1.5), "last": pytest.approx(1.5)}
    assert found["a"]["memory"]["all"] == pytest.approx(1)
    small = [Case("", "cpu", "", size, [Row("a", 1.0, peak_bytes=1000 * size)]) for size in (1, 10, 5000)]
    assert "memory" not in exponents(small)["a"]  # one size is too few, and the others too little
    assert found["b"]["time"]["all"] < 0.7 < 0.89 < found["b"]["time"]["last"] < 1


def test_memory_is_measured_in_processes_of_their_own() -> None:
    options = ScalingOptions(quick=True, rounds=1, seconds=0.01, device="cpu")
    base = Setting(side=64, batch=1, objects=2)
    for axis, size, names in (
        (AXES[1], 3, ["training step", "prediction", "post-processing"]),
        (AXES[2], 4, ["opening"]),
    ):
        case = scaling._measure(axis, size, base, "cpu", options)
        assert [row.name for row in case.rows] == names
        assert case.work == size
        for row in case.rows:
            assert row.median_us is not None
            assert row.peak_bytes is None or row.peak_bytes >= 0
    assert peak_rise(int) is None or case.rows[0].peak_bytes is not None


def test_the_fixed_scores_make_as_many_candidates_as_there_are_objects() -> None:
    detections = calls(Setting(side=96, batch=2, objects=3, classes=40), "cpu", 0)["post-processing"]()
    for found in detections:
        assert 0 < len(found.scores) <= 3 * BOXES_AN_OBJECT
        assert bool((found.scores >= 0.49).all())
        assert int(found.labels.max()) < 40


def test_a_training_step_changes_the_weights_it_learns() -> None:
    step = calls(Setting(side=64, batch=1, objects=2, classes=3), "cpu", 0)["training step"]
    model = step.args[0]  # type: ignore[attr-defined]
    before = [parameter.clone() for parameter in model.parameters()]
    step()
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters()))


def test_the_data_set_has_the_images_and_boxes_that_were_asked_for() -> None:
    with coco_data(5) as root:
        dataset = Coco(str(root), "train")
        assert len(dataset) == 5
        assert all(len(dataset.target(index)) == 7 for index in range(5))
        assert dataset[4].image.shape == (96, 128, 3)
    assert not root.exists()
    bytes_taken = data_peak(3)
    assert bytes_taken is None or bytes_taken >= 0
