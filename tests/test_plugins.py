"""Parts that an installed package brings: no file of detkit is touched."""

import os
import subprocess
import sys
from pathlib import Path

HEAD = '''
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from detkit.heads.base import Head
from detkit.predictions import Classification
from detkit.registry import heads


@heads.register("brightest")
class Brightest(Head):
    """The largest value of the last map decides.

    Args:
        scale: of the logits.
    """

    task: ClassVar[str] = "classify"
    needs: ClassVar[frozenset[str]] = frozenset({"image_labels"})
    multi_label = True

    def __init__(self, channels, strides, num_classes, scale: float = 1.0):
        super().__init__()
        self.scale, self.layer = scale, nn.Linear(channels[-1], num_classes)

    def forward(self, features, inputs):
        return self.scale * self.layer(features[-1].amax((2, 3))).float()

    def loss(self, outputs, targets):
        truth = torch.stack([F.one_hot(t.image_labels, outputs.shape[1]).sum(0) for t in targets])
        return {"class": F.binary_cross_entropy_with_logits(outputs, truth.float())}

    def decode(self, outputs):
        return [Classification(row.sigmoid()) for row in outputs]
'''


def install(folder: Path, source: str) -> dict[str, str]:
    """What pip leaves behind for a package with an entry point, and an environment that has it."""
    (folder / "toy_head.py").write_text(source)
    info = folder / "toy_head-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-head\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[detkit.parts]\ntoy = toy_head\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def detkit(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "detkit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_head_from_outside_trains_and_predicts_by_the_command_line(tmp_path: Path, tiny_config: Path) -> None:
    environment = install(tmp_path, HEAD)
    listed = detkit(environment, "models")
    assert "  brightest        classify  The largest value of the last map decides\n" in listed.stdout, listed.stderr
    result = detkit(environment, "train", tiny_config, "--head", "{name: brightest, scale: 2}")
    assert result.returncode == 0, result.stderr
    assert "mAP" in result.stdout
    run = tmp_path / "runs" / "classify" / "tiny"
    found = detkit(environment, "infer", run, "--source", run / "pictures", "--output", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert "classifications" in found.stdout
    wrong = detkit(environment, "train", tiny_config, "--head", "{name: brightest, scael: 2}")
    assert "'head.scael' is not an option of the head 'brightest'. Did you mean 'scale'?" in wrong.stderr


def test_without_the_package_there_is_no_such_head(tiny_config: Path) -> None:
    result = detkit(dict(os.environ), "train", tiny_config, "--head", "{name: brightest}")
    assert "There is no head named 'brightest'" in result.stderr


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    result = detkit(install(tmp_path, "import nothing_of_this_name\n"), "models")
    assert result.returncode == 1
    assert "'toy-head'" in result.stderr
    assert "nothing_of_this_name" in result.stderr
