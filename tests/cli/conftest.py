"""Fixtures of the tests of the command line."""

from pathlib import Path

import pytest
import torch
from cli_runs import Run
from PIL import Image

from detkit.cli import main
from detkit.config import load_experiment
from detkit.data.formats.shapes import Shapes
from detkit.model import build_model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def checkpoint(tiny_config: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    build_model(load_experiment([str(tiny_config)]), Shapes("val", val_count=1).classes).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    data = Shapes("val", val_count=3, size=96)
    Image.fromarray(data[0].image).save(folder / "000012.png")
    Image.fromarray(data[1].image).save(folder / "deep" / "second one.jpg")
    Image.fromarray(data[2].image).save(folder / "dritte ü.webp")
    return folder
