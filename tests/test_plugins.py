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
from detkit.structures import Classification
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
    command = [sys.executable, "-m", "detkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_head_from_outside_trains_and_predicts_by_the_command_line(tmp_path: Path, tiny_config: Path) -> None:
    environment = install(tmp_path, HEAD)
    listed = detkit(environment, "models")
    assert "  brightest        classify  The largest value of the last map decides\n" in listed.stdout, listed.stderr
    result = detkit(environment, "train", tiny_config, "--head", "{name: brightest, scale: 2}")
    assert result.returncode == 0, result.stderr
    assert "mAP" in result.stdout
    run = tmp_path / "runs" / "classify" / "tiny"
    found = detkit(environment, "infer", run, "--source", run / "images", "--output", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert "classifications" in found.stdout
    wrong = detkit(environment, "train", tiny_config, "--head", "{name: brightest, scael: 2}")
    assert "'head.scael' is not an option of the head 'brightest'. Did you mean 'scale'?" in wrong.stderr


def test_without_the_package_there_is_no_such_head(tiny_config: Path) -> None:
    result = detkit(dict(os.environ), "train", tiny_config, "--head", "{name: brightest}")
    assert "There is no head named 'brightest'" in result.stderr


def test_the_first_look_up_of_many_threads_finds_every_part(tmp_path: Path) -> None:
    """Those of packages and those within parts (anchors of a head) too: a thread waits for the one that imports."""
    code = """
import sys, threading
import torch
from detkit.config import experiment_from_dict
from detkit.model import build_model
from detkit.registry import heads, tasks
from detkit.structures import ClassList
sys.setswitchinterval(1e-5)
faults, begin = [], threading.Barrier(12)
parts = {"data": {"name": "shapes"}, "backbone": {"name": "small_ssd"}}
def look_up(head):
    try:
        begin.wait()
        build_model(experiment_from_dict({**parts, "head": head}), ClassList.from_names(["a", "b"]), load_weights=False)
        tasks.get(heads.get(head["name"]).task)
    except Exception as error:
        faults.append(repr(error))
kinds = [{"name": "brightest"}, {"name": "ssd", "anchors": {"name": "default_boxes"}}, {"name": "classify"}]
threads = [threading.Thread(target=look_up, args=(kinds[number % 3],)) for number in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(faults), *faults[:3])
"""
    environment = install(tmp_path, HEAD)
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.stdout == "0\n", result.stdout + result.stderr


def test_modules_with_parts_may_look_parts_up_while_they_are_imported(tmp_path: Path) -> None:
    source = HEAD + "\nfrom detkit.registry import backbones, necks\nbackbones.get('resnet18'), necks.names()\n"
    assert "  brightest " in detkit(install(tmp_path, source), "models").stdout


def test_types_for_type_checkers_alone_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """Of the arguments that detkit supplies; an option needs a type that can be checked."""
    source = HEAD.replace("(self, channels,", "(self, channels: 'Absent',")
    environment = install(tmp_path, source)
    code = (
        "from detkit.registry import heads\n"
        "given = {'channels': (4,), 'strides': (8,), 'num_classes': 2}\n"
        "print(heads.build({'name': 'brightest', 'scale': 2}, 'head', **given).scale)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "2.0\n", result.stderr
    (tmp_path / "toy_head.py").write_text(source.replace("scale: float", "scale: 'Absent'"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ConfigError: The option 'scale' of" in result.stderr


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    result = detkit(install(tmp_path, "import nothing_of_this_name\n"), "models")
    assert result.returncode == 1
    assert "'toy-head'" in result.stderr
    assert "nothing_of_this_name" in result.stderr
