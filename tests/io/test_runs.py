"""What a user means by a checkpoint, and what there is where nothing is."""

from pathlib import Path

import pytest

from detkit.errors import CheckpointError
from detkit.io.runs import BEST, SHOWN_RUNS, resolve_checkpoint, runs_near


def run(path: Path) -> Path:
    (path / BEST).parent.mkdir(parents=True)
    (path / BEST).touch()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs of two tasks, one without a checkpoint, and a checkpoint file."""
    monkeypatch.chdir(tmp_path)
    for name in ("detect/cells", "detect/people", "detect/people2", "segment/streets"):
        run(Path("runs") / name)
    Path("runs/detect/unfinished/checkpoints").mkdir(parents=True)
    Path("model.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize("given", ["runs/detect/cells", "runs/detect/cells/checkpoints", f"runs/detect/cells/{BEST}"])
def test_a_run_its_checkpoints_and_the_file_are_one(home: Path, given: str) -> None:
    assert resolve_checkpoint(given) == f"runs/detect/cells/{BEST}"


@pytest.mark.parametrize("name", ["torchvision:ssd300_vgg16", "mtcnn:", "mtcnn:folder"])
def test_published_names_are_no_files(home: Path, name: str) -> None:
    assert resolve_checkpoint(name) == name


@pytest.mark.parametrize(
    "given", ["runs/peple", "runs/detect/peple", "runs/segment/peple", "runs/detec/peple", "peple", "elsewhere/peple"]
)
def test_of_a_run_that_is_missing_the_nearest_are_named_first(home: Path, given: str) -> None:
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(given)
    message = str(error.value)
    assert f"There is no checkpoint '{given}'. Did you mean 'runs/detect/people'?" in message
    assert "Available: runs/detect/people, runs/detect/people2, " in message
    assert "runs/segment/streets" in message
    assert "unfinished" not in message
    assert "runs/detect," not in message


@pytest.mark.parametrize("given", ["runs", "runs/detect", "runs/detect/unfinished"])
def test_a_folder_that_is_no_run_is_answered_with_those_there_are(home: Path, given: str) -> None:
    with pytest.raises(CheckpointError, match=rf"The folder '{given}' contains no .*Available: .*runs/detect/cells"):
        resolve_checkpoint(given)


def test_runs_are_found_once_however_they_are_reached(home: Path) -> None:
    named = [str(path) for path in runs_near(home / "runs" / "detect" / "x")]
    assert sorted(Path(name).name for name in named) == ["cells", "people", "people2", "streets"]
    assert runs_near(Path("modle.safetensors"))[0].name == "model.safetensors"


def test_many_runs_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # else those in the working folder count, too
    for number in range(SHOWN_RUNS + 3):
        run(tmp_path / f"run{number}")
    with pytest.raises(CheckpointError, match=r"run0, .* and 3 more\.$"):
        resolve_checkpoint(tmp_path / "run")


def test_without_any_run_the_message_says_what_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="`detkit train` writes them"):
        resolve_checkpoint("runs/detect/x")


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "x" * 300, "deep/" * 2000, "\ud800", "~", "a*b?c[d", "run\n2"])
def test_odd_names_are_answered(home: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        resolve_checkpoint(name)
