"""YOLOX beside Ultralytics: the protocol, the arithmetic and the rows, with stand-ins for Ultralytics."""

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import yolo
from benchmarks.__main__ import main
from benchmarks.models import made_up_image
from benchmarks.options import InferenceOptions
from benchmarks.yolo import BOXES, Peer, Timing, threshold, yolo_case, yolo_table, yolox
from detkit.errors import DetkitError
from detkit.tasks.drawing import write_image

STAND_IN = """#!{python}
import json, sys

assert sys.argv[1].endswith("ultralytics_predict.py"), sys.argv
print("a remark of its own")
print(json.dumps({{"version": "9.9", "gflops": 28.6, "arguments": sys.argv[2:]}}), flush=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    {before}
    print("another remark", flush=True)
    boxes = round(1000 * (1 - asked["conf"]))
    print(json.dumps({{"ms": 20.0 + number % 3, "cpu_ms": 40.0, "boxes": boxes, "threads": 3}}), flush=True)
"""
PACKAGE = """
from types import SimpleNamespace
from ultralytics.utils import torch_utils
__version__ = "0.1"

class YOLO:
    def __init__(self, name):
        print("building", name)
        self.model = name

    def predict(self, file, imgsz, conf, device, verbose):
        import torch
        torch.set_num_threads(torch_utils.NUM_THREADS)
        assert (device, verbose) == ("cpu", False)
        return [SimpleNamespace(boxes=list(range(imgsz if conf < 0.5 else len(file))))]
"""
UTILITIES = (
    "NUM_THREADS = 7\ndef get_flops(model, size):\n    return 5.5 if (model, size) == ('tiny.yaml', 640) else None\n"
)


def stand_in(folder: Path, before: str = "pass") -> str:
    path = folder / "peer"
    path.write_text(STAND_IN.format(python=sys.executable, before=before))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """A package `ultralytics` for processes that are started from here."""
    (folder / "ultralytics" / "utils").mkdir(parents=True)
    (folder / "ultralytics" / "__init__.py").write_text(content)
    (folder / "ultralytics" / "utils" / "__init__.py").write_text("")
    (folder / "ultralytics" / "utils" / "torch_utils.py").write_text(UTILITIES)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of an eighth of the width, on images of 64 pixels."""
    monkeypatch.setattr(yolo, "SIDE", 64)
    monkeypatch.setattr(yolo, "SIZES", {"yolox_s": (0.33, 0.0625)})


class TestPeer:
    def test_it_answers_as_the_program_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The program itself, in this Python, with a package in the place of ultralytics."""
        package(tmp_path, monkeypatch, PACKAGE)
        peer = Peer(sys.executable, "tiny.yaml", 2, tmp_path)
        assert peer.about == {"version": "0.1", "gflops": 5.5}
        answer = peer.predict("a.jpg", 0.1)
        assert answer.boxes == yolo.SIDE
        assert answer.ms > 0
        assert answer.cpu_ms >= 0
        assert peer.predict("a.jpg", 0.9).boxes == len("a.jpg")
        assert peer.about["threads"] == 2
        peer.close()

    def test_a_python_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DetkitError, match=r"'/no/such/python' of --peer-python does not start: No such file"):
            Peer("/no/such/python", "yolov8s.yaml", 1, tmp_path)

    def test_a_python_without_ultralytics(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package(tmp_path, monkeypatch, "raise ModuleNotFoundError(\"No module named 'ultralytics'\")")
        with pytest.raises(DetkitError, match=r"No module named 'ultralytics'\. .*pip install ultralytics"):
            Peer(sys.executable, "yolov8s.yaml", 1, tmp_path)

    @pytest.mark.parametrize(
        ("before", "reason"),
        [
            ("if number: raise ValueError('no memory is left')", "no memory is left"),
            ("if number: sys.exit(3)", "status 3"),
        ],
    )
    def test_one_that_ends_early_says_why(self, tmp_path: Path, before: str, reason: str) -> None:
        peer = Peer(stand_in(tmp_path, before), "yolov8s.yaml", 1, tmp_path)
        assert peer.predict("a.jpg", 0.9).boxes == 100
        for _ in range(2):  # while it ends, and when it has ended
            with pytest.raises(DetkitError, match=f"Ultralytics failed in the Python of --peer-python: .*{reason}"):
                peer.predict("a.jpg", 0.9)
        peer.close()


def boxes_above(scores: np.ndarray) -> yolo.Predict:
    return lambda file, conf: Timing(1.0, 1.0, int((scores > conf).sum()))


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_a_threshold_finds_about_so_many_boxes(scale: float) -> None:
    call = boxes_above(scale * np.random.default_rng(0).random(8400))
    found = call("", threshold(call, "")).boxes
    assert abs(found - BOXES) <= BOXES // 2


def test_a_threshold_takes_the_nearest_where_there_is_none() -> None:
    call = boxes_above(np.array([0.3] * 1000 + [0.6] * 7))
    assert call("", threshold(call, "")).boxes == 7
    assert threshold(boxes_above(np.array([])), "") <= 1


def test_sides_take_turns_image_by_image() -> None:
    asked: list[tuple[str, str, float]] = []

    def side(name: str) -> yolo.Predict:
        return lambda file, conf: asked.append((name, file, conf)) or Timing(len(asked), 0.0, 0)  # type: ignore[func-returns-value]

    sides = {name: side(name) for name in "ab"}
    options = InferenceOptions(rounds=2, seconds=100)
    samples = yolo._in_turns(sides, ["x", "y"], {"a": 0.1, "b": 0.2}, options)
    assert "".join(name + file for name, file, _ in asked) == "axay" + "bxby" + "bxby" + "axay"
    assert {(name, conf) for name, _, conf in asked} == {("a", 0.1), ("b", 0.2)}
    assert [timing.ms for timing in samples["a"]] == [1, 2, 7, 8]
    one_round = yolo._in_turns(sides, ["x"], {"a": 0.1, "b": 0.2}, InferenceOptions(rounds=9, seconds=0))
    assert [len(taken) for taken in one_round.values()] == [1, 1]


def test_a_row_has_the_median_of_the_rounds() -> None:
    row = yolo._row("a", [Timing(ms, 0.0, 0) for ms in (10, 20, 30, 40, 11, 21)], 2)
    assert row.samples_us == [30e3, 70e3, 32e3]
    assert row.median_us == 32e3
    assert row.rate == pytest.approx(2 / 0.032)


class FakePredictor:
    """Finds as many boxes as scores of 0.01, 0.02 ... 1 are above the threshold, ten of each."""

    made: list[tuple[str, bool]]

    def __init__(self, model: Any, device: str, precision: str, compile: bool) -> None:
        self.network, self.choices = self, f"{device} {precision} {compile}"
        self.made.append((precision, compile))

    def predict(self, file: str, conf: float) -> list[int]:
        assert Path(file).stat().st_size > 0
        return [0] * (10 * int(100 * (1 - conf)))


@pytest.fixture
def fake_predictor(monkeypatch: pytest.MonkeyPatch) -> type[FakePredictor]:
    FakePredictor.made = []
    monkeypatch.setattr(yolo, "Predictor", FakePredictor)
    monkeypatch.setattr(yolo, "yolox", lambda *_: None)
    monkeypatch.setattr(yolo, "_gflops", lambda _: 26.8)
    return FakePredictor


IMAGES = [made_up_image(40, 60, seed) for seed in (1, 2)]


def test_ratios_are_those_to_ultralytics(tmp_path: Path, fake_predictor: type[FakePredictor]) -> None:
    options = InferenceOptions(peer_python=stand_in(tmp_path), precision="bf16", rounds=3, seconds=100, threads=1)
    case = yolo_case("yolox_s", IMAGES, options)
    assert [row.name for row in case.rows] == ["ultralytics", "detkit", "detkit, fp32"]
    assert fake_predictor.made == [("bf16", False), ("fp32", False)]
    peer = case.rows[0]
    assert (peer.ratio, len(peer.samples_us), case.work) == (1.0, 3, 2)
    assert peer.median_us == pytest.approx(41e3, abs=2e3)  # two images of 20, 21 or 22 ms
    for row in case.rows[1:]:
        assert row.ratio == pytest.approx(peer.median_us / row.median_us)
    facts = case.facts
    assert facts["peer"] == {
        **{"model": "yolov8s.yaml", "version": "9.9", "gflops": 28.6, "threads": 3},
        "arguments": ["yolov8s.yaml", "640", "1"],
    }
    assert facts["gflops"] == 26.8
    assert facts["cpu_ms"]["ultralytics"] == 40
    assert all(len(found) == 2 and abs(found[0] - BOXES) <= BOXES // 2 for found in facts["boxes"].values())
    table = yolo_table([case])
    cells = list(zip(*(list(column.cells) for column in table.columns)))
    assert [row[1] for row in cells] == ["ultralytics 9.9, yolov8s.yaml", "detkit", "detkit, fp32"]
    assert cells[0][2:] == (f"{peer.median_us / 2e3:.1f} ms", "40.0 ms", "1.00")


def test_without_a_peer_there_are_no_ratios(fake_predictor: type[FakePredictor]) -> None:
    case = yolo_case("yolox_s", IMAGES, InferenceOptions(rounds=1, threads=1))
    assert [(row.name, row.ratio) for row in case.rows] == [("detkit", None)]
    assert case.facts["peer"] is None
    assert [list(column.cells) for column in yolo_table([case]).columns][-1] == [""]


def test_a_peer_that_fails_stops_the_benchmark(tmp_path: Path, fake_predictor: type[FakePredictor]) -> None:
    options = InferenceOptions(peer_python=stand_in(tmp_path, "if number > 8: sys.exit(1)"), rounds=50, threads=1)
    with pytest.raises(DetkitError, match="Ultralytics failed"):
        yolo_case("yolox_s", IMAGES, options)


def test_through_the_command_line(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "image.png", IMAGES[0])
    output = tmp_path / "result.json"
    given = ["--models", "yolox_s", "--peer_python", stand_in(tmp_path), "--source", str(tmp_path / "image.png")]
    common = ["--device", "cpu", "--rounds", "2", "--threads", "1", "--precision", "fp32", "--output", str(output)]
    assert main(["inference", *given, *common]) == 0
    printed = capsys.readouterr().out
    for part in ("file to boxes on cpu", "ultralytics 9.9, yolov8s.yaml", "processor time"):
        assert part in printed
    [case] = json.loads(output.read_text())["cases"]
    assert (case["kind"], case["size"], case["work"]) == ("yolox_s", "64 px", 1)
    assert [row["name"] for row in case["rows"]] == ["ultralytics", "detkit"]
    assert case["rows"][1]["ratio"] == pytest.approx(case["rows"][0]["median_us"] / case["rows"][1]["median_us"])
    assert "cpu, fp32" in case["facts"]["choices"]["detkit"]
    assert case["facts"]["boxes"]["detkit"][0] > 0
    assert main(["inference", *given[:2], "--peer_python", "/no/such/python", *given[4:], *common]) == 1
    assert "does not start" in capsys.readouterr().err


def test_flops_are_those_that_are_published() -> None:
    """Table 1 of the paper: 26.8 GFLOPs at 640 pixels."""
    assert yolo._gflops(yolox("yolox_s", 0, IMAGES[0])) == pytest.approx(26.8, rel=0.01)


def test_random_weights_see_places_apart(small: None) -> None:
    model = yolox("yolox_s", 0, IMAGES[0])
    with torch.no_grad():
        outputs = model(model.fit.image(IMAGES[0])[None], ((64, 64),))
    scores = (outputs.class_logits.sigmoid() * outputs.objectness.sigmoid()[..., None]).amax(-1)
    assert float(scores.max() / scores.min()) > 3
    with pytest.raises(DetkitError, match="Did you mean 'yolox_s'"):
        yolox("yolox_m", 0, IMAGES[0])
