"""Batches that come from worker processes: whole, in few pieces, and without an open file for each tensor."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detkit.data.formats.shapes import Shapes
from detkit.data.loader import batches, training_loader
from detkit.data.shared_batches import pack
from detkit.data.transforms import Fit
from detkit.engine.feature_store import FeatureStore
from detkit.structures import Batch, Meta, Target


def batch() -> Batch:
    masks = torch.rand(2, 7, 5) > 0.5
    first = Target(torch.rand(2, 4), torch.tensor([3, 1]), masks=masks, semantic=torch.randint(9, (7, 5)).byte())
    points = torch.rand(5, 3, 2).transpose(0, 1)[:1]  # not contiguous
    second = Target(torch.rand(1, 4), torch.tensor([0]), points=points, visible=torch.ones(1, 5, dtype=torch.bool))
    targets = (first, second, Target.empty())
    return Batch(
        torch.rand(3, 3, 7, 5),
        ((7, 5), (6, 5), (7, 1)),
        targets,
        tuple(Meta(number, f"image {number}", (70, 50)) for number in range(3)),
        (torch.rand(4, 4), torch.zeros(0, 4), torch.rand(1, 4)),
    )


def tensors(value: Any) -> dict[str, Tensor]:
    return {field.name: found for field in fields(value) if isinstance(found := getattr(value, field.name), Tensor)}


def test_a_batch_is_the_same_after_the_way() -> None:
    given = batch()
    packed = pack(given)
    assert packed.images is given.images
    found = packed.unpack()
    assert found.images is given.images
    assert found.sizes == given.sizes
    assert [(meta.image_id, meta.source, meta.size) for meta in found.metas] == [
        (meta.image_id, meta.source, meta.size) for meta in given.metas
    ]
    for mine, theirs in zip(found.targets, given.targets):
        assert tensors(mine).keys() == tensors(theirs).keys()
        for name, tensor in tensors(theirs).items():
            assert tensors(mine)[name].dtype == tensor.dtype
            assert torch.equal(tensors(mine)[name], tensor)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.proposals or (), given.proposals or ()))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux has them")
def test_batches_that_are_held_take_two_open_files_each() -> None:
    dataset = Shapes("train", train_count=48, size=32)
    loader, _ = training_loader(dataset, Fit((32, 32)), None, batch_size=16, workers=1, seed=0)
    before = open_files()
    held = list(batches(loader))
    assert len(held) == 3
    assert open_files() - before <= 2 * len(held) + 16  # and those of the worker itself


def test_a_feature_store_does_not_keep_the_memory_of_whole_batches(tmp_path: Path) -> None:
    dataset = Shapes("train", train_count=4, size=32)
    loader, _ = training_loader(dataset, Fit((32, 32)), None, batch_size=4, workers=0, seed=0)
    store = FeatureStore(tmp_path / "train", len(dataset))
    (whole,) = batches(loader)
    store._put([0, 1, 2, 3], whole, (torch.rand(4, 2, 1, 1),))
    target = store._image_files[1].target  # type: ignore[union-attr]
    assert torch.equal(target.boxes, whole.targets[1].boxes)
    assert (
        target.boxes.untyped_storage().nbytes()
        == target.boxes.nbytes
        < whole.targets[1].boxes.untyped_storage().nbytes()
    )
