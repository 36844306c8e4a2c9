"""Training by two processes on the CPU: resuming, and what is said when one of them fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detkit.engine.run_folder import RunFolder
from detkit.model import read_checkpoint

DRIVER = Path(__file__).with_name("rank_driver.py")
TWO = ("--train.devices", "2", "--train.device", "cpu", "--train.epochs", "3")


def run(event: str, rank: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRIVER), event, str(rank), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("detkit:")]


def test_a_killed_run_of_two_processes_is_resumed_bit_for_bit(tiny_config: Path, tmp_path: Path) -> None:
    assert run("none", 0, str(tiny_config), *TWO, "--name", "whole").returncode == 0
    killed = run("kill-after-save", 0, str(tiny_config), *TWO, "--name", "killed")
    assert killed.returncode == -9
    resumed = run("none", 0, "--resume", str(tmp_path / "runs/detect/killed"))
    assert resumed.returncode == 0, resumed.stderr
    whole, again = (RunFolder(tmp_path / "runs/detect" / name) for name in ("whole", "killed"))
    assert len(again.metrics.read_text().splitlines()) == 4
    for path, other in ((whole.last, again.last), (whole.best, again.best)):
        found = read_checkpoint(other)[0]
        for name, tensor in read_checkpoint(path)[0].items():
            assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_says_why_both_end(tiny_config: Path, tmp_path: Path, rank: int) -> None:
    result = run("broken-image", rank, str(tiny_config), *TWO)
    assert result.returncode == 1
    assert error_lines(result) == ["detkit: The image 'x.png' is cut off."]
    assert "Traceback" not in result.stderr
    # The run of two processes was held by the first of them alone, and is free again.
    assert run("none", 0, "--resume", str(tmp_path / "runs/detect/tiny")).returncode == 0


def test_a_process_that_is_killed_is_named(tiny_config: Path) -> None:
    result = run("kill", 1, str(tiny_config), *TWO)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "Another process of this training has ended" in line
    assert "--resume RUN" in line
    assert "Traceback" not in result.stderr


def test_an_error_of_another_kind_keeps_its_traceback_in_one_process(tiny_config: Path) -> None:
    result = run("memory", 1, str(tiny_config), *TWO)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "no memory is left" in result.stderr


def test_both_processes_refuse_a_run_that_is_trained(tiny_config: Path, tmp_path: Path) -> None:
    assert run("none", 0, str(tiny_config), *TWO, "--train.epochs", "1").returncode == 0
    holder = RunFolder(tmp_path / "runs/detect/tiny")
    holder.acquire()
    result = run("none", 0, "--resume", str(holder.path), "--train.epochs", "2")
    holder.release()
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "is being trained by process" in line
