"""The command line, as a user meets it: what it writes, and one paragraph for each mistake."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.cli import COMMANDS, main
from detkit.config import Experiment, InputOptions, TrainOptions, load_experiment
from detkit.data.formats.shapes import Shapes
from detkit.errors import DetkitError
from detkit.model import build_model
from detkit.structures import ClassList

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def fails(result: tuple[int, str, str], *parts: str) -> None:
    """One paragraph on stderr that holds all of `parts`."""
    status, _, error = result
    assert status == 1
    assert error.startswith("detkit: ")
    assert error.strip().count("\n") == 0
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error


@pytest.fixture
def checkpoint(tiny_config: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    build_model(load_experiment([str(tiny_config)]), Shapes("val", val_count=1).classes).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    data = Shapes("val", val_count=3, size=96)
    Image.fromarray(data[0].image).save(folder / "000012.png")
    Image.fromarray(data[1].image).save(folder / "deep" / "second one.jpg")
    Image.fromarray(data[2].image).save(folder / "dritte ü.webp")
    return folder


def voc(root: Path, box: tuple[int, int, int, int] = (2, 3, 30, 40), name: str = "cell") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for index, split in enumerate(("train", "val")):
        stem = f"p{index}"
        Image.fromarray(np.full((60, 80, 3), 99, dtype=np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><size><width>80</width><height>60</height></size>\n"
            f"<object><name>{name}</name>\n<bndbox>{corners}</bndbox></object>\n</annotation>"
        )
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}\n")
    return root


def test_train_then_eval_then_infer(run: Run, tiny_config: Path, pictures: Path, tmp_path: Path) -> None:
    status, output, error = run("train", tiny_config)
    assert status == 0, error
    folder = tmp_path / "runs" / "detect" / "tiny"
    assert str(folder / "checkpoints" / "best.safetensors") in output
    assert "0: circle (raw id 0)" in output
    assert "batch      4 pictures a step: 1 x 4 on" in output
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
    status, output, error = run("infer", folder, "--source", pictures, "--output", tmp_path / "out", "--conf", "0.05")
    assert status == 0, error
    assert "3 pictures" in output


def test_print_config(run: Run, tiny_config: Path) -> None:
    status, output, _ = run("train", tiny_config, "--train.epochs=77", "--print_config")
    assert status == 0
    assert "epochs: 77" in output
    assert "final_lr_factor: 0.01" in output


def test_infer_writes_what_is_asked_for(run: Run, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, _, error = run(
        *("infer", checkpoint, "--source", pictures, "--output", out, "--conf", "0", "--max-det", "5"),
        *("--save-txt", "--save-conf", "--save-crop"),
    )
    assert status == 0, error
    names = ["000012", "dritte ü", "second one"]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [f"{name}.jpg" for name in names]
    assert Image.open(out / "pictures" / "000012.jpg").size == (96, 96)
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
    run: Run, checkpoint: Path, pictures: Path, tmp_path: Path, classes: str
) -> None:
    out = tmp_path / "out"
    options = ("--output", out, "--conf", "0", "--classes", classes, "--max-det", "7")
    status, _, error = run("infer", checkpoint, "--source", pictures, *options)
    assert status == 0, error
    records = json.loads((out / "predictions.json").read_text())
    assert {record["category_id"] for record in records} <= {0, 2}
    assert len(records) == 21


def test_infer_takes_one_picture_and_a_glob(run: Run, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    for source, count in ((pictures / "000012.png", 1), (f"{pictures}/*", 2), (f"{pictures}/**/*.jpg", 1)):
        status, output, error = run("infer", checkpoint, "--source", source, "--output", tmp_path / "out")
        assert status == 0, error
        assert f"{count} picture{'' if count == 1 else 's'}" in output
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
    written = tmp_path / "out" / "pictures"
    assert {path.relative_to(written).as_posix() for path in written.rglob("*.jpg")} == {
        "a/x.jpg",
        "b/x.png.jpg",
        "b/x.jpg.jpg",
    }


def test_no_detection_still_writes_everything(run: Run, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, _ = run("infer", checkpoint, "--source", pictures, "--output", out, "--conf", "1", "--save-txt")
    assert status == 0
    assert "nothing found" in output
    assert json.loads((out / "predictions.json").read_text()) == []
    assert (out / "labels" / "000012.txt").read_text() == ""
    assert len(list((out / "pictures").iterdir())) == 3


class TestBadInput:
    def test_commands_and_options(self, run: Run, tiny_config: Path, checkpoint: Path) -> None:
        fails(run("trian"), "Did you mean 'train'")
        fails(run("train"), "needs a config")
        fails(run("train", "missing.yaml"), "missing.yaml")
        fails(run("train", tiny_config, "--train.epoch", "3"), "'train.epoch'", "Did you mean 'epochs'")
        fails(run("train", tiny_config, "--train.epochs", "few"), "train.epochs", "few")
        fails(run("train", tiny_config, "--head.nams", "3"), "'head.nams' is not an option")
        fails(run("infer", checkpoint, "--soruce", "x"), "'--soruce'", "Did you mean 'source'")
        fails(run("infer", checkpoint), "source")
        fails(run("infer", checkpoint, "--source", "x", "--conf", "abc"), "conf", "abc")
        fails(run("eval"), "needs a run's folder")
        fails(run("eval", checkpoint, "--head.nms_threshold", "0.3"), "'--head.nms_threshold' cannot be changed")
        fails(run("train", tiny_config, "--resume", ""), "--resume needs the folder")
        fails(run("infer", checkpoint, "--source", tiny_config.parent), "no images")

    def test_a_misspelt_key_in_a_config(self, run: Run, tiny_config: Path) -> None:
        tiny_config.write_text(tiny_config.read_text().replace("warmup_epochs", "warm_up_epochs"))
        fails(run("train", tiny_config), "'train.warm_up_epochs'", str(tiny_config), "Did you mean 'warmup_epochs'")

    def test_missing_folders_and_pictures(self, run: Run, tiny_config: Path, checkpoint: Path, tmp_path: Path) -> None:
        data = ("--data", '{name: voc, root: "' + str(tmp_path / "nowhere") + '"}')
        fails(run("train", tiny_config, *data), str(tmp_path / "nowhere"))
        fails(run("infer", checkpoint, "--source", tmp_path / "nowhere"), str(tmp_path / "nowhere"))
        (tmp_path / "void").mkdir()
        fails(run("infer", checkpoint, "--source", tmp_path / "void"), str(tmp_path / "void"))

    def test_broken_annotations(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", box=(30, 3, 2, 40))
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        fails(run("train", tiny_config, *data), "p0.xml", "repair", "skip")
        fails(run("check", tiny_config, "--data", f'{{name: voc, root: "{root}x"}}'), "vocx")
        status, output, error = run("check", tiny_config, *data)
        assert status == 1
        assert "p0.xml" in output
        assert "p1.xml" in output
        fails((status, output, error), "2 problems")

    def test_a_class_that_is_not_in_the_list(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", name="cel")
        data = ("--data", f'{{name: voc, root: "{root}", class_names: [cell, other]}}')
        fails(run("train", tiny_config, *data), "'cel'", "p0.xml", "cell")

    def test_an_absent_picture_and_malformed_xml(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc")
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        (root / "JPEGImages" / "p1.jpg").unlink()
        fails(run("train", tiny_config, *data), "p1")
        (root / "Annotations" / "p0.xml").write_text("<annotation>\n<object>\n</annotation>")
        fails(run("train", tiny_config, *data), "p0.xml:3")

    def test_truncated_and_empty_pictures(self, run: Run, tiny_config: Path, checkpoint: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc")
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        path = root / "JPEGImages" / "p0.jpg"
        path.write_bytes(path.read_bytes()[:400])
        fails(run("train", tiny_config, *data), "p0.jpg")
        fails(run("infer", checkpoint, "--source", path), "p0.jpg", "--skip-broken")
        (root / "JPEGImages" / "a.jpg").write_bytes((root / "JPEGImages" / "p1.jpg").read_bytes())
        for batch in (1, 8):
            stopped = tmp_path / f"stopped{batch}"
            given = ("--source", root / "JPEGImages", "--output", stopped, "--conf", "0", "--batch", batch)
            fails(run("infer", checkpoint, *given), str(stopped))
            assert {record["image_id"] for record in json.loads((stopped / "predictions.json").read_text())} == {"a"}
        (root / "JPEGImages" / "a.jpg").unlink()
        (root / "JPEGImages" / "empty.jpg").write_bytes(b"")
        status, output, _ = run(
            *("infer", checkpoint, "--source", root / "JPEGImages", "--output", tmp_path / "out", "--skip-broken")
        )
        assert status == 0
        assert "1 picture," in output
        assert "2 left out" in output
        assert "p0.jpg" in output
        assert "empty.jpg" in output

    def test_malformed_json(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        (tmp_path / "coco" / "annotations").mkdir(parents=True)
        (tmp_path / "coco" / "train").mkdir()
        (tmp_path / "coco" / "annotations" / "instances_train.json").write_text('{"images": [\n')
        data = ("--data", f'{{name: coco, root: "{tmp_path / "coco"}"}}')
        fails(run("train", tiny_config, *data), "instances_train.json", "line 2")

    def test_a_checkpoint_of_another_class_list(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        names = ClassList.from_names(["circle", "rhombus"])
        build_model(load_experiment([str(tiny_config)]), names).save(path)
        fails(run("eval", path), "other.safetensors", "rhombus", "square", "weights_parts")
        fails(run("train", tiny_config, "--weights", path), "rhombus", "weights_parts")
        status, _, error = run(
            *("train", tiny_config, "--weights", path, "--weights_parts", "[backbone]", "--train.epochs", "1")
        )
        assert status == 0, error

    def test_boxes_outside_are_repaired_and_counted(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", box=(10, 10, 300, 40))
        data = ("--data", f'{{name: voc, root: "{root}", broken: repair}}', "--train.epochs", "1")
        status, output, error = run("train", tiny_config, *data)
        assert status == 0, error
        assert "1 problem (broken: repair)" in output


@pytest.mark.parametrize("script", ["train", "infer", "eval"])
def test_tools_are_doors_to_the_same_commands(script: str) -> None:
    path = Path(__file__).parents[1] / "tools" / f"{script}.py"
    result = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"usage: detkit {script}" in result.stdout


IN_THE_END = """
import atexit
from detkit import cli
def command(arguments):
    atexit.register(lambda: print("at the end"))
    print("begun", end=" ")
    {what}
cli.COMMANDS["infer"] = command
cli.entry(["infer"])
"""


@pytest.mark.parametrize(
    ("what", "status", "error"),
    [
        ("pass", 0, ""),
        ("raise cli.DetkitError('a mistake')", 1, "detkit: a mistake\n"),
        ("raise KeyboardInterrupt", 130, "detkit: stopped.\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_process_that_ends_early_ends_as_any_other(what: str, status: int, error: str) -> None:
    code = IN_THE_END.format(what=what)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == status
    assert result.stdout == "begun at the end\n"
    assert result.stderr.endswith(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some space"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: 'a/b'. Change its permissions"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error. Check the path"),
        (ValueError("embedded null byte"), "A path holds a NUL character"),
        (DetkitError("a \x1b[2J name"), "a \\x1b[2J name"),
    ],
)
def test_errors_of_the_system_are_one_paragraph(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def command(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "check", command)
    fails(run("check"), text)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, f"{'deep/' * 900}x", "~nobody/x", "\udce4"])
def test_paths_that_cannot_be(run: Run, tiny_config: Path, checkpoint: Path, path: str) -> None:
    fails(run("train", f"{path}.yaml"))
    fails(run("check", tiny_config, "--data", "{name: voc}", "--data.root", path))
    fails(run("eval", path))
    fails(run("infer", path, "--source", checkpoint))
    fails(run("infer", checkpoint, "--source", path))
    tiny_config.write_text(json.dumps({"data": {"name": "voc", "root": path}}))
    fails(run("check", tiny_config))


def test_folders_without_one_above_them_are_no_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("/", ".", ""):
        fails(run("eval", folder))


def test_no_reader_and_no_space(tmp_path: Path) -> None:
    """The output of a command whose reader goes away is dropped; on a full disk the command fails, in one paragraph."""
    command = [sys.executable, "-m", "detkit.cli", "train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert result.returncode == 1
            assert (
                result.stderr == "detkit: No space left on device. Free some space on that disk, or write elsewhere.\n"
            )
            assert subprocess.run([*command[:-2], "trian"], stdout=full, stderr=full).returncode == 1


def test_help_lists_every_option_with_its_default(run: Run) -> None:
    status, output, _ = run("train", "--help")
    assert status == 0
    text = " ".join(output.split())
    for schema, prefix in ((Experiment, ""), (TrainOptions, "train."), (InputOptions, "input.")):
        for field in dataclasses.fields(schema):
            if field.name not in ("train", "input"):
                assert f"--{prefix}{field.name} {field.name.upper()} " in text
    assert "learning rate at its peak, for batch_size pictures a step. (a number; default: 0.01)" in text
    assert "(a whole number or 'all'; default: 0)" in text


def test_two_processes_share_an_epoch_and_one_folder(tiny_config: Path, tmp_path: Path) -> None:
    """Two processes on the CPU: whole batches, one run, the classes of the gradient in step."""
    command = [sys.executable, "-m", "detkit.cli", "train", str(tiny_config)]
    options = ["--train.device", "cpu", "--train.devices", "2", "--train.epochs", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "batch      4 pictures a step: 2 x 2 on cpu" in result.stdout
    assert [path.name for path in (tmp_path / "runs" / "detect").iterdir()] == ["tiny"]


def test_training_ends_with_a_score_on_the_data_it_was_given(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A resumed run's best checkpoint may name the folder in which the data lay before.
    asked: list[str] = []
    folder = SimpleNamespace(best="best.safetensors", pictures="pictures")
    monkeypatch.setattr("detkit.engine.train.train", lambda experiment, resume: folder)
    monkeypatch.setattr("detkit.cli._evaluate", lambda checkpoint, arguments: asked.extend(arguments))
    assert main(["train", str(tiny_config), "--data.val_count", "3"]) == 0
    assert asked[0] == "--data"
    assert json.loads(asked[1])["val_count"] == 3
