"""Shared by all tests: a tiny experiment on made-up pictures that trains in seconds."""

import os
from pathlib import Path
from typing import Any

import pytest

# No test may reach for a network.
os.environ.update(HF_HUB_OFFLINE="1", NO_ALBUMENTATIONS_UPDATE="1")
# The networks are tiny, and threads that wait for one another on a busy machine cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
