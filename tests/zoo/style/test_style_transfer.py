"""Style transfer as a user meets it: one image by `detkit style`, and a network by `detkit train`."""

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from detkit.cli import main
from detkit.cli.parser import config_values, parse_options
from detkit.data.video import VideoReader, VideoWriter
from detkit.errors import CheckpointError, DetkitError
from detkit.model import read_checkpoint
from detkit.registry import heads, option_names
from detkit.tasks.drawing import write_image
from detkit.zoo.style.transfer import StyleOptions, optimise

Run = Callable[..., tuple[int, str, str]]
HEAD = """
head:
  name: style
  network: {name: vgg11, layers: [conv1_1, conv2_1, conv3_1]}
  content_map: 2
  style_maps: [0, 1]
  style_weights: [100.0, 1.0e+4]
  content_weight: 0.01
  variation_weight: 0.0
  style_size: 40
  width: 4
  blocks: 1
"""
FAST = """
data: {name: images, root: photos, val_fraction: 0.3}
backbone: {name: pixels}
input: {size: [32, 32], resize: crop}
train: {epochs: 2, batch_size: 4, workers: 0, optimizer: adam, lr: 0.003, ema_decay: 0.9}
name: fast
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten photos of different sizes, a style, and both configs."""
    random = np.random.default_rng(0)
    for number in range(10):
        cells = random.integers(0, 255, (6 + number % 3, 7, 3), dtype=np.uint8)
        write_image(tmp_path / "photos" / f"{number}.png", cells.repeat(7, axis=0).repeat(7, axis=1))
    write_image(tmp_path / "paint.png", random.integers(0, 255, (50, 60, 3), dtype=np.uint8))
    (tmp_path / "style.yaml").write_text(f"{HEAD}optimizer: adam\nsteps: 6\nevery: 3\n")
    text = HEAD.replace("  name: style\n", "  name: style\n  style_image: paint.png\n")
    (tmp_path / "fast.yaml").write_text(f"{text}{FAST}runs: {tmp_path / 'runs'}\n")
    return tmp_path


def test_the_config_in_the_repository_is_one_of_style_transfer() -> None:
    values = config_values(StyleOptions, str(Path(__file__).parents[3] / "configs" / "style.yaml"), "style")
    arguments = ["--content", "a.jpg", "--style", "b.jpg"]
    options = parse_options(StyleOptions, "style", arguments, positional=False, values=values)
    assert options is not None
    assert (options.head["name"], options.optimizer) == ("style", "lbfgs")
    assert options.head.keys() - {"name"} <= option_names(heads.get("style"))


def test_an_image_takes_on_a_style(run: Run, folder: Path) -> None:
    out = folder / "out"
    images = ("--content", folder / "photos/0.png", "--style", folder / "paint.png")
    status, output, error = run("style", folder / "style.yaml", *images, "--output", out, "--lr=0.05")
    assert status == 0, error
    assert sorted(path.name for path in out.iterdir()) == [
        "0_in_paint.png", "losses.csv", "step_00000.jpg", "step_00003.jpg", "step_00006.jpg",
    ]  # fmt: skip
    with (out / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert float(rows[0]["content"]) == 0  # it starts as the content
    assert float(rows[-1]["total"]) < 0.8 * float(rows[0]["total"])
    assert float(rows[3]["total"]) == pytest.approx(
        sum(float(rows[3][key]) for key in ("content", "style", "variation"))
    )
    result = np.asarray(Image.open(out / "0_in_paint.png")).astype(int)
    content = np.asarray(Image.open(folder / "photos/0.png")).astype(int)
    assert result.shape == content.shape
    assert 5 < np.abs(result - content).mean() < 100
    assert f"{float(rows[0]['total']):.4g} -> {float(rows[-1]['total']):.4g}" in output


def test_options_of_the_command_line_win(run: Run, folder: Path) -> None:
    images = ("--content", folder / "photos/0.png", "--style", folder / "paint.png", "--output", folder / "out")
    options = ("--optimizer", "lbfgs", "--lr", "0.5", "--size", "20", "--steps", "3", "--head.content_weight", "0")
    status, _, error = run("style", folder / "style.yaml", *images, *options, "--head.network.name=vgg16")
    assert status == 0, error
    assert Image.open(folder / "out/0_in_paint.png").size == (20, 17)
    with (folder / "out/losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {row["content"] for row in rows} == {"0.0"}
    assert float(rows[-1]["total"]) < float(rows[0]["total"])


def test_mistakes_are_one_paragraph(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder / "style.yaml"
    content, style = ("--content", folder / "photos/0.png"), ("--style", folder / "paint.png")

    def fails(arguments: tuple[object, ...], *parts: str) -> None:
        status, _, error = run("style", *arguments, "--output", folder / "bad")
        assert status == 1
        assert error.startswith("detkit: ")
        assert error.strip().count("\n") == 0
        for part in parts:
            assert part in error, error

    fails((config, *style), "content")
    fails((config, *content, "--style", "nowhere.jpg"), "'nowhere.jpg' does not exist")
    fails((config, *content, *style, "--stpes", "3"), "'--stpes'", "Did you mean 'steps'")
    fails((config, *content, *style, "--steps", "0"), "steps", "at least 1")
    fails((config, *content, *style, "--head.contnt_weight", "3"), "contnt_weight", "Did you mean 'content_weight'")
    fails((config, *content, *style, "--size", "3"), "3 x 3 pixels is too small for the loss network")
    fails((config, *content, *style, "--device", "cuda:77"), "cuda:77")
    monkeypatch.setattr("detkit.backbones.weights.downloaded", _no_network)
    fails((config, *content, *style, "--head.network.weights", "imagenet"), "give weights its path (.pth")
    fails((folder / "fast.yaml", *content, *style), "'data'", "not an option of detkit style")
    fails((folder / "absent.yaml", *content, *style), "absent.yaml", "style.yaml")
    fails((), "detkit style needs a config as its first argument")
    status, _, error = run("infer", config, *content, *style)
    assert status == 1
    assert "takes a run folder or a checkpoint, but" in error
    assert "detkit style" in error


def test_a_loss_that_is_no_number_stops(folder: Path) -> None:
    head = heads.build(yaml.safe_load(HEAD)["head"], "head", channels=(3,), strides=(1,), num_classes=0)
    head.content_weight = float("inf")
    options = StyleOptions("a.jpg", "b.jpg", {})
    with pytest.raises(DetkitError, match=r"The loss is nan after 0 steps\. Lower lr"):
        optimise(head, torch.rand(1, 3, 20, 20), options, lambda losses, image: None)


def _no_network(download: object, what: str, remedy: str) -> None:
    raise CheckpointError(f"{what} cannot be downloaded: give weights its path (.pth or .safetensors).")


def test_a_network_learns_to_paint_and_paints_images_and_videos(run: Run, folder: Path) -> None:
    status, output, error = run("train", folder / "fast.yaml")
    assert status == 0, error
    trained = folder / "runs/style/fast"
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["total"]) == pytest.approx(sum(float(row[name]) for name in ("content", "style", "variation")))
    assert "total" in output
    assert sorted(path.name for path in (trained / "images").iterdir())[0] == "training_batch.jpg"
    # What is needed to score it is in the checkpoint: neither the style nor the loss network's weights are read again.
    tensors = read_checkpoint(trained)[0]
    assert tensors["head.gram_1"].abs().sum() > 0
    (folder / "paint.png").rename(folder / "gone.png")
    status, output, error = run("eval", trained)
    assert status == 0, error
    best = min(float(row["total"]) for row in rows)
    assert f"{best:.4g}" in output

    status, output, error = run("infer", trained, "--source", folder / "photos", "--output", folder / "out")
    assert status == 0, error
    for path in (folder / "photos").iterdir():
        assert Image.open(folder / f"out/images/{path.stem}.jpg").size == Image.open(path).size
    records = json.loads((folder / "out/predictions.json").read_text())
    assert records[0] == {"image_id": 0, "width": 49, "height": 42}

    with VideoWriter(folder / "video.mp4", Fraction(24)) as writer:
        for number in range(5):
            writer.write(np.full((40, 46, 3), 40 * number, dtype=np.uint8))
    status, output, error = run(
        "infer", trained, "--source", folder / "video.mp4", "--output", folder / "out2", "--batch", 2
    )
    assert status == 0, error
    with VideoReader(folder / "out2/video.mp4") as reader:
        painted = list(reader)
    assert len(painted) == 5
    assert reader.rate == 24
    assert painted[0].shape == (40, 46, 3)
    records = json.loads((folder / "out2/predictions.json").read_text())
    assert [record["image_id"] for record in records] == [0, 1, 2, 3, 4]


def test_a_run_goes_on_where_it_ended(run: Run, folder: Path) -> None:
    assert run("train", folder / "fast.yaml", "--name", "whole")[0] == 0
    assert (
        run("train", folder / "fast.yaml", "--train.epochs", 1, "--train.schedule", "constant", "--name", "a")[0] == 0
    )
    assert run("train", folder / "fast.yaml", "--train.schedule", "constant", "--name", "b")[0] == 0
    (folder / "paint.png").unlink()
    assert run("train", "--resume", folder / "runs/style/a", "--train.epochs", 2)[0] == 0
    first, second = (read_checkpoint(folder / f"runs/style/{name}/checkpoints/last.safetensors")[0] for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
