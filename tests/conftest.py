"""Shared by all tests: a tiny experiment on made-up images that trains in seconds."""

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

# No test may reach for a network.
os.environ.update(HF_HUB_OFFLINE="1", NO_ALBUMENTATIONS_UPDATE="1")
# The networks are tiny, and threads that wait for one another on a busy machine cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from zoo_cases import zoo_cases

from detkit.config import Experiment, load_experiment

TINY = """
data: {name: shapes, train_count: 12, val_count: 6, size: 64}
backbone: {name: small_ssd, widths: [4, 8, 8], level_channels: 8}
head: {name: ssd}
input: {size: [64, 64]}
augment: [{name: flip}, {name: photometric}]
train: {epochs: 2, batch_size: 4, workers: 0, lr: 0.01, warmup_epochs: 0.5}
name: tiny
"""


HOME = tempfile.mkdtemp(prefix="detkit-home")


def pytest_sessionstart() -> None:
    """No test may depend on the home folder, or leave anything in it: settings, caches of weights and of networks."""
    os.environ.update(HOME=HOME, XDG_CACHE_HOME=f"{HOME}/.cache", XDG_CONFIG_HOME=f"{HOME}/.config")
    for name in ("TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME"):
        os.environ.pop(name, None)


def pytest_sessionfinish() -> None:
    """Remove the home folder of this session."""
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may depend on what lies in the working folder, such as the runs of an earlier training."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every way to weights that are not in the checkpoint fails, and is noted."""
    attempts: list[str] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        attempts.append(str(arguments))
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("detkit.backbones.weights.read_tensors", fail)
    for reader in zoo_cases("WEIGHT_READERS").values():
        monkeypatch.setattr(reader, fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    return attempts


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """The config of the tiny experiment."""
    return TINY


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"runs: {tmp_path / 'runs'}\n")
    return path


@pytest.fixture
def tiny(tiny_config: Path) -> Any:
    """The tiny experiment with overrides: tiny("--train.epochs", "3")."""

    def make(*overrides: str) -> Experiment:
        return load_experiment([str(tiny_config)], list(overrides))

    return make
