"""Stored features: the same weights and scores as without them, from one reading of each image."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo_cases import zoo_cases

from detkit.data.formats.shapes import Shapes
from detkit.engine import feature_store
from detkit.engine.run_folder import RunFolder
from detkit.engine.train import train
from detkit.errors import ConfigError, DetkitError
from detkit.model import read_checkpoint

SHARED = ("--train.freeze", "all", "--augment", "[]", "--train.epochs", "3", "--train.lr", "0.05")
CROPS = ("--data", "{name: crops, data: {name: shapes, train_count: 5, val_count: 4, size: 64}}")
HEADS = {
    "classify": (*CROPS, "--head", "{name: classify, widths: [16], dropout: 0.5}"),
    "ssd": ("--input.size", "[64, 80]"),
    "letterbox": (
        *("--backbone", "{name: csp_darknet, width: 0.0625, depth: 0.1}"),
        *("--neck", "{name: fpn, width: 8}", "--input.size", "[64, 96]", "--input.resize", "letterbox"),
    ),
    **zoo_cases("STORED_FEATURES"),
    "averaged": (*CROPS, "--head", "{name: classify}", "--train.ema_decay", "0.9", "--train.optimizer", "adamw"),
    "bf16": (*CROPS, "--head", "{name: classify}", "--train.precision", "bf16-mixed"),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("name", HEADS)
def test_stored_features_change_nothing(tiny: Any, name: str) -> None:
    options = (*SHARED, *HEADS[name])
    plain, stored = train(tiny(*options)), train(tiny(*options, "--train.store_features", "true"))
    before, after = read_checkpoint(plain.last)[0], read_checkpoint(stored.last)[0]
    for tensor_name, tensor in before.items():
        assert torch.equal(tensor, after[tensor_name]), tensor_name
    assert rows(plain) == rows(stored)


def test_each_image_is_read_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    honest = Shapes.__getitem__

    def counted(self: Shapes, index: int) -> Any:
        read.append((self._split, index))
        return honest(self, index)

    monkeypatch.setattr(Shapes, "__getitem__", counted)
    monkeypatch.setattr("detkit.engine.train.write_predictions", lambda *_: None)
    monkeypatch.setattr("detkit.engine.train.write_training_batch", lambda *_: None)
    train(tiny(*SHARED, "--train.store_features", "true", "--train.batch_size", "6"))
    assert sorted(read) == [("train", index) for index in range(12)] + [("val", index) for index in range(6)]


def test_the_files_are_gone_afterwards(tiny: Any) -> None:
    folder = train(tiny(*SHARED, "--train.store_features", "true"))
    assert not (folder.path / feature_store.FOLDER).exists()


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny: Any) -> None:
    options = (*SHARED, *HEADS["classify"], "--train.store_features", "true", "--train.schedule", "constant")
    whole = train(tiny(*options, "--train.epochs", "4"))
    first = train(tiny(*options, "--train.epochs", "2", "--name", "part"))
    resumed = train(tiny(*options, "--train.epochs", "4", "--name", "part"), str(first.path))
    expected = read_checkpoint(whole.last)[0]
    for name, tensor in read_checkpoint(resumed.last)[0].items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--train.freeze", "2"), r"train\.freeze is 2"),
        (("--augment", "[{name: flip}]"), "augmented differently in each epoch"),
        (("--input.multi_scale", "[1, 1.5]"), "the input size changes"),
        (("--input.resize", "short_side"), "differ in size"),
        (("--train.devices", "2"), "processes"),
    ],
)
def test_where_features_change_storing_them_is_refused(tiny: Any, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"'train\.store_features' reuses .*{reason}.*or train\.store_features to"):
        feature_store.check_storable(tiny(*SHARED, "--train.store_features", "true", *options))


def test_a_disk_without_space_is_said(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.os, "posix_fallocate", full, raising=False)
    with pytest.raises(DetkitError, match=r"stored features need .*No space left on device.*levels"):
        train(tiny(*SHARED, "--train.store_features", "true"))


def test_a_backbone_frozen_as_a_whole_stays_bitwise(tiny: Any) -> None:
    folder = train(tiny(*SHARED))
    start = train(tiny(*SHARED, "--train.epochs", "1", "--train.lr", "1e-9"))
    before, after = read_checkpoint(start.last)[0], read_checkpoint(folder.last)[0]
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("head."))
