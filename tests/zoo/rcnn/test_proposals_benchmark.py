"""The benchmark of proposals through the command line, on made-up images, with a stand-in for OpenCV."""

import json
import stat
import sys

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.options import ProposalsOptions
from benchmarks.proposals import COUNTS, ImageFile, best_overlaps, mean_average, recall

SHAPES = "{name: shapes, train_count: 2, val_count: 3, size: 64}"

STAND_IN = """#!{python}
import json, sys
import numpy as np

assert sys.argv[1].endswith("opencv_search.py") and sys.argv[2:] == ["fast", "1"]
print(json.dumps({{"version": "9.9"}}), flush=True)
for line in sys.stdin:
    height, width, _ = np.load(line.strip()).shape
    np.savez(line.strip()[:-4] + ".npz", boxes=np.array([[0, 0, width, height]], dtype=np.float32))
    print(json.dumps({{"seconds": 2.5}}), flush=True)
"""


@pytest.fixture
def bench(tmp_path, capsys):
    def call(*arguments):
        output = tmp_path / "deep" / "result.json"
        status = main(["proposals", *arguments, "--output", str(output)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err, json.loads(output.read_text()) if output.exists() else None

    return call


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_beside_a_peer(bench, peer, tmp_path):
    data = f"[{SHAPES}, {SHAPES.replace('64', '48')}]"
    status, output, error, report = bench("--data", data, "--peer-python", peer, "--rounds", "2", "--images", "2")
    assert status == 0, error
    assert report["peer_opencv"] == "9.9"
    assert [case["kind"] for case in report["cases"]] == ["shapes val", "shapes val"]
    for case in report["cases"]:
        assert case["work"] == 2
        rows = {row["name"]: row for row in case["rows"]}
        assert rows["OpenCV"]["rate"] == pytest.approx(1 / 2.5)
        assert rows["OpenCV"]["ratio"] == 1
        assert rows["detkit"]["ratio"] == pytest.approx(rows["detkit"]["rate"] * 2.5)
        assert len(rows["detkit"]["samples_us"]) == 4
        facts = case["facts"]
        assert facts["objects"] > 0
        assert facts["proposals"]["OpenCV"] == 1
        assert list(facts["recall"]["detkit"]) == [str(count) for count in COUNTS]
        assert facts["recall"]["detkit"]["2000"] > facts["recall"]["OpenCV"]["2000"]
        overlaps = list(facts["mabo"]["detkit"].values())
        assert overlaps == sorted(overlaps)
    assert "recall at IoU 0.5" in output
    assert (tmp_path / "deep" / "result.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_peer_it_says_so(bench, tmp_path):
    status, output, error, report = bench("--data", SHAPES, "--quick", "--plot", "false")
    assert status == 0, error
    assert "left out: OpenCV" in output
    assert [row["name"] for row in report["cases"][0]["rows"]] == ["detkit"]
    assert report["cases"][0]["rows"][0]["ratio"] is None
    assert not list(tmp_path.rglob("*.png"))


def test_the_data_of_a_config(bench, tiny_config):
    status, _, error, report = bench("--config", str(tiny_config), "--images", "2", "--plot", "false", "--quick")
    assert status == 0, error
    assert report["cases"][0]["size"] == "2 images"


def test_a_python_without_selective_search(bench):
    status, _, error, report = bench("--data", SHAPES, "--quick", "--peer-python", sys.executable)
    assert status == 1
    assert "failed in the Python of --peer-python" in error
    assert "opencv-contrib-python-headless" in error
    assert report is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --config CONFIG.yaml or --data"),
        (["--data", SHAPES, "--config", "a.yaml"], "Give either --config CONFIG.yaml or --data"),
        (["--data", SHAPES, "--images", "0"], "--images must be at least 1"),
        (["--data", SHAPES, "--device", "cuda"], "runs on the CPU"),
        (["--data", SHAPES, "--seconds", "3"], "--seconds has no use"),
        (["--data", "{name: shape}"], "Did you mean 'shapes'"),
        (["--data", SHAPES, "--peer-python", "/no/such/python"], "/no/such/python"),
    ],
)
def test_mistakes(bench, arguments, message):
    status, _, error, _ = bench(*arguments)
    assert status == 1
    assert message in error


def test_scores_by_hand():
    image = np.zeros((10, 10, 3), dtype=np.uint8)
    first = ImageFile(image, torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8]]), torch.tensor([0, 1]))
    second = ImageFile(image, torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0]))
    third = ImageFile(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    images = [first, second, third]
    proposals = [torch.tensor([[0.0, 0, 4, 3], [5, 5, 6, 6]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 1, 1]])]
    overlaps = best_overlaps(images, proposals)[10]
    assert overlaps.tolist() == [0.75, 0.0625, 0]
    assert recall(overlaps) == pytest.approx(1 / 3)
    assert mean_average(overlaps, images) == pytest.approx(((0.75 + 0) / 2 + 0.0625) / 2)


def test_more_proposals_count_only_as_far_as_they_are_asked_for():
    image = ImageFile(np.zeros((9, 9, 3), np.uint8), torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0]))
    proposals = torch.cat([torch.tensor([[5.0, 5, 6, 6]]).repeat(10, 1), torch.tensor([[0.0, 0, 4, 4]])])
    overlaps = best_overlaps([image], [proposals])
    assert (overlaps[10].item(), overlaps[50].item()) == (0, 1)


def test_options():
    assert ProposalsOptions(data={}).image_count == 30
    assert ProposalsOptions(data={}, quick=True).round_count == 1
