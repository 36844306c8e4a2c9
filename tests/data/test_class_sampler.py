"""Batches of P classes with K images each."""

import math
from collections import Counter

import numpy as np
import pytest

from detkit.data.formats.crops import Crops
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import ClassSampler, image_labels, training_loader
from detkit.data.loader import batches as unpacked
from detkit.data.transforms import Fit
from detkit.errors import ConfigError


def batches(sampler: ClassSampler) -> np.ndarray:
    return np.array([key.image for key in sampler]).reshape(sampler.batches, sampler.batch_size)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("counts", [[12, 12, 12], [40, 7, 3, 1], [5, 9], [1, 1, 1, 1, 1]])
def test_batches_have_groups_of_one_class_and_no_image_is_lost(seed: int, counts: list[int]) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    sampler = ClassSampler(labels.tolist(), 4, 12, seed)
    order = batches(sampler)
    assert len(list(sampler)) == len(sampler) == order.size
    assert set(order.ravel().tolist()) == set(range(len(labels)))
    groups = labels[order].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    # Of the groups of a class as few as possible meet in a batch; what fills up the last batch comes on top.
    filled = sampler.batches * 3 - sum(math.ceil(count / 4) for count in counts)
    for label, count in enumerate(counts):
        in_batches = (groups[:, 0].reshape(sampler.batches, 3) == label).sum(1)
        assert in_batches.max() <= math.ceil(math.ceil(count / 4) / sampler.batches) + filled


def test_balanced_classes_stand_once_in_each_batch() -> None:
    labels = np.repeat(np.arange(6), 20)
    sampler = ClassSampler(labels.tolist(), 4, 12, 0)
    for batch in batches(sampler):
        assert len(set(labels[batch].tolist())) == 3
        assert len(set(batch.tolist())) == 12


def test_processes_share_an_epoch_and_epochs_differ() -> None:
    labels = np.repeat(np.arange(5), 8).tolist()
    one = ClassSampler(labels, 4, 8, 3)
    parts = [batches(ClassSampler(labels, 4, 8, 3, rank, 2)) for rank in range(2)]
    assert parts[0].shape == parts[1].shape
    assert set(np.concatenate(parts).ravel().tolist()) == set(range(40))
    first = batches(one)
    assert np.array_equal(first, batches(ClassSampler(labels, 4, 8, 3)))
    one.epoch = 1
    assert not np.array_equal(first, batches(one))


def test_the_loader_uses_it_for_images_of_one_class_each() -> None:
    crops = Crops("train", {"name": "shapes", "train_count": 24, "size": 64})
    loader, sampler = training_loader(crops, Fit((32, 32)), None, batch_size=8, workers=0, seed=0, per_class=4)
    assert isinstance(sampler, ClassSampler)
    for batch in unpacked(loader):
        counts = Counter(int(target.image_labels) for target in batch.targets)
        assert all(count % 4 == 0 for count in counts.values())
    assert image_labels(crops) == [int(crops.target(index).image_labels) for index in range(len(crops))]  # type: ignore[arg-type]


def test_images_of_several_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.per_class.*exactly one class"):
        image_labels(Shapes("train", train_count=30))


def test_the_batch_must_hold_several_groups() -> None:
    from detkit.config import TrainOptions

    for options in ({"batch_size": 10}, {"batch_size": 4}, {"batch_size": 16, "accumulate": 4}):
        with pytest.raises(ConfigError, match=r"train.per_class' is 4"):
            TrainOptions(per_class=4, **options)  # type: ignore[arg-type]
    assert TrainOptions(per_class=4, batch_size=8).per_class == 4
