"""Training, evaluation and prediction by the command line, and the files that they write."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import Run
from PIL import Image

from detkit.cli import main
from detkit.config import Experiment, InputOptions, TrainOptions


def test_train_then_eval_then_infer(run: Run, tiny_config: Path, images: Path, tmp_path: Path) -> None:
    status, output, error = run("train", tiny_config)
    assert status == 0, error
    folder = tmp_path / "runs" / "detect" / "tiny"
    assert str(folder / "checkpoints" / "best.safetensors") in output
    assert "0: circle (raw id 0)" in output
    assert "batch      4 images a step: 1 x 4 on" in output
    status, output, error = run("eval", folder, "--save-json", tmp_path / "found.json")
    assert status == 0, error
    assert "VOC07" in output
    assert isinstance(json.loads((tmp_path / "found.json").read_text()), list)
    status, fast, error = run("eval", folder, "--precision", "fp32", "--device", "cpu")
    assert status == 0, error
    assert "norms folded" in fast
    assert fast[fast.index("mAP75") :].splitlines()[0] == output[output.index("mAP75") :].splitlines()[0]
    status, _, error = run("eval", folder, "--precision", "int8")
    assert status == 1
    assert "'precision' must be auto, fp32, bf16 or fp16" in error
    status, output, error = run("infer", folder, "--source", images, "--output", tmp_path / "out", "--conf", "0.05")
    assert status == 0, error
    assert "3 images" in output


def test_print_config(run: Run, tiny_config: Path) -> None:
    status, output, _ = run("train", tiny_config, "--train.epochs=77", "--print_config")
    assert status == 0
    assert "epochs: 77" in output
    assert "final_lr_factor: 0.01" in output


def test_infer_writes_what_is_asked_for(run: Run, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, _, error = run(
        *("infer", checkpoint, "--source", images, "--output", out, "--conf", "0", "--max-det", "5"),
        *("--save-txt", "--save-conf", "--save-crop"),
    )
    assert status == 0, error
    names = ["000012", "dritte ü", "second one"]
    assert sorted(path.name for path in (out / "images").iterdir()) == [f"{name}.jpg" for name in names]
    assert Image.open(out / "images" / "000012.jpg").size == (96, 96)
    records = json.loads((out / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == {12, "dritte ü", "second one"}
    assert len(records) == 15
    lines = (out / "labels" / "000012.txt").read_text().splitlines()
    assert len(lines) == 5
    values = [float(value) for value in lines[0].split()]
    record = next(record for record in records if record["image_id"] == 12)
    x, y, width, height = record["bbox"]
    expected = [record["category_id"], (x + width / 2) / 96, (y + height / 2) / 96, width / 96, height / 96]
    assert values == pytest.approx([*expected, record["score"]], abs=1e-5)
    assert len(list((out / "crops").rglob("*.jpg"))) == 15


@pytest.mark.parametrize("classes", ["circle", "[circle, 2]", "0,triangle"])
def test_infer_keeps_only_the_classes_asked_for(
    run: Run, checkpoint: Path, images: Path, tmp_path: Path, classes: str
) -> None:
    out = tmp_path / "out"
    options = ("--output", out, "--conf", "0", "--classes", classes, "--max-det", "7")
    status, _, error = run("infer", checkpoint, "--source", images, *options)
    assert status == 0, error
    records = json.loads((out / "predictions.json").read_text())
    assert {record["category_id"] for record in records} <= {0, 2}
    assert len(records) == 21


def test_infer_takes_one_image_and_a_glob(run: Run, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    for source, count in ((images / "000012.png", 1), (f"{images}/*", 2), (f"{images}/**/*.jpg", 1)):
        status, output, error = run("infer", checkpoint, "--source", source, "--output", tmp_path / "out")
        assert status == 0, error
        assert f"{count} image{'' if count == 1 else 's'}" in output
        assert (" ms each after the first 1)" in output) == (count == 2)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out2", "out3"]
    status, _, error = run("infer", checkpoint, "--source", "a.jpg", "b.jpg")
    assert status == 1
    assert "--source '*.jpg'" in error


def test_files_of_one_name_do_not_overwrite_each_other(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/x.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    assert run("infer", checkpoint, "--source", tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    written = tmp_path / "out" / "images"
    assert {path.relative_to(written).as_posix() for path in written.rglob("*.jpg")} == {
        "a/x.jpg",
        "b/x.png.jpg",
        "b/x.jpg.jpg",
    }


def test_no_detection_still_writes_everything(run: Run, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, _ = run("infer", checkpoint, "--source", images, "--output", out, "--conf", "1", "--save-txt")
    assert status == 0
    assert "nothing found" in output
    assert json.loads((out / "predictions.json").read_text()) == []
    assert (out / "labels" / "000012.txt").read_text() == ""
    assert len(list((out / "images").iterdir())) == 3


@pytest.mark.parametrize("script", ["train", "infer", "eval"])
def test_tools_are_doors_to_the_same_commands(script: str) -> None:
    path = Path(__file__).parents[2] / "tools" / f"{script}.py"
    result = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"usage: detkit {script}" in result.stdout


def test_help_lists_every_option_with_its_default(run: Run) -> None:
    status, output, _ = run("train", "--help")
    assert status == 0
    text = " ".join(output.split())
    for schema, prefix in ((Experiment, ""), (TrainOptions, "train."), (InputOptions, "input.")):
        for field in dataclasses.fields(schema):
            if field.name not in ("train", "input"):
                assert f"--{prefix}{field.name} {field.name.upper()} " in text
    assert "peak learning rate, for batch_size images per step. (a number; default: 0.01)" in text
    assert "(a whole number or 'all'; default: 0)" in text
    assert "bundled configs" in text
    assert " quickstart, " in text


def test_two_processes_share_an_epoch_and_one_folder(tiny_config: Path, tmp_path: Path) -> None:
    """Two processes on the CPU: whole batches, one run, the classes of the gradient in step."""
    command = [sys.executable, "-m", "detkit", "train", str(tiny_config)]
    options = ["--train.device", "cpu", "--train.devices", "2", "--train.epochs", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "batch      4 images a step: 2 x 2 on cpu" in result.stdout
    assert [path.name for path in (tmp_path / "runs" / "detect").iterdir()] == ["tiny"]


def test_training_ends_with_a_score_on_the_data_it_was_given(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A resumed run's best checkpoint may name the folder in which the data lay before.
    asked: list[str] = []
    folder = SimpleNamespace(best="best.safetensors", images="images", best_scores=None)
    monkeypatch.setattr("detkit.engine.train.train", lambda experiment, resume: folder)
    monkeypatch.setattr("detkit.cli.eval.run", asked.extend)
    assert main(["train", str(tiny_config), "--data.val_count", "3"]) == 0
    assert asked[:2] == ["best.safetensors", "--data"]
    assert json.loads(asked[2])["val_count"] == 3


@pytest.mark.parametrize(
    "options",
    [(), ("--train.lr", "10", "--train.epochs", "3"), ("--train.ema_decay", "0.9", "--train.batch_size", "5")],
)
def test_training_evaluates_once_and_prints_what_eval_prints(
    run: Run, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Also where the last epoch, of a far too high learning rate, is not the best."""
    with monkeypatch.context() as patch:
        patch.setattr("detkit.cli.eval.run", lambda arguments: pytest.fail("it was evaluated again"))
        status, trained, error = run("train", tiny_config, *options)
        assert status == 0, error
    folder = tmp_path / "runs" / "detect" / "tiny"
    status, evaluated, error = run("eval", folder)
    assert status == 0, error
    table = evaluated[evaluated.index("\n", evaluated.index(" images; ")) :]
    assert "AR_100" in table
    assert trained.endswith(table)
    # Nothing is left to train, so the best epoch is one of an earlier session.
    status, resumed, error = run("train", "--resume", folder)
    assert status == 0, error
    assert resumed.endswith(table)
