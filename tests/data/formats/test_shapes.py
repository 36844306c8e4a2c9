import time

import numpy as np
import pytest
import torch

from detkit.data.formats.shapes import Shapes
from detkit.data.masks import tight_box
from detkit.errors import DataError
from detkit.registry import datasets

COUNT = 300


@pytest.fixture(scope="module")
def samples():
    data = Shapes("train", train_count=COUNT, masks=True)
    return [data[i] for i in range(COUNT)]


def test_an_image_depends_on_seed_split_and_index_alone():
    first, again = Shapes("train")[7], Shapes("train", train_count=10, masks=True)[7]
    assert np.array_equal(first.image, again.image)
    assert torch.equal(first.target.boxes, again.target.boxes)
    assert first.target.masks is None
    for other in (Shapes("train")[8], Shapes("val")[7], Shapes("test")[7], Shapes("train", seed=1)[7]):
        assert not np.array_equal(first.image, other.image)


def test_no_validation_image_is_a_training_image(samples):
    val = Shapes("val", val_count=COUNT)
    training = {sample.image.tobytes() for sample in samples}
    assert len(training) == COUNT
    assert not training & {val[i].image.tobytes() for i in range(COUNT)}


def test_targets_are_the_same_without_the_image(samples):
    data = Shapes("train", masks=True)
    for index in range(20):
        target = data.target(index)
        assert torch.equal(target.boxes, samples[index].target.boxes)
        assert torch.equal(target.masks, samples[index].target.masks)


def test_boxes_are_tight_around_visible_pixels_that_no_two_objects_share(samples):
    for sample in samples:
        masks = sample.target.masks.numpy()
        assert masks.sum(axis=0).max(initial=0) <= 1
        assert [tuple(box) for box in sample.target.boxes.tolist()] == [tight_box(mask) for mask in masks]
        assert sample.target.area.tolist() == masks.sum((1, 2)).tolist()


def test_the_mix_of_images(samples):
    counts = np.bincount([len(sample.target) for sample in samples], minlength=7)
    assert len(counts) == 7
    assert 1 <= counts[0] <= 0.06 * COUNT
    assert counts[1:].min() > 0.05 * COUNT
    labels = np.bincount(torch.cat([sample.target.labels for sample in samples]))
    assert len(labels) == 4
    assert labels.min() > 0.2 * labels.sum()
    assert min(sample.target.area.min().item() for sample in samples if len(sample.target)) > 40


def test_objects_stand_out_from_what_is_around_them(samples):
    contrasts = []
    for sample in samples:
        ground = ~sample.target.masks.numpy().any(axis=0)
        if ground.mean() < 0.2:
            continue
        for mask in sample.target.masks.numpy():
            colour = sample.image[mask].mean(axis=0)
            contrasts.append(np.linalg.norm(colour - sample.image[ground].mean(axis=0)))
    assert np.quantile(contrasts, 0.1) > 40


def test_sizes_and_counts():
    data = Shapes("val", train_count=5, val_count=3, size=64, max_objects=1)
    assert len(data) == 3
    assert data.size(0) == data[0].size == (64, 64)
    assert max(len(data.target(i)) for i in range(3)) <= 1
    assert [data[i].meta.image_id for i in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):
        data[3]
    assert data.classes.names == ("circle", "square", "triangle", "star")
    assert data.problems.summary() == "no problems"


def test_mistakes_are_named():
    with pytest.raises(DataError, match=r"no split 'vall'\. Did you mean 'val'\?"):
        Shapes("vall")
    with pytest.raises(DataError, match=r"data\.size of the shapes is 8\. Set it to at least 32"):
        Shapes("train", size=8)


def test_it_is_built_from_a_config():
    data = datasets.build({"name": "shapes", "train_count": 3}, "data", split="train", masks=True)
    assert len(data) == 3
    assert data.fields == {"boxes", "labels", "image_labels", "masks"}


def test_it_is_fast():
    data = Shapes("train")
    start = time.process_time()
    for index in range(100):
        data[index]
    assert time.process_time() - start < 2  # 0.25 s on a quiet machine
