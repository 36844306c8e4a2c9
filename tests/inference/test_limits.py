"""Mistakes in what is asked of a prediction are told before a model is loaded, most of them before torch is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detkit.cli import main
from detkit.data.formats.shapes import Shapes
from detkit.errors import DetkitError
from detkit.inference.images import infer
from detkit.inference.predictor import Predictor
from detkit.model import build_model
from detkit.tasks.options import PredictOptions


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What nothing may read."""
    (tmp_path / "model.safetensors").touch()
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conf": 2}, r"'conf' must be in 0\.\.1, but is 2"),
        ({"conf": float("nan")}, r"'conf' must be in 0\.\.1"),
        ({"iou": -0.1}, r"'iou' must be in 0\.\.1"),
        ({"max_det": 0}, "'max_det' must be at least 1"),
        ({"conf": "0.5"}, "'conf' must be a number, but is '0.5', of type str"),
        ({"conf": True}, "'conf' must be a number"),
        ({"max_det": 1.5}, "'max_det' must be an integer"),
        ({"classes": []}, "'classes' is empty"),
        ({"classes": [1.5]}, r"'classes' contains 1\.5"),
        ({"classes": 2.0}, r"'classes' must be names or labels, but is 2\.0"),
        ({"gallery": ".", "threshold": 2.5}, r"'threshold' must be in 0\.\.2"),
        ({"threshold": 0.5}, "Give --gallery FOLDER too"),
        ({"save_conf": True}, "Give --save-txt too"),
        ({"gallery": "no/such"}, "The gallery 'no/such' is not a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DetkitError, match=message):
        PredictOptions(**options)


def test_options_that_are_not_given_are_not_refused() -> None:
    assert PredictOptions(conf=None, iou=1, max_det=None, save_conf=False, threshold=None).given() == ["iou"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conf", "2"], "'conf' must be in"),
        (["--batch", "0"], "'batch' must be at least 1"),
        (["--source", "no/such.jpg"], "no/such.jpg"),
        (["--source", "no/such.mp4"], "no/such.mp4"),
        (["--output", "{file}"], "{file}' is a file"),
        (["--output", "{file}/deeper"], "{file}' is a file"),
        (["--device", "gpu7"], "The device 'gpu7' cannot be used"),
        (["--device", "meta"], "The device 'meta' cannot be used"),
        (["--device", "cpu", "--precision", "fp16"], "fp16 is for GPUs"),
        (["--device", "cpu", "--compile"], "needs a C++ compiler"),
    ],
)
def test_the_checkpoint_is_not_read_for_a_mistake_elsewhere(
    arguments: list[str],
    message: str,
    image: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("detkit.inference.predictor.load_model", lambda path: pytest.fail("the checkpoint was read"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    given = [argument.format(file=image) for argument in arguments]
    assert main(["infer", str(checkpoint), "--source", str(image), *given]) == 1
    assert message.format(file=image) in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [["--conf", "2"], ["--source", "no/such.jpg"], ["--output", "{file}"], ["--nope"]])
def test_a_mistake_is_told_without_torch(mistake: list[str], image: Path, checkpoint: Path) -> None:
    given = [argument.format(file=image) for argument in mistake]
    arguments = ["infer", str(checkpoint), "--source", str(image), *given]
    code = f"import sys\nfrom detkit.cli import main\nstatus = main({arguments})\nprint(status, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "False"], result.stderr


def test_the_same_holds_in_python(tiny: Any, image: Path) -> None:
    predictor = Predictor(build_model(tiny(), Shapes("val", val_count=1).classes), "cpu")
    predictor.model.head.decode = lambda outputs: pytest.fail("it predicted")  # type: ignore[method-assign]
    with pytest.raises(DetkitError, match="is a file"):
        infer(predictor, str(image), image)
    with pytest.raises(DetkitError, match="'batch' must be at least 1"):
        infer(predictor, str(image), image.parent / "out", batch=0)
    with pytest.raises(DetkitError, match="Give --save-txt too"):
        infer(predictor, str(image), image.parent / "out", PredictOptions(save_conf=True))
