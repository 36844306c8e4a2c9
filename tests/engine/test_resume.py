"""A run after damage: what is noticed, what is made again, what is refused."""

import csv
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from detkit.data.formats.shapes import Shapes
from detkit.engine import train as engine
from detkit.engine.run_folder import RunFolder
from detkit.engine.train import train
from detkit.errors import CheckpointError, ConfigError, DataError, WriteError
from detkit.model import load_model, read_checkpoint

EPOCHS = ("--train.epochs", "3")


def stopped(experiment: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> RunFolder:
    """A run that ended after some whole epochs."""
    whole_epoch = engine._train_epoch
    calls = []

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return whole_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(experiment)
    return RunFolder(Path(experiment.runs) / "detect" / experiment.name)


def outcome(folder: RunFolder) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    with folder.metrics.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]
    weights = {
        f"{path.stem}.{name}": value
        for path in (folder.last, folder.best)
        for name, value in read_checkpoint(path)[0].items()
    }
    return rows, weights


def assert_same(one: RunFolder, other: RunFolder) -> None:
    rows, weights = outcome(one)
    other_rows, other_weights = outcome(other)
    assert rows == other_rows
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Any:
    """A run of three epochs, and one that was stopped after its second, with the function that makes experiments."""
    from detkit.config import load_experiment

    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tiny.yaml"
    config.write_text(tiny_text + f"runs: {folder}\n")

    def make(*overrides: str) -> Any:
        return load_experiment([str(config)], [*EPOCHS, *overrides])

    whole = train(make("--name", "whole"))
    with pytest.MonkeyPatch.context() as patch:
        return make, whole, stopped(make("--name", "stopped"), patch, after=2)


@pytest.fixture
def broken(broken_runs: Any, tmp_path: Path) -> tuple[Any, RunFolder, RunFolder]:
    """The same, the stopped run as a copy that a test may damage."""
    make, whole, stopped_run = broken_runs
    copy = RunFolder(tmp_path / "stopped")
    shutil.copytree(stopped_run.path, copy.path)
    return lambda: make("--name", "stopped"), whole, copy


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_bytes(b"something else")


DAMAGES = [cut, empty, flip, foreign, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["last", "state"])
def test_a_damaged_file_is_made_again_or_its_predecessor_used(
    broken: Any, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make, whole, folder = broken
    damage(getattr(folder, name))
    capsys.readouterr()
    train(make(), str(folder.path))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume")]
    if name == "last":
        assert len(said) == 1
        assert "restored from the training state" in said[0]
    else:
        assert any("continues from the previous one, of epoch 1" in line for line in said)
    assert_same(whole, folder)


def test_a_best_checkpoint_of_the_last_epoch_is_made_again(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = stopped(tiny(*EPOCHS), monkeypatch, after=1)
    expected = read_checkpoint(folder.best)[0]
    folder.best.unlink()
    monkeypatch.setattr(engine, "_train_epoch", lambda *arguments: pytest.exit("resumed"))
    with pytest.raises(pytest.exit.Exception):
        train(tiny(*EPOCHS), str(folder.path))
    for name, tensor in read_checkpoint(folder.best)[0].items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_best_checkpoint_that_is_lost_is_said_at_once(
    broken: Any, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _, folder = broken
    if RunFolder.load_state(folder)["progress"]["evaluations_since_best"] == 0:  # type: ignore[index]
        pytest.fail("the best epoch of this run must be its first")
    damage(folder.best)
    monkeypatch.setattr(engine, "_train_epoch", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(CheckpointError, match=r"best\.safetensors' is (missing|damaged) and cannot be restored.*--w"):
        train(make(), str(folder.path))


def test_files_of_other_runs_and_epochs(broken: Any, broken_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, whole, folder = broken
    monkeypatch.setattr(engine, "_train_epoch", lambda *arguments: pytest.fail("it trained"))
    for name in ("last", "best", "state"):
        kept = getattr(folder, name).read_bytes()
        shutil.copyfile(getattr(whole, name), getattr(folder, name))
        with pytest.raises(CheckpointError, match="to another run than the training state"):
            train(make(), str(folder.path))
        getattr(folder, name).write_bytes(kept)
    shutil.copyfile(folder.last, folder.best)  # a later epoch's than the best
    with pytest.raises(CheckpointError, match=r"best\.safetensors' is of another epoch \(2\)"):
        train(make(), str(folder.path))


def test_last_of_an_earlier_epoch_is_replaced(
    broken: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, whole, folder = broken
    shutil.copyfile(folder.best, folder.last)
    train(make(), str(folder.path))
    assert "last.safetensors' is of another epoch (1)" in capsys.readouterr().out
    assert_same(whole, folder)


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(path.read_bytes() * 2),
        lambda path: path.write_bytes(b"\0\xff nonsense"),
    ],
    ids=["empty", "missing", "half a row", "twice", "not text"],
)
def test_metrics_come_from_the_training_state(broken: Any, damage: Callable[[Path], Any]) -> None:
    make, whole, folder = broken
    damage(folder.metrics)
    train(make(), str(folder.path))
    assert_same(whole, folder)


def test_both_states_damaged(broken: Any) -> None:
    make, _, folder = broken
    flip(folder.state)
    cut(folder.previous_state)
    with pytest.raises(CheckpointError, match=r"training_state\.pt' .* start a new run with --weights"):
        train(make(), str(folder.path))


def test_no_state_beside_checkpoints_is_not_a_new_run(broken: Any) -> None:
    make, _, folder = broken
    folder.state.unlink()
    folder.previous_state.unlink()
    with pytest.raises(CheckpointError, match=r"has a last\.safetensors, but no training state"):
        train(make(), str(folder.path))


def test_a_run_without_a_whole_epoch_begins_anew(
    tiny: Any, broken_runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(tiny(*EPOCHS), monkeypatch, after=0)
    train(tiny(*EPOCHS), str(folder.path))
    assert "has not finished an epoch" in capsys.readouterr().out
    assert_same(broken_runs[1], folder)


def test_a_run_of_an_earlier_version_goes_on(broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its state and checkpoints have no checksums and ids, and its metrics.csv may have a row twice and half a row."""
    make, whole, folder = broken
    state = folder.load_state()
    assert state is not None
    for name in ("last", "metrics", "data"):
        del state[name]
    for name in ("run", "best_checksum"):
        del state["progress"][name]
    torch.save(state | {"format": 1}, folder.state)
    folder.previous_state.unlink()
    for path in (folder.last, folder.best):
        with safe_open(path, framework="pt") as file:
            old = {key: value for key, value in file.metadata().items() if key not in ("checksum", "run", "epoch")}
        save_file(read_checkpoint(path)[0], path, metadata=old)
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join([*lines, lines[-1], lines[-1].replace(b"2,", b"3,", 1), lines[-1][:30]]))
    train(make(), str(folder.path))
    assert_same(whole, folder)


def test_images_that_are_gone_are_refused(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, whole, folder = broken
    with monkeypatch.context() as patch:
        patch.setattr(Shapes, "__len__", lambda self: 5)
        with pytest.raises(DataError, match=r"of split 'train' have changed .* 5 images instead of 12\. Restore them"):
            train(make(), str(folder.path))
    honest = Shapes.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(Shapes, "fingerprint", lambda self: honest(self) | {"digest": "other"})
        with pytest.raises(DataError, match="other images, sizes, boxes or labels"):
            train(make(), str(folder.path))
    train(make(), str(folder.path))
    assert_same(whole, folder)


def test_a_run_that_is_trained_is_refused(broken: Any) -> None:
    """By the kernel's lock, which is gone with the process that held it."""
    make, whole, folder = broken
    code = (
        "import sys, pathlib; from detkit.engine.run_folder import RunFolder\n"
        f"run = RunFolder(pathlib.Path({str(folder.path)!r})); run.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=rf"is being trained by process {other.pid}\. Wait"):
        train(make(), str(folder.path))
    other.kill()
    other.wait()
    train(make(), str(folder.path))
    assert_same(whole, folder)


def test_a_new_run_is_held_from_its_creation_on(tiny: Any) -> None:
    folder = RunFolder.create(tiny(), "detect")
    code = (
        "import pathlib; from detkit.engine.run_folder import RunFolder\n"
        f"RunFolder(pathlib.Path({str(folder.path)!r})).acquire()"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"is being trained by process {os.getpid()}. Wait" in other.stderr
    folder.release()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_new_runs_get_a_number_and_leave_nothing_else(tiny: Any) -> None:
    paths = [RunFolder.create(tiny(), "detect").path for _ in range(3)]
    (paths[0].parent / "tiny4").write_text("a file in the way")
    paths.append(RunFolder.create(tiny(), "detect").path)
    assert [path.name for path in paths] == ["tiny", "tiny2", "tiny3", "tiny5"]
    assert len(list(paths[0].parent.iterdir())) == 5


FILES = ["config", "state", "last", "best", "metrics"]


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_named_and_leaves_a_run_to_resume(tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = train(tiny("--name", "whole"))
    folder = RunFolder(whole.path.with_name("tiny"))
    target = getattr(folder, name).name
    honest = os.fsync
    seen = []

    def full(handle: int) -> None:
        if f".{target}." in os.readlink(f"/proc/self/fd/{handle}"):
            seen.append(1)
            if len(seen) == (1 if name in ("config", "best") else 2):
                raise OSError(28, "No space left on device")
        honest(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=rf"{target}' cannot be written: No space left on device\. Free"):
            train(tiny())
    if name == "config":
        assert [path.name for path in whole.path.parent.iterdir()] == ["whole"]
        return
    assert not list(folder.path.rglob(".*.part"))
    train(tiny(), str(folder.path))
    assert_same(whole, folder)


def test_a_full_disk_under_the_events_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(WriteError, match=r"events\.out\.tfevents.*No space left"):
        train(tiny())


def test_events_are_what_tensorboard_reads(tiny: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny())
    events = EventAccumulator(str(folder.path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/lr")] == list(range(1, 7))
    with folder.metrics.open() as file:
        expected = [float(row["mAP50"]) for row in csv.DictReader(file)]
    assert [event.value for event in events.Scalars("epoch/mAP50")] == pytest.approx(expected)
    assert [event.step for event in events.Scalars("epoch/mAP50")] == [1, 2]


def test_a_folder_that_is_removed_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_epoch = engine._train_epoch

    def removing(setup: Any, progress: Any, console: Any) -> dict[str, float]:
        shutil.rmtree(console.folder.path)
        return whole_epoch(setup, progress, console)

    monkeypatch.setattr(engine, "_train_epoch", removing)
    monkeypatch.setattr("detkit.engine.train.task_of", task_without_plots(engine.task_of))
    with pytest.raises(WriteError, match=r"training_state\.pt' cannot be written.*or was removed"):
        train(tiny())


def task_without_plots(task_of: Any) -> Any:
    def task(head: Any) -> Any:
        found = task_of(head)
        found.plot = lambda scores, folder: None
        return found

    return task


def test_the_first_evaluation_is_the_best_so_far_even_if_it_has_no_score(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detkit.tasks.detection.task import Detect

    monkeypatch.setattr(Detect, "score", lambda *arguments: float("nan"))
    folder = train(tiny())
    assert load_model(folder.best) is not None


@pytest.fixture(scope="module")
def checkpoint(broken_runs: Any) -> Path:
    return broken_runs[1].best


def with_flipped_bit(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_every_flipped_bit_of_a_checkpoint_is_noticed(checkpoint: Path, tmp_path: Path, part: str) -> None:
    content = checkpoint.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    first, end = (0, header) if part == "header" else (header, len(content))
    generator = random.Random(0)
    path = tmp_path / "flipped.safetensors"
    for _ in range(200):
        path.write_bytes(with_flipped_bit(content, generator.randrange(first * 8, end * 8)))
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_every_flipped_bit_of_a_training_state_is_noticed(broken: Any) -> None:
    _, _, folder = broken
    content = folder.state.read_bytes()
    generator = random.Random(0)
    places = [generator.randrange(len(content) * 8) for _ in range(150)]
    for bit in [*places, *range((len(content) - 50) * 8, len(content) * 8, 8)]:  # its end has the checksum
        folder.state.write_bytes(with_flipped_bit(content, bit))
        with pytest.raises(CheckpointError):
            folder.load_state()


def resaved(checkpoint: Path, path: Path, **changes: Any) -> Path:
    """A checkpoint without a checksum, with other metadata."""
    with safe_open(checkpoint, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("checksum", "run", "epoch")}
    metadata |= {key: value for key, value in changes.items() if value is not None}
    kept = {key: value for key, value in metadata.items() if changes.get(key, "") is not None}
    save_file(read_checkpoint(checkpoint)[0], path, metadata=kept)
    return path


def test_a_checkpoint_without_a_checksum_still_loads(checkpoint: Path, tmp_path: Path) -> None:
    load_model(resaved(checkpoint, tmp_path / "old.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": None}, "lacks the metadata 'class_names'"),
        ({"raw_ids": None}, "lacks the metadata 'raw_ids'"),
        ({"experiment": None}, "nor a detkit checkpoint"),
        ({"chcksum": "x"}, "unknown metadata 'chcksum'"),
        ({"class_names": '{"a": 1}'}, "'class_names' .* is not a list of str"),
        ({"class_names": '["a", 2, "c", "d"]'}, "'class_names' .* is not a list of str"),
        ({"class_names": '["a"'}, "'class_names' .* is not valid JSON"),
        ({"class_names": '["a", "a", "b", "c"]'}, "twice"),
        ({"class_names": '["a"]'}, "does not describe a model"),
        ({"class_names": '["a", "b", "c", "\\ud800"]'}, "surrogate"),
        ({"raw_ids": "[0, 1, 2, true]"}, "'raw_ids' .* is not a list of int"),
        ({"raw_ids": '"0123"'}, "'raw_ids' .* is not a list of int"),
        ({"raw_ids": "[" * 100_000}, "nested too deeply"),
        ({"experiment": "[]"}, "is not a mapping"),
        ({"experiment": "null"}, "is not a mapping"),
        ({"experiment": "{}"}, "does not describe a model"),
        ({"experiment": '{"data": 1, "backbone": 2, "head": 3}'}, "does not describe a model"),
        ({"experiment": '{"data": {}, "backbone": {}, "head": {}}'}, "cannot be built|does not describe a model"),
    ],
)
def test_damaged_metadata_is_named(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(resaved(checkpoint, tmp_path / "damaged.safetensors", **changes))
    assert "damaged.safetensors'" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": {"name": "small_ssd", "widths": [4, -8, 8], "level_channels": 8}},
        {"backbone": {"name": "small_ssd", "widths": [4, 10**12, 8], "level_channels": 8}},
        {"backbone": {"name": "small_ssd", "widths": "x"}},
        {"backbone": {"name": "nothing"}},
        {"head": {"name": "ssd", "nothing": 1}},
        {"head": {"name": ["ssd"]}},
        {"input": {"size": [10**400, 1]}},
        {"train": None},
        {"weights_parts": 3},
    ],
)
def test_a_model_that_cannot_be_built_is_named(checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        experiment = json.loads(file.metadata()["experiment"]) | change
    path = resaved(checkpoint, tmp_path / "odd.safetensors", experiment=json.dumps(experiment))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        load_model(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": {"format": 1}},
        {"__metadata__": None, "\x1b[31m": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}},
        [],
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "hostile.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors") as caught:
        read_checkpoint(path)
    assert "\x1b" not in str(caught.value)
    path.write_bytes(struct.pack("<Q", 2**63) + text)
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors"):
        read_checkpoint(path)
