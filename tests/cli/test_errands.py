"""A command is one file: adding one touches no other."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import Run

import detkit
from detkit.cli import commands, summary

COMMAND = '''"""Count the arguments: detkit count ANYTHING ..."""

from detkit.errors import DetkitError


def run(arguments: list[str]) -> None:
    """Print how many there are."""
    if not arguments:
        raise DetkitError("There is nothing to count.")
    print(len(arguments), "arguments")
'''


@pytest.mark.parametrize("file", ["cli/count.py", "zoo/counting/count_command.py"])
def test_a_command_is_one_file(tmp_path: Path, file: str) -> None:
    source = Path(detkit.__file__).parent
    shutil.copytree(source, tmp_path / "detkit", ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    path = tmp_path / "detkit" / file
    if not path.parent.exists():
        path.parent.mkdir()
        (path.parent / "__init__.py").touch()
    path.write_text(COMMAND)

    def detkit_copy(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "detkit", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert "  count  Count the arguments: detkit count ANYTHING ...\n" in detkit_copy("--help").stdout
    assert detkit_copy("count", "a", "b").stdout == "2 arguments\n"
    assert detkit_copy("count").stderr == "detkit: There is nothing to count.\n"
    assert "Did you mean 'count'" in detkit_copy("cuont").stderr


def test_without_the_zoo_there_are_the_commands_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("detkit.zoo"), "__path__", [])
    assert commands().keys() == {"bench", "check", "eval", "infer", "models", "train"}


def test_every_command_has_a_line_of_help(run: Run) -> None:
    _, listed, _ = run("--help")
    for name, command in commands().items():
        assert f"detkit {name}" in summary(command)
        assert f"  {name:6} {summary(command)}\n" in listed
        status, output, _ = run(name, "--help")
        assert status == 0
        assert output.startswith(f"usage: detkit {name}")
