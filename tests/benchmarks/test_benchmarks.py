"""Each benchmark through the command line, on tiny inputs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import ops

from benchmarks import peers
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.inputs import KINDS, anchors_and_targets
from benchmarks.nms import ExactCheck
from detkit.boxes import nms
from detkit.errors import DetkitError
from detkit.schema import option_names

CHECKOUT = Path(__file__).parents[2]
TINY = ("--rounds", "2", "--seconds", "0.01", "--device", "cpu")


@pytest.fixture
def bench(tmp_path, capsys):
    def call(*arguments):
        output = tmp_path / "deep" / "result.json"
        status = main([*arguments, *TINY, "--output", str(output)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err, json.loads(output.read_text()) if output.exists() else None

    return call


@pytest.fixture
def no_new_process(monkeypatch):
    """What is measured in processes of its own is tested once; elsewhere it would only take time."""
    monkeypatch.setattr("benchmarks.nms.run_python", lambda code: [0.1, 0.2, 0.05])
    peaks = [[{"detkit": 0, "torchvision": 0}]] * 2
    monkeypatch.setattr("benchmarks.matching.run_python", lambda code: peaks)


def test_nms(bench, no_new_process, tmp_path):
    status, output, error, report = bench("nms", "--sizes", "20,200", "--plot")
    assert status == 0, error
    assert [(case["kind"], case["work"]) for case in report["cases"]] == [(k, n) for k in KINDS for n in (20, 200)]
    assert set(report) == {*("benchmark", "command", "date", "hardware", "options", "growth", "warm_start", "cases")}
    assert report["command"].startswith("python -m benchmarks nms --sizes 20,200")
    assert (report["options"]["threads"], report["options"]["seed"]) == (1, 0)
    assert report["warm_start"]["extra_s"] == pytest.approx(0.25)
    assert report["growth"]["detector cpu"]["factor"]["detkit"] > 0
    for case in report["cases"]:
        rows = {row["name"]: row for row in case["rows"]}
        assert {"detkit", "torchvision", "OpenCV", "NumPy loop", "torch.sort of scores"} <= set(rows)
        assert ("torchvision per image" in rows) == (case["kind"] == "batched")
        assert rows["torchvision"]["ratio"] == 1
        assert rows["detkit"]["differences"] == 0
        assert 0 < case["facts"]["kept"] <= case["work"]
        for row in rows.values():
            assert 1 <= len(row["samples_us"]) <= 2
            assert row["rate"] == pytest.approx(case["work"] / row["median_us"] * 1e6)
    for part in ("detector on cpu", "kept", "times as fast as torchvision", "boxes a second", "20 to 200"):
        assert part in output
    image = (tmp_path / "deep" / "result.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_kinds_and_no_plot(bench, no_new_process, tmp_path):
    status, _, error, report = bench("nms", "--sizes", "20", "--kinds", "dense, batched", "--plot", "false")
    assert status == 0, error
    assert [case["kind"] for case in report["cases"]] == ["dense", "batched"]
    assert not list(tmp_path.rglob("*.png"))


def test_iou(bench):
    status, output, error, report = bench("iou", "--sizes", "30x4,5x5")
    assert status == 0, error
    assert [case["size"] for case in report["cases"]] == ["30x4", "5x5"]
    assert {row["name"] for row in report["cases"][0]["rows"]} >= {"detkit", "torchvision", "NumPy", "supervision"}
    assert all(row["differences"] == 0 for case in report["cases"] for row in case["rows"])
    assert report["left_out"] == []
    assert "pairs a second" in output


def test_matching(bench):
    # the one test that measures memory, in a process of its own
    status, output, error, report = bench("matching", "--sizes", "50x3")
    assert status == 0, error
    assert [case["kind"] for case in report["cases"]] == ["match_ssd", "match_two_thresholds"]
    for row in report["cases"][0]["rows"]:
        assert row["differences"] == 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    assert "match_two_thresholds on cpu" in output


def test_warm_start():
    from benchmarks.nms import warm_start

    found = warm_start(1)
    assert found["extra_s"] == pytest.approx(found["import_s"] + found["first_call_s"] - found["second_call_s"])
    assert found["first_call_s"] > found["second_call_s"]


def without_the_last(boxes, scores, threshold, *keys):
    return nms(boxes, scores, threshold, *keys)[:-1]


def wrong_order(boxes, scores, threshold, *keys):
    return nms(boxes, scores, threshold, *keys).flip(0)


@pytest.mark.parametrize("kind", ["detector", "batched"])
@pytest.mark.parametrize(
    ("wrong", "message"), [(without_the_last, "1 boxes are kept by one"), (wrong_order, "the order differs")]
)
def test_a_wrong_suppression_is_an_error(bench, no_new_process, monkeypatch, kind, wrong, message):
    monkeypatch.setattr("benchmarks.nms.nms", wrong)
    status, _, error, report = bench("nms", "--sizes", "50", "--kinds", kind, "--plot", "false")
    assert status == 1
    assert error.startswith("benchmarks: detkit.boxes.nms on cpu is not torchvision.ops.nms")
    assert message in error
    assert report is None


def test_a_wrong_iou_is_an_error(bench, monkeypatch):
    monkeypatch.setattr("benchmarks.iou.pairwise_iou", lambda a, b: ops.box_iou(a, b) + 2e-6)
    status, _, error, _ = bench("iou", "--sizes", "8x4")
    assert status == 1
    assert "32 entries" in error


def test_a_wrong_matching_is_an_error(bench, no_new_process, monkeypatch):
    from detkit.boxes import match_ssd

    monkeypatch.setattr("benchmarks.matching.match_ssd", lambda a, b: match_ssd(a, b, threshold=0.01))
    status, _, error, _ = bench("matching", "--sizes", "60x3")
    assert status == 1
    assert "anchors have another target" in error


def test_iou_without_memory_is_left_out_and_says_so(bench, monkeypatch):
    monkeypatch.setattr("benchmarks.iou._free_memory", lambda: 3000)
    status, output, _, report = bench("iou", "--sizes", "8x4,8x8")
    assert status == 0
    assert [case["size"] for case in report["cases"]] == ["8x4"]
    assert "left out: 8x8: needs" in output
    assert len(report["left_out"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nmss"], "There is no benchmark 'nmss'. Did you mean 'nms'?"),
        (["nms", "--kinds", "detectr"], "--kinds holds 'detectr'. Did you mean 'detector'?"),
        (["nms", "--size", "3"], "'--size' is not a valid option of python -m benchmarks nms"),
        (["iou", "--sizes", "3"], "which is not two numbers"),
        (["table"], "There is no benchmark 'table'. Did you mean 'tables'?"),
        (["tables", "--quick"], "python -m benchmarks tables takes no arguments, but got '--quick'"),
        (["nms", "20"], "'20' is not an option"),
        (["nms", "--rounds", "{class_path: subprocess.Popen}"], "'--rounds' must be a whole number or null"),
        (["proposals", "--data", "{class_path: subprocess.Popen}"], "'data' needs a 'name'"),
        (["proposals", "--config", "none.yaml"], "none.yaml"),
        ([], "The name of a benchmark comes first"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: ")
    assert error.count("\n") == 1
    assert message in error


def test_without_matplotlib_the_plot_is_refused_before_measuring(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error, report = bench("nms", "--sizes", "20")
    assert status == 1
    assert "pip install -e '.[plot]'" in error
    assert "--plot false" in error
    assert report is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_cuda_is_refused(capsys):
    assert main(["iou", "--device", "cuda"]) == 1
    assert "torch finds no GPU" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in (*BENCHMARKS, "tables", "lines"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_a_benchmark(capsys, name):
    assert main([name, "--help"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m benchmarks {name} " in output
    assert all(f"--{option} {option.upper()}" in output for option in option_names(BENCHMARKS[name][1]))
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(getattr(module, f"bench_{name}"))


def test_the_page_is_rewritten_from_the_results(capsys, monkeypatch):
    given = []
    monkeypatch.setattr("benchmarks.tables.rewrite", lambda *paths: given.extend(paths))
    assert main(["tables"]) == 0
    assert given == [CHECKOUT / "docs" / "pages" / "benchmarks.md", CHECKOUT / "benchmarks" / "results"]
    assert "benchmarks.md: nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["-m", "benchmarks", "nms", "--kinds", "none"], 1, "benchmarks: --kinds holds 'none'."),
        (["-m", "benchmarks.empty_images", "--help"], 0, ""),
        (["benchmarks/empty_images.py", "--help"], 0, ""),
    ],
)
def test_entries(command, status, message):
    done = subprocess.run([sys.executable, *command], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == status


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same_for_the_same_seed(kind):
    first, again, other = KINDS[kind](300, 5), KINDS[kind](300, 5), KINDS[kind](300, 6)
    assert torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)
    assert first.boxes.shape == (300, 4)
    assert (first.boxes[:, 2:] > first.boxes[:, :2]).all()
    assert ((first.scores > 0) & (first.scores < 1)).all()
    assert (first.groups is not None) == (kind == "batched")
    for count in (1, 5):
        assert len(KINDS[kind](count, 0).boxes) == count


def test_detector_boxes_keep_as_many_as_detectors_boxes_do():
    # the counts that the inputs are designed to give
    for count, expected in ((100, 62), (1000, 540), (10_000, 3954)):
        kept = [
            len(nms(given.boxes, given.scores, 0.5)) for given in (KINDS["detector"](count, seed) for seed in range(5))
        ]
        assert sum(kept) / len(kept) == pytest.approx(expected, rel=0.15)


def test_dense_boxes_all_stay():
    given = KINDS["dense"](1000, 0)
    assert len(nms(given.boxes, given.scores, 0.5)) == 1000
    assert (ops.box_iou(given.boxes, given.boxes) > 0).sum(1).float().mean() > 20


def test_targets_all_overlap_an_anchor():
    anchors, targets = anchors_and_targets(50, 20, 3)
    assert ops.box_iou(anchors, targets).max(0).values.min() > 0


@pytest.mark.parametrize("kind", ["detector", "batched"])
def test_peers_keep_what_torchvision_keeps(kind):
    given = KINDS[kind](300, 2)
    expected = peers.exact_nms(given, 0.5)
    found = peers.suppressions(given.groups is not None)
    assert len(found) >= 3
    for name, suppress in found.items():
        kept = suppress(given, 0.5)
        assert kept.dtype == torch.int64
        # Those that move classes apart by adding to coordinates lose digits by it.
        inexact = kind == "batched" and name in ("torchvision", "torchvision per image", "lsnms")
        assert len(set(kept.tolist()) ^ set(expected.tolist())) <= (2 if inexact else 0), name


def test_exact_nms_of_groups_is_best_first():
    given = KINDS["batched"](400, 1)
    assert torch.equal(
        peers.exact_nms(given, 0.5), nms(given.boxes, given.scores, 0.5, given.labels, given.image_index)
    )


def test_differences_of_a_peer_are_counted():
    given = KINDS["detector"](50, 0)
    check = ExactCheck(given, 0.5, "a case")
    assert check("cpu", "OpenCV", check.expected[1:]) == 1
    with pytest.raises(DetkitError, match="a case"):
        check("cpu", "detkit", check.expected[1:])


def test_ious_of_peers_agree():
    a, b = anchors_and_targets(40, 7, 1)
    for name, call in peers.ious().items():
        assert torch.allclose(call(a, b).float(), ops.box_iou(a, b), atol=1e-6), name
