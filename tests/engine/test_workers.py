"""Processes that read images and cannot go on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from detkit.data.formats.shapes import Shapes
from detkit.data.shared_batches import Packed
from detkit.engine import train as engine
from detkit.engine.evaluate import evaluate
from detkit.engine.train import train
from detkit.errors import DetkitError, WriteError
from detkit.model import build_model

ONE = ("--train.workers", "1")


@pytest.fixture(autouse=True)
def no_image_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "write_training_batch", lambda *arguments: None)


def in_workers(action: Callable[[], Any], honest: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does something else in a worker."""
    return lambda *arguments: action() if get_worker_info() is not None else honest(*arguments)


def test_shared_memory_that_is_full_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Packed) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Packed, "share", full)
    with pytest.raises(WriteError, match=r"/dev/shm.*No space left.*--shm-size.*train\.workers to 0\.$"):
        train(tiny(*ONE))


def test_a_batch_that_cannot_be_sent_ends_the_run(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Packed, "__reduce__", in_workers(too_many, object.__reduce__), raising=False)
    with pytest.raises(DetkitError, match=r"A process that reads images has ended.*--resume RUN"):
        train(tiny(*ONE))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shapes, "__getitem__", in_workers(kill, Shapes.__getitem__))
    with pytest.raises(DetkitError, match=r"killed by the system \(Killed\).*memory.*train\.workers.*--resume RUN"):
        train(tiny(*ONE))


def test_a_worker_of_an_evaluation_that_is_killed_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Shapes("val", val_count=6, size=64)
    model = build_model(tiny(), dataset.classes)
    monkeypatch.setattr(Shapes, "__getitem__", in_workers(kill, Shapes.__getitem__))
    with pytest.raises(DetkitError, match=r"killed by the system \(Killed\)"):
        evaluate(model, dataset, batch_size=4, workers=1)


def test_real_shared_memory_of_two_megabytes(tiny_config: Path) -> None:
    """As in a container with a small /dev/shm; in a private mount, for which one must be root."""
    mount = "mount -t tmpfs -o size=2M tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    train_it = "from detkit.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    options = ["--input.size", "[320, 320]", "--train.workers", "2"]
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", train_it]
    result = subprocess.run(
        [*command, "train", str(tiny_config), *options], capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("detkit: The shared memory of this machine (/dev/shm) has no room for a batch of 5 MB")
