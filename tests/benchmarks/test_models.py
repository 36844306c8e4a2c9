"""The benchmarks of whole networks, through the command line, on an image of a few pixels."""

import contextlib
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import inference, learning, options, train_step
from benchmarks.__main__ import main
from benchmarks.harness import peak_rise
from benchmarks.models import (
    detkit_model,
    made_up_image,
    memory,
    photos,
    plausible_model,
)
from detkit.errors import DetkitError
from detkit.structures import Detections

NAME, SIZE = "maskrcnn_resnet50_fpn", 64


@pytest.fixture(scope="module")
def picture():
    return made_up_image(60, 90, seed=1)


@pytest.fixture(scope="module")
def state(picture):
    return plausible_model(NAME, SIZE, picture, seed=0).state_dict()


@pytest.fixture
def few_proposals(monkeypatch, state):
    """Networks of the same weights, which look at 50 regions instead of 1000."""
    from benchmarks import models

    whole = models.torchvision_model

    def small(name, size):
        model = whole(name, size)
        model.rpn._post_nms_top_n = {"training": 60, "testing": 50}
        return model

    def with_weights(name, size, image, seed):
        model = small(name, size)
        model.load_state_dict(state)
        return model

    def ours(name, state, size):
        model = detkit_model(name, state, size)
        model.head.rpn.amounts, model.head.rpn.train_amounts = (1000, 50), (2000, 60)
        return model

    monkeypatch.setattr(models, "torchvision_model", small)
    monkeypatch.setattr(models, "detkit_model", ours)
    for module in (inference, learning, train_step):
        monkeypatch.setattr(module, "detkit_model", ours)
        monkeypatch.setattr(module, "plausible_model", with_weights)


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch, picture, few_proposals):
    """A benchmark through the command line; what it would run in processes of its own, it runs here."""

    def here(code):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        return json.loads(printed.getvalue())

    for module in (inference, train_step):
        monkeypatch.setattr(module, "run_python", here)
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train_step, "MEMORY_STEPS", 1)
    Image.fromarray(picture).save(tmp_path / "picture.png")

    def call(name, *arguments):
        output = tmp_path / "result.json"
        common = ("--models", NAME, "--size", str(SIZE), "--device", "cpu", "--threads", "1")
        rounds = () if name == "learning" else ("--rounds", "2")
        given = (*common, *rounds, "--source", str(tmp_path / "picture.png"), "--output", str(output), *arguments)
        status = main([name, *given])
        printed = capsys.readouterr()
        return status, printed.out, printed.err, json.loads(output.read_text()) if output.exists() else None

    return call


def check_rows(case, work, samples):
    rows = {row["name"]: row for row in case["rows"]}
    assert set(rows) == {"detkit", "torchvision"}
    assert case["work"] == work
    for row in rows.values():
        assert len(row["samples_us"]) == samples
        assert row["rate"] == pytest.approx(work / row["median_us"] * 1e6)
    assert rows["detkit"]["ratio"] == pytest.approx(rows["torchvision"]["median_us"] / rows["detkit"]["median_us"])
    for name, found in case["facts"]["memory"].items():
        assert rows[name]["peak_bytes"] == found["peak"]
        assert found["peak"] is None or found["peak"] == found["weights"] + found["calls"]


def test_inference(bench):
    status, output, error, report = bench("inference")
    assert status == 0, error
    [case] = report["cases"]
    check_rows(case, work=1, samples=2)
    assert case["facts"]["detections"][0] > 5
    assert {row["name"]: row["differences"] for row in case["rows"]} == {"torchvision": None, "detkit": 0}
    assert set(case["facts"]["stages_ms"]) == set(inference.STAGES)
    assert all(spent > 0 for spent in case["facts"]["stages_ms"].values())
    for part in ("times as fast", "memory: detkit", NAME, "normalise, backbone, neck"):
        assert part in output


def test_train_step(bench):
    status, output, error, report = bench("train_step", "--batch", "2", "--rounds", "1")
    assert status == 0, error
    [case] = report["cases"]
    check_rows(case, work=2, samples=1)
    losses = case["facts"]["losses"]
    assert set(losses) == {"objectness", "proposal_box", "class", "box", "mask"}
    for values in losses.values():
        assert values["detkit"] == pytest.approx(values["torchvision"], rel=0.01)
        assert values["detkit"] > 0
    assert report["conditions"] == train_step.CONDITIONS.format(precision="fp32")
    assert "a step on cpu" in output


def test_learning(bench, monkeypatch):
    monkeypatch.setattr(learning, "SEEDS", (0, 1))
    monkeypatch.setattr(learning, "LAST_STEPS", 2)
    monkeypatch.setattr(options, "LAST_STEPS", 2)
    status, output, error, report = bench("learning", "--batch", "1", "--steps", "3", "--precision", "bf16")
    assert status == 0, error
    [case] = report["cases"]
    for side in ("torchvision", "detkit"):
        curves = case["facts"]["losses"][side]
        assert [len(curve) for curve in curves] == [3, 3]
        for curve, end in zip(curves, case["facts"]["ends"][side], strict=True):
            assert end == pytest.approx(sum(curve[1:]) / 2)
    mine, theirs = ([curve[0] for curve in case["facts"]["losses"][side]] for side in ("detkit", "torchvision"))
    # The same weights and objects; of the anchors and proposals each side draws its own.
    assert mine == pytest.approx(theirs, rel=0.25)
    assert len(set(theirs)) == 2
    for part in ("detkit in bf16", "range of the seeds", NAME):
        assert part in output


def test_another_network_is_an_error(bench, monkeypatch):
    whole = inference.detkit_model

    def disturbed(name, state, size):
        model = whole(name, state, size)
        with torch.no_grad():
            model.head.regions.box_predictor.bias += 1
        return model

    for module in (inference, train_step):
        monkeypatch.setattr(module, "detkit_model", disturbed)
    status, _, error, report = bench("inference")
    assert (status, report) == (1, None)
    assert "detkit's detections are not torchvision's" in error
    status, _, error, report = bench("train_step", "--batch", "1")
    assert (status, report) == (1, None)
    assert "detkit's loss 'box' is" in error


def test_unmatched_detections_are_counted():
    boxes = torch.tensor([[1.0, 2, 30, 40], [5, 5, 9, 9], [1, 2, 30, 40]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 4, 5])
    masks = torch.zeros(3, 50, 50, dtype=torch.bool)
    masks[:, 2:40, 1:30] = True
    found = Detections(boxes, scores, labels, masks)
    same = {"boxes": boxes, "scores": scores, "labels": labels + 1, "masks": masks[:, None].float()}
    assert inference.unmatched(found, same) == 0
    assert inference.unmatched(found[torch.tensor([2, 0, 1])], same) == 0
    assert inference.unmatched(found, same | {"labels": labels}) == 6
    assert inference.unmatched(found, same | {"scores": scores + torch.tensor([0, 0, 0.01])}) == 2
    assert inference.unmatched(found, same | {"boxes": boxes + torch.tensor([[0.2], [0], [0]])}) == 2
    cut = same["masks"].clone()
    cut[0, :, 35:] = 0
    assert inference.unmatched(found, same | {"masks": cut}) == 2
    assert inference.unmatched(found[torch.tensor([0])], same) == 2
    none = {"boxes": boxes[:0], "scores": scores[:0], "labels": labels[:0]}
    assert inference.unmatched(found, none) == 3
    assert inference.unmatched(replace(Detections.empty(), masks=masks[:0]), none) == 0


def test_few_boxes_have_a_high_score(state, picture):
    model = detkit_model("maskrcnn_resnet50_fpn", state, SIZE)
    with torch.no_grad():
        outputs = model(model.fit.image(picture)[None], ((SIZE, 96),))
        proposals = model.head.rpn.propose(outputs.proposals, model.head.rpn.amounts)
        logits, _ = model.head.regions(outputs.features, proposals)
    over = (logits.softmax(-1)[:, 1:] > 0.05).sum().item()
    assert 200 < over < 350
    assert logits.isfinite().all()


def test_training_batches_are_made_up_the_same_way(picture):
    batch = train_step.training_batch([picture], 80, 3, seed=4)
    again, other = (train_step.training_batch([picture], 80, 3, seed=seed) for seed in (4, 5))
    assert batch.images.shape == (3, 3, 80, 80)
    assert batch.sizes == ((80, 80),) * 3
    for target, same, different in zip(batch.targets, again.targets, other.targets):
        assert torch.equal(target.boxes, same.boxes)
        assert not torch.equal(target.boxes, different.boxes)
        assert len(target) == train_step.OBJECTS
        assert target.boxes.min() >= 0
        assert target.boxes.max() <= 80
        for box, mask in zip(target.boxes, target.masks):
            width, height = (box[2:] - box[:2]).tolist()
            assert mask.sum().item() == pytest.approx(np.pi / 4 * width * height, rel=0.1, abs=6)


@pytest.mark.skipif(peak_rise(int) is None, reason="needs Linux's counters of memory")
def test_memory_counts_weights_and_calls():
    def load():
        weights = torch.ones(8_000_000)
        torch.ones(30_000_000)  # what loading takes for a moment
        return lambda: (weights + 1).sum()

    found = memory(load, "cpu")
    assert found["weights"] == pytest.approx(32e6, abs=4e6)
    assert found["calls"] == pytest.approx(32e6, abs=4e6)
    assert found["peak"] == found["weights"] + found["calls"]
    assert found["libraries"] > 50e6


def test_images(tmp_path, monkeypatch, picture):
    Image.fromarray(picture).save(tmp_path / "one.png")
    source, images = photos(str(tmp_path))
    assert source == str(tmp_path)
    assert [image.shape for image in images] == [(60, 90, 3)]
    monkeypatch.setitem(sys.modules, "skimage", None)
    source, images = photos(None)
    assert source == "made-up images"
    for image in images:
        assert image.dtype == np.uint8
        assert image.std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inference", "--models", "fasterrcnn_resnet50"], "Did you mean 'fasterrcnn_resnet50_fpn'?"),
        (["inference", "--size", "3"], "--size must be at least 32"),
        (["inference", "--batch", "2"], "'--batch' is not a valid option of python -m benchmarks inference"),
        (["train_step", "--batch", "0"], "--batch must be at least 1"),
        (["learning", "--steps", "9"], "--steps must be at least 10"),
        (["learning", "--rounds", "3"], "--rounds and --seconds have no use"),
        (["train_step", "--source", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main([*arguments, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_benchmark():
    with pytest.raises(DetkitError, match="has the loss nan"):
        train_step._check("detkit", float("nan"))
