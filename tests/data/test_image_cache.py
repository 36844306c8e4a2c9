"""Decoded images, kept within a bound and shared by processes."""

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_cases import zoo_cases

from detkit.data import cache as module
from detkit.data import dataset as reading
from detkit.data.cache import CachedDataset, ImageCache, with_cache
from detkit.data.formats.crops import Crops
from detkit.data.formats.folder import Folder
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import batches, evaluation_loader, training_loader
from detkit.data.transforms import Fit
from detkit.engine.train import train
from detkit.errors import ConfigError, WriteError
from detkit.model import read_checkpoint
from detkit.structures import Sample, Target

SIZES = [(20, 30), (16, 16), (40, 24), (9, 50), (33, 17), (24, 24)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        path = tmp_path / "data" / "train" / "ab"[number % 2] / f"{number // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return Folder(str(tmp_path / "data"), "train")


def cached(dataset: Any, bound: int = 10**6, place: Any = "memory", folder: Path = Path()) -> CachedDataset:
    sizes = [dataset.size(index) for index in range(len(dataset))]
    return CachedDataset(dataset, ImageCache(sizes, bound, place, folder))


def assert_equal(one: Sample, other: Sample) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    assert (one.meta.image_id, one.meta.source, one.meta.size) == (
        other.meta.image_id,
        other.meta.source,
        other.meta.size,
    )
    assert one.meta.matrix is not None
    np.testing.assert_array_equal(one.meta.matrix, np.eye(3))
    for field in fields(Target):
        mine, its = getattr(one.target, field.name), getattr(other.target, field.name)
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_image_is_decoded_once_and_is_the_same_afterwards(
    folder: Folder, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = cached(folder, place=place, folder=tmp_path / "new")
    expected = [folder[index] for index in range(len(folder))]
    first = [dataset[index] for index in range(len(dataset))]
    monkeypatch.setattr(reading, "read_image", None)
    second = [dataset[index] for index in range(len(dataset))]
    for samples in (first, second):
        for sample, target in zip(samples, expected):
            assert_equal(sample, target)
    second[0].image[:] = 0
    assert_equal(dataset[0], expected[0])
    assert not list((tmp_path / "new").glob("*")), "the file has a name, and would stay behind"


DATASETS: dict[str, Any] = {
    "shapes": Shapes("train", 4, 2, 32),
    "crops": Crops("train", {"name": "shapes", "train_count": 3, "size": 48}),
    **zoo_cases("DATASETS"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_any_data_set_can_be_cached(name: str) -> None:
    dataset = DATASETS[name]
    wrapped = cached(dataset)
    for _ in range(2):
        for index in range(len(dataset)):
            assert_equal(wrapped[index], dataset[index])


def test_images_beyond_the_bound_are_decoded_each_time(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = len(SIZES) + sum(3 * height * width for height, width in map(folder.size, range(2)))
    dataset = cached(folder, bound)
    assert [index in dataset.cache for index in range(6)] == [True, True, False, False, False, False]
    assert dataset.cache.bytes == bound
    read: list[str] = []
    original = reading.read_image
    monkeypatch.setattr(reading, "read_image", lambda path, reduction: read.append(path) or original(path, reduction))
    for _ in range(3):
        for index in range(6):
            assert_equal(dataset[index], folder[index])
    own = [folder.source(index) for index in range(6)]
    # Of the six readings of the data set itself, three are for comparison.
    assert [read.count(path) for path in own] == [4, 4, 6, 6, 6, 6]


def test_a_smaller_image_fits_where_a_larger_one_did_not() -> None:
    cache = ImageCache([(10, 10), (100, 100), (10, 10)], 3 + 600, "memory", Path())
    assert [index in cache for index in range(3)] == [True, False, True]
    assert (cache.count, cache.bytes) == (2, 603)


def test_nothing_fits_is_no_error(folder: Folder) -> None:
    dataset = cached(folder, bound=10)
    assert (dataset.cache.count, dataset.cache.bytes) == (0, 0)
    assert_equal(dataset[3], folder[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_and_worker_processes_share_what_one_has_read(
    folder: Folder, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(dataset: Any) -> list[torch.Tensor]:
        loader, sampler = training_loader(dataset, Fit((32, 32)), None, batch_size=2, workers=workers, seed=1)
        images = []
        for sampler.epoch in range(3):
            images += [batch.images for batch in batches(loader)]
        return images

    expected = read(folder)
    dataset = cached(folder)
    for image, target in zip(read(dataset), expected, strict=True):
        assert torch.equal(image, target)
    # What the workers have read is here, and in workers that begin later.
    monkeypatch.setattr(reading, "read_image", None)
    assert all(dataset.cache.get(index) is not None for index in range(6))
    assert len(list(batches(evaluation_loader(dataset, Fit((32, 32)), batch_size=3, workers=workers)))) == 2


def test_training_comes_first_and_the_line_says_what_fits(folder: Folder, tmp_path: Path) -> None:
    bytes = [3 * height * width for height, width in SIZES]
    bound = 2 * len(SIZES) + sum(bytes) + bytes[0]
    train_set, val_set, line = with_cache(folder, folder, "memory", bound, tmp_path)
    assert (train_set.cache.count, val_set.cache.count) == (6, 1)  # type: ignore[attr-defined]
    assert "6 of 6 images for training and 1 of 6 images for validation" in line
    assert "the other 5 are decoded each time" in line
    assert "other" not in with_cache(folder, folder, "disk", 10**6, tmp_path)[2]


def test_memory_and_disk_that_cannot_be_had_are_an_error(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"memory needs .* but .* are free. Lower train.cache_gb, or .* disk or null"):
        with_cache(folder, folder, "memory", 10**6, tmp_path)

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match=r"disk needs .* not available \(No space left on device\)"):
        with_cache(folder, folder, "disk", 10**6, tmp_path)


def _write(cache: ImageCache, indices: Sequence[int]) -> None:
    for index in indices:
        assert cache.get(0) is not None
        cache.put(index, np.full((4, 4, 3), index, np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_processes_share_it_however_they_are_started(method: str, place: Any, tmp_path: Path) -> None:
    cache = ImageCache([(4, 4)] * 3, 1000, place, tmp_path)
    cache.put(0, np.zeros((4, 4, 3), np.uint8))
    process = multiprocessing.get_context(method).Process(target=_write, args=(cache, [1, 2]))
    process.start()
    process.join()
    assert process.exitcode == 0
    for index in (1, 2):
        assert (cache.get(index) == index).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_training_is_the_same_with_and_without(tiny: Any, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(tiny())
    assert "cache " not in capsys.readouterr().out
    with_one = train(tiny("--train.cache", place, "--train.workers", "2"))
    assert f"cache      {place}, 0.00 GB: 12 of 12 images for training" in capsys.readouterr().out
    one, other = read_checkpoint(plain.last)[0], read_checkpoint(with_one.last)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bound_of_nothing_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"'train.cache_gb' must be greater than 0"):
        tiny("--train.cache_gb", "0")
    with pytest.raises(ConfigError, match=r"train.cache"):
        tiny("--train.cache", "ram")
