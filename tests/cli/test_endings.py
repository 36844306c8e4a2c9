"""How a process of the command line ends: exit status, errors of the system, a reader that goes away."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import Run, fails

from detkit.errors import DetkitError

IN_THE_END = """
import atexit
import detkit.cli.infer
from detkit import cli
def command(arguments):
    atexit.register(lambda: print("at the end"))
    print("begun", end=" ")
    {what}
cli.infer.run = command
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
        (ValueError("embedded null byte"), "A path contains a NUL character"),
        (DetkitError("a \x1b[2J name"), "a \\x1b[2J name"),
    ],
)
def test_errors_of_the_system_are_one_paragraph(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def command(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("detkit.cli.check.run", command)
    fails(run("check"), text)


def test_no_reader_and_no_space(tmp_path: Path) -> None:
    """The output of a command whose reader goes away is dropped; on a full disk the command fails, in one paragraph."""
    command = [sys.executable, "-m", "detkit", "train", "--help"]
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
