"""Fitting, augmentation and the loader."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.boxes import area
from detkit.data.loader import EpochSampler, evaluation_loader, training_loader
from detkit.data.shapes import Shapes
from detkit.data.transforms import Augment, Fit, map_boxes, undo
from detkit.errors import ConfigError
from detkit.registry import augmentations
from detkit.types import Detections, Meta, Sample, Target

SSD_AUGMENTATION = [{"name": "photometric"}, {"name": "expand"}, {"name": "iou_crop"}, {"name": "flip"}]


def sample_with_marked_boxes(height: int = 90, width: int = 120) -> Sample:
    """A black picture whose objects are filled with their own colours, so that pixels show where boxes went."""
    boxes = torch.tensor([[10.0, 20.0, 50.0, 60.0], [60.0, 5.0, 110.0, 45.0], [70.0, 50.0, 100.0, 85.0]])
    image = np.zeros((height, width, 3), dtype=np.uint8)
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    for index, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[top:bottom, left:right, index] = 255
        masks[index, top:bottom, left:right] = True
    target = Target(boxes, torch.tensor([4, 5, 6]), masks=masks)
    return Sample(image, target, Meta("id", "picture", (height, width)))


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("source", [(90, 120), (200, 61), (64, 64), (1, 500)])
def test_fit_and_undo_are_inverse(source: tuple[int, int], letterbox: bool) -> None:
    fit = Fit((64, 96), letterbox)
    boxes = torch.tensor([[0.0, 0.0, source[1], source[0]], [0.25 * source[1], 0.0, 0.5 * source[1], 0.5 * source[0]]])
    sample = Sample(
        np.zeros((*source, 3), dtype=np.uint8), Target(boxes, torch.tensor([0, 1])), Meta("id", "picture", source)
    )
    image, inner, target, meta = fit(sample)
    assert image.shape == (3, 64, 96)
    assert target.boxes[0].tolist() == [0, 0, inner[1], inner[0]]
    found = undo(Detections(target.boxes, torch.ones(2), target.labels), meta)
    torch.testing.assert_close(found.boxes, boxes, rtol=0, atol=1e-3)
    if letterbox:
        assert inner[0] == 64 or inner[1] == 96
        assert torch.all(image[:, inner[0] :] == 114 / 255)
    else:
        assert inner == (64, 96)


def test_fit_puts_pixels_where_it_puts_boxes() -> None:
    image, _, target, _ = Fit((45, 60))(sample_with_marked_boxes())
    for channel, (left, top, right, bottom) in enumerate(target.boxes.round().int().tolist()):
        assert image[channel, top + 1 : bottom - 1, left + 1 : right - 1].min() > 0.99
    rows = target.masks.any(2).sum(1)
    assert ((rows - torch.tensor([20, 20, 17.5])).abs() <= 0.5).all()


@pytest.mark.parametrize("name", sorted(set(augmentations.names()) - {"albumentations"}))
@pytest.mark.parametrize("letterbox", [False, True])
def test_boxes_labels_and_masks_stay_with_their_pixels(name: str, letterbox: bool) -> None:
    augment = Augment([{"name": name}], Fit((90, 120), letterbox))
    sample = sample_with_marked_boxes()
    kept = 0
    for seed in range(40):
        result = augment(sample, seed)
        assert result.image.shape == (90, 120, 3)
        assert result.target.masks is not None
        for box, label, mask in zip(result.target.boxes, result.target.labels.tolist(), result.target.masks):
            kept += 1
            bright = torch.from_numpy(result.image[..., label - 4] > 90) & torch.from_numpy(
                np.delete(result.image, label - 4, axis=2).max(2) < 90
            )
            rows, columns = torch.nonzero(mask, as_tuple=True)
            from_mask = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - from_mask).abs().max() < 1.5
            if name != "photometric":
                assert (bright & mask).sum() > 0.8 * mask.sum()
    assert kept > 40


def test_albumentations_own_transforms_can_be_used_and_are_strict() -> None:
    part = {"name": "albumentations", "transform": "RandomRotate90", "options": {"p": 1.0}}
    result = Augment([part], Fit((120, 90)))(sample_with_marked_boxes(), 1)
    assert len(result.target) == 3
    with pytest.raises(ConfigError, match=r"no albumentations transform named 'RandomRotat90'.*RandomRotate90"):
        Augment([{"name": "albumentations", "transform": "RandomRotat90"}], Fit((9, 9)))
    with pytest.raises(ConfigError, match=r"'GaussNoise' refuses its options.*banana"):
        Augment([{"name": "albumentations", "transform": "GaussNoise", "options": {"banana": 1}}], Fit((9, 9)))
    with pytest.raises(ConfigError, match=r"'augment\[1\]\.probabilty' is not an option"):
        Augment([{"name": "flip"}, {"name": "expand", "probabilty": 1}], Fit((9, 9)))


def test_choices_of_different_transforms_are_independent() -> None:
    """One seed for every transform would flip exactly the pictures that are expanded."""
    augment = Augment([{"name": "expand", "fill": [0, 0, 0]}, {"name": "flip"}], Fit((90, 120)))
    outcomes = set()
    for seed in range(40):
        target = augment(sample_with_marked_boxes(), seed).target
        expanded = bool(area(target.boxes).max() < 1600 * 0.9)
        flipped = bool(target.boxes[target.labels == 4][0, 0] > target.boxes[target.labels == 5][0, 0])
        outcomes.add((expanded, flipped))
    assert len(outcomes) == 4


def test_iou_crop_keeps_the_centre_of_an_object_and_a_picture_without_objects() -> None:
    augment = Augment([{"name": "iou_crop"}], Fit((90, 120)))
    for seed in range(50):
        assert len(augment(sample_with_marked_boxes(), seed).target) >= 1
    empty = Sample(np.zeros((30, 40, 3), dtype=np.uint8), Target.empty(), Meta("e", "empty", (30, 40)))
    assert len(Augment(SSD_AUGMENTATION, Fit((32, 32)))(empty, 3).target) == 0


def batches(workers: int, epoch: int = 0, batch_size: int = 4) -> list[torch.Tensor]:
    fit = Fit((48, 48))
    dataset = Shapes("train", train_count=10, size=48)
    loader, sampler = training_loader(
        dataset, fit, Augment(SSD_AUGMENTATION, fit), batch_size=batch_size, workers=workers, seed=3
    )
    sampler.epoch = epoch
    return [batch.images for batch in loader]


def test_pictures_do_not_depend_on_the_number_of_workers() -> None:
    alone, two = batches(0), batches(2)
    assert len(alone) == len(two) == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, two))


def test_random_state_repeats_neither_between_workers_nor_between_epochs() -> None:
    """The same picture everywhere: all that can differ is the random augmentation."""
    sample = sample_with_marked_boxes()

    class Same(Shapes):
        def __getitem__(self, index: int) -> Sample:
            return sample

    fit = Fit((48, 48))
    dataset = Same("train", train_count=12, size=48)
    augment = Augment([{"name": "photometric", "probability": 1.0}, {"name": "zoom_crop", "probability": 1.0}], fit)
    loader, sampler = training_loader(dataset, fit, augment, batch_size=3, workers=2, seed=0)
    seen = set()
    for epoch in range(2):
        sampler.epoch = epoch
        seen |= {image.numpy().tobytes() for batch in loader for image in batch.images}
    assert len(seen) == 24


def test_every_picture_is_seen_and_batches_are_whole() -> None:
    for count, batch_size, world in [(10, 4, 1), (3, 8, 1), (10, 3, 2), (7, 2, 3)]:
        indices = []
        for rank in range(world):
            sampler = EpochSampler(count, batch_size, 0, rank, world)
            keys = list(sampler)
            assert len(keys) == len(sampler) == sampler.batches * batch_size
            indices += [index for _, index in keys]
        assert set(indices) == set(range(count))
    first, second = EpochSampler(50, 5, 0), EpochSampler(50, 5, 0)
    second.epoch = 1
    assert [index for _, index in first] != [index for _, index in second]


def test_last_epochs_can_be_plain() -> None:
    fit = Fit((48, 48))
    dataset = Shapes("train", train_count=4, size=48)
    loader, sampler = training_loader(
        dataset, fit, Augment(SSD_AUGMENTATION, fit), batch_size=4, workers=0, seed=0, plain_from_epoch=5
    )
    sampler.epoch = 5
    plain = next(iter(loader))
    order = [int(index) for _, index in sampler]
    for row, index in enumerate(order):
        assert torch.equal(plain.images[row], fit.image(dataset[index].image))


def test_evaluation_sees_every_picture_once_in_order() -> None:
    dataset = Shapes("val", val_count=7, size=48)
    loader = evaluation_loader(dataset, Fit((48, 48)), batch_size=3, workers=1)
    assert [meta.image_id for batch in loader for meta in batch.metas] == [dataset[i].meta.image_id for i in range(7)]


def test_map_boxes_is_affine() -> None:
    matrix = np.array([[2.0, 0, 3], [0, 0.5, -1], [0, 0, 1]])
    assert map_boxes(torch.tensor([[1.0, 2, 3, 4]]), matrix).tolist() == [[5, 0, 9, 1]]


def test_random_augmentation_cannot_be_undone(tmp_path: Path) -> None:
    result = Augment([{"name": "flip"}], Fit((90, 120)))(sample_with_marked_boxes(), 0)
    with pytest.raises(ValueError, match="augmented at random"):
        undo(Detections.empty(), result.meta)
