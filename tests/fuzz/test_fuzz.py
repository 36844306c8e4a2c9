"""The fast part of the fuzz harness; tests/fuzz/harness.py runs any number of inputs."""

import subprocess
import sys
from pathlib import Path

import pytest
from zoo_cases import zoo_cases

sys.path.insert(0, str(Path(__file__).parent))
from harness import Watch, run_one
from readers import READERS

HARNESS = Path(__file__).parent / "harness.py"


@pytest.mark.parametrize("names", [list(READERS)[::2], list(READERS)[1::2]])
def test_damaged_files_end_in_valid_data_or_one_error(names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HARNESS), "--inputs", "60", "--seed", "7", "--readers", *names],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" inputs ") == len(names)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda: 1 / 0, "FAULT ZeroDivisionError"),
        (lambda: subprocess.run(["true"]), "FAULT side effect"),
        (lambda: Path("/tmp/outside-of-the-folder").write_text(""), "FAULT side effect"),
        (lambda: bytearray(1_100_000_000), "FAULT memory"),
    ],
)
def test_the_harness_notices(read: object, fault: str, tmp_path: Path) -> None:
    assert run_one(read, Watch(), tmp_path)[0] == fault


@pytest.mark.parametrize("name", list(READERS))
def test_the_seeds_reach_the_reader(name: str, tmp_path: Path) -> None:
    """At least one of a reader's seeds is not refused before anything is read, else its inputs would test nothing."""
    case = READERS[name](tmp_path)
    messages = []
    for content in case.seeds:
        case.path.write_bytes(content)
        try:
            case.read()
        except ValueError as error:
            messages.append(str(error))
    refused = {"pth", *zoo_cases("FUZZED_WEIGHTS")}  # of these a valid file would be a whole published network
    assert len(messages) < len(case.seeds) or name in refused, messages
