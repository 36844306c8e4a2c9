"""Trainings that are killed (kill -9) around every change of the disk: each can be resumed, and ends as if unbroken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")


def kills(config: Path, folder: Path, step: int, limit: int) -> list[dict[str, object]]:
    folder.mkdir()
    command = [sys.executable, str(DRIVER), str(config), str(folder), str(step), str(limit)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert all(each["killed"] for each in found)
    return [each for each in found if each["problem"]] or found


@pytest.mark.parametrize(("step", "limit"), [(17, 4), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_bit_for_bit(tiny_config: Path, tmp_path: Path, step: int, limit: int) -> None:
    found = kills(tiny_config, tmp_path / "runs_killed", step, limit)
    assert len(found) >= limit
    assert [each["problem"] for each in found if each["problem"]] == []
