"""Fitting, augmentation and the loader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detkit.boxes import area
from detkit.boxes.convert import clip
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import EpochSampler, collate, evaluation_loader, training_loader
from detkit.data.loader import batches as unpacked
from detkit.data.transforms import Augment, Fit, Resize, map_boxes, undo
from detkit.errors import ConfigError
from detkit.registry import augmentations
from detkit.structures import Batch, Detections, Inputs, Meta, Sample, Target

SSD_AUGMENTATION = [{"name": "photometric"}, {"name": "expand"}, {"name": "iou_crop"}, {"name": "flip"}]


def sample_with_marked_boxes(height: int = 90, width: int = 120) -> Sample:
    """A black image whose objects are filled with their own colours, so that pixels show where boxes went."""
    boxes = torch.tensor([[10.0, 20.0, 50.0, 60.0], [60.0, 5.0, 110.0, 45.0], [70.0, 50.0, 100.0, 85.0]])
    image = np.zeros((height, width, 3), dtype=np.uint8)
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    for index, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[top:bottom, left:right, index] = 255
        masks[index, top:bottom, left:right] = True
    target = Target(boxes, torch.tensor([4, 5, 6]), masks=masks)
    return Sample(image, target, Meta("id", "image", (height, width)))


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
@pytest.mark.parametrize("source", [(90, 120), (200, 61), (64, 64), (1, 500)])
def test_fit_and_undo_are_inverse(source: tuple[int, int], resize: Resize) -> None:
    fit = Fit((64, 96), resize)
    boxes = torch.tensor([[0.0, 0.0, source[1], source[0]], [0.25 * source[1], 0.0, 0.5 * source[1], 0.5 * source[0]]])
    sample = Sample(
        np.zeros((*source, 3), dtype=np.uint8), Target(boxes, torch.tensor([0, 1])), Meta("id", "image", source)
    )
    image, inner, target, meta, proposals = fit(sample)
    assert proposals is None
    assert image.shape == (3, *(inner if resize == "short_side" else (64, 96)))
    assert target.boxes[0].tolist() == [0, 0, inner[1], inner[0]]
    found = undo(Detections(target.boxes, torch.ones(2), target.labels), meta)
    torch.testing.assert_close(found.boxes, boxes, rtol=0, atol=1e-3)
    if resize == "letterbox":
        assert inner[0] == 64 or inner[1] == 96
        assert torch.all(image[:, inner[0] :] == 114 / 255)
    elif resize == "short_side":
        assert (min(inner) == 64 and max(inner) <= 96) or (max(inner) == 96 and min(inner) <= 64)
    else:
        assert inner == (64, 96)


@pytest.mark.parametrize(
    ("source", "outer"),
    [((100, 400), (64, 160)), ((400, 100), (160, 64)), ((300, 300), (160, 160)), ((1, 500), (32, 160))],
)
def test_trimmed_padding_goes_no_farther_than_to_a_multiple_of_32(
    source: tuple[int, int], outer: tuple[int, int]
) -> None:
    trimmed, whole = Fit((160, 160), "letterbox", trim=True), Fit((160, 160), "letterbox")
    sample = Sample(
        np.full((*source, 3), 255, dtype=np.uint8),
        Target(torch.tensor([[0.0, 0.0, source[1], source[0]]]), torch.tensor([0])),
        Meta("id", "image", source),
    )
    found, expected = trimmed(sample), whole(sample)
    assert found.image.shape == (3, *outer)
    assert torch.equal(found.image, expected.image[:, : outer[0], : outer[1]])
    assert found.size == expected.size
    assert torch.equal(found.target.boxes, expected.target.boxes)
    assert np.array_equal(found.meta.matrix, expected.meta.matrix)  # type: ignore[arg-type]
    assert trimmed.at((320, 320)).trim
    assert torch.equal(trimmed.untrimmed()(sample).image, expected.image)


def test_a_batch_of_trimmed_images_is_padded_with_grey_to_the_largest() -> None:
    fit = Fit((160, 160), "letterbox", (0.5, 0.5, 0.5), trim=True)
    batch = fit.batch([torch.zeros(3, 64, 160), torch.zeros(3, 96, 128)])
    assert batch.shape == (2, 3, 96, 160)
    assert not batch[0, :, :64].any()
    assert not batch[1, :, :, :128].any()
    assert (batch[0, :, 64:] == 114 / 255).all()
    assert (batch[1, :, :, 128:] == 114 / 255).all()


def test_only_letterbox_can_be_trimmed() -> None:
    for resize in ("stretch", "short_side", "crop"):
        assert not Fit((64, 64), resize, trim=True).trim  # type: ignore[arg-type]
    assert [Fit((64, 64), resize).one_size for resize in ("stretch", "letterbox", "short_side", "crop")] == [  # type: ignore[arg-type]
        *(True, True, False, False)
    ]
    assert not Fit((64, 64), "letterbox", trim=True).one_size


def test_fit_puts_pixels_where_it_puts_boxes() -> None:
    image, _, target, _, _ = Fit((45, 60))(sample_with_marked_boxes())
    for channel, (left, top, right, bottom) in enumerate(target.boxes.round().int().tolist()):
        assert image[channel, top + 1 : bottom - 1, left + 1 : right - 1].min() > 0.99
    rows = target.masks.any(2).sum(1)
    assert ((rows - torch.tensor([20, 20, 17.5])).abs() <= 0.5).all()


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_boxes(count: int, height: int, width: int, random: np.random.Generator) -> torch.Tensor:
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * [width, height]
    corners[:1] = [[0, 0], [width, height]]
    return torch.tensor(corners.reshape(count, 4), dtype=torch.float32)


def random_samples(seed: int, limits: tuple[int, int] = (10, 150)) -> list[Sample]:
    random = np.random.default_rng(seed)
    samples = []
    for index in range(random.integers(1, 5)):
        height, width = random.integers(*limits, 2).tolist()
        masks = torch.from_numpy(random.uniform(size=(3, height, width)) > 0.5)
        target = Target(random_boxes(3, height, width, random), torch.tensor([0, 1, 2]), masks=masks)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        proposals = random_boxes(5, height, width, random)
        samples.append(Sample(image, target, Meta(index, "image", (height, width)), proposals))
    return samples


@pytest.mark.parametrize("size", [(64, 96), (80, 133), (33, 1000), (100, 100), (37, 59)])
def test_short_side_equals_torchvision(size: tuple[int, int]) -> None:
    """Sizes, pixels, boxes and the padding of a batch to the last bit; but normalised after the resize, not before."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    bare = GeneralizedRCNNTransform(*size, image_mean=[0.0] * 3, image_std=[1.0] * 3).eval()
    normalised = GeneralizedRCNNTransform(*size, image_mean=list(MEAN), image_std=list(STD)).eval()
    fit, black = Fit(size, "short_side", MEAN), Fit(size, "short_side")
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for seed in range(40):
        samples = random_samples(seed)
        images = [torch.from_numpy(sample.image).permute(2, 0, 1).float() / 255 for sample in samples]
        theirs, targets = bare(images, [{"boxes": sample.target.boxes} for sample in samples])
        batch = collate([black(sample) for sample in samples], black)
        assert list(batch.sizes) == theirs.image_sizes
        assert torch.equal(batch.images, theirs.tensors)
        for target, expected, meta in zip(batch.targets, targets, batch.metas):
            # Torchvision lets a box that touches the edge cross it by a rounding error.
            assert torch.equal(target.boxes, clip(expected["boxes"], batch.sizes[meta.image_id]))
            assert (expected["boxes"] - target.boxes).abs().max() < 1e-4
            undone = undo(Detections(target.boxes, torch.ones(3), target.labels), meta)
            torch.testing.assert_close(undone.boxes, samples[meta.image_id].target.boxes, rtol=1e-5, atol=1e-4)
        mine = (collate([fit(sample) for sample in samples], fit).images - mean) / std
        expected = normalised(images)[0].tensors
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
        for row, expected_row, (height, width) in zip(mine, expected, batch.sizes):
            assert not row[:, height:].any()
            assert not row[:, :, width:].any()
            assert not expected_row[:, height:].any()


@pytest.mark.parametrize("source", [(800, 1333), (480, 640), (1, 4000), (4000, 3), (333, 333), (1065, 1600), (7, 7)])
def test_short_side_gives_the_sizes_of_torchvision(source: tuple[int, int]) -> None:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    fit = Fit((800, 1333), "short_side")
    inner = fit.inner_size(source)
    if 0.5 < source[0] / source[1] < 2:
        transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3).eval()
        assert transform([torch.zeros(3, *source)])[0].image_sizes == [inner]
    assert min(inner) >= 1
    assert max(inner) <= 1333
    assert np.allclose(fit.matrix(source), np.diag([inner[1] / source[1], inner[0] / source[0], 1]))


def test_masks_and_proposals_go_with_the_image() -> None:
    for resize in ("stretch", "letterbox", "short_side"):
        fit = Fit((50, 90), resize)  # type: ignore[arg-type]
        for sample in random_samples(1):
            image, inner, target, _, proposals = fit(sample)
            assert proposals is not None
            assert target.masks is not None
            assert target.masks.shape[1:] == image.shape[1:]
            scale = torch.tensor([inner[1] / sample.size[1], inner[0] / sample.size[0]] * 2)
            torch.testing.assert_close(proposals, sample.proposals * scale)
            rows = ((torch.arange(inner[0]) + 0.5) * sample.size[0] / inner[0]).long()
            columns = ((torch.arange(inner[1]) + 0.5) * sample.size[1] / inner[1]).long()
            expected = sample.target.masks[:, rows][:, :, columns]  # type: ignore[index]
            assert (target.masks[:, : inner[0], : inner[1]] == expected).float().mean() > 0.99
            assert not target.masks[:, inner[0] :].any()
            empty = fit(replace(sample, proposals=torch.zeros(0, 4), target=sample.target[torch.zeros(0).long()]))
            assert empty.proposals is not None
            assert empty.proposals.shape == (0, 4)
            assert empty.target.masks is not None
            assert empty.target.masks.shape == (0, *image.shape[1:])


EVERYTHING = [
    *SSD_AUGMENTATION,
    {"name": "zoom_crop"},
    {"name": "albumentations", "transform": "Rotate", "options": {"p": 0.5}},
    # Looks at the boxes to choose its window.
    {"name": "albumentations", "transform": "BBoxSafeRandomCrop", "options": {"p": 0.5}},
]


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_proposals_change_nothing_but_themselves(resize: Resize) -> None:
    augment = Augment(EVERYTHING, Fit((90, 120), resize))
    random = np.random.default_rng(0)
    lost = 0
    for seed in range(60):
        plain = sample_with_marked_boxes()
        proposals = torch.cat([plain.target.boxes, random_boxes(30, 90, 120, random)])
        without, with_some = augment(plain, seed), augment(replace(plain, proposals=proposals), seed)
        with_none = augment(replace(plain, proposals=torch.zeros(0, 4)), seed)
        assert without.proposals is None
        assert with_none.proposals.shape == (0, 4)  # type: ignore[union-attr]
        for other in (with_some, with_none):
            assert np.array_equal(without.image, other.image)
            for name in ("boxes", "labels", "area", "masks"):
                assert torch.equal(getattr(without.target, name), getattr(other.target, name)), name
        # The ground truths among the proposals fare as the ground truths themselves, and stay in front.
        kept = with_some.proposals
        assert kept is not None
        assert torch.equal(kept[: len(without.target)], without.target.boxes)
        assert ((kept >= 0) & (kept <= torch.tensor([*without.size[::-1]] * 2))).all()
        assert ((kept[:, 2:] - kept[:, :2]) > 0).all()
        lost += len(proposals) - len(kept)
    assert lost > 60


def test_a_proposal_of_which_little_is_left_is_dropped() -> None:
    crop = {
        "name": "albumentations",
        "transform": "Crop",
        "options": {"x_min": 0, "y_min": 0, "x_max": 60, "y_max": 90},
    }
    augment = Augment([crop], Fit((90, 60)))
    given = torch.tensor([[59.0, 0, 69, 10], [50, 0, 70, 10], [57, 0, 67, 10], [70, 0, 80, 9], [0, 0, 120, 90]])
    result = augment(replace(sample_with_marked_boxes(), proposals=given), 0)
    # A tenth, a half, three tenths, nothing, a half.
    assert result.proposals is not None
    torch.testing.assert_close(result.proposals, torch.tensor([[50.0, 0, 60, 10], [57, 0, 60, 10], [0, 0, 60, 90]]))


def test_two_thousand_proposals_and_none_travel_through_workers() -> None:
    class Proposed(Shapes):
        def __getitem__(self, index: int) -> Sample:
            boxes = random_boxes(2000 * (index % 2), 48, 48, np.random.default_rng(index))
            return replace(super().__getitem__(index), proposals=boxes)

    for resize in ("stretch", "short_side"):
        fit = Fit((48, 64), resize)  # type: ignore[arg-type]
        dataset = Proposed("train", train_count=6, size=48)
        read: list[Any] = []
        for workers in (0, 2):
            loader, _ = training_loader(
                dataset, fit, Augment([{"name": "flip"}], fit), batch_size=3, workers=workers, seed=0
            )
            read.append(list(unpacked(loader)))
        counts = [len(boxes) for batch in read[0] for boxes in batch.proposals]
        assert sorted(counts)[:3] == [0, 0, 0]
        assert min(sorted(counts)[3:]) > 1000
        for one, two in zip(*read):
            assert torch.equal(one.images, two.images)
            assert all(torch.equal(a, b) for a, b in zip(one.proposals, two.proposals))
        moved = read[0][0].to("meta").proposals
        assert {boxes.device.type for boxes in moved} == {"meta"}


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ((torch.zeros(0, 4),), "expected one tensor of proposals for each of 2 images, but got 1"),
        ((torch.zeros(0, 4), torch.zeros(3, 5)), r"proposals must be \(N, 4\) float32, but got \(3, 5\)"),
        ((torch.zeros(0, 4), torch.zeros(3, 4).double()), "float64"),
    ],
)
def test_proposals_are_checked_where_they_are_built(proposals: Any, message: str) -> None:
    metas = (Meta("a", "a", (8, 8)), Meta("b", "b", (8, 8)))
    with pytest.raises(ValueError, match=message):
        Batch(torch.zeros(2, 3, 8, 8), ((8, 8),) * 2, (Target.empty(),) * 2, metas, proposals)
    with pytest.raises(ValueError, match=message):
        Inputs((8, 8), ((8, 8),) * 2, proposals)


# Mosaic and mixup are tested in test_mix.py, and perspective, whose turned boxes no longer fit tightly where the border
# cuts them, in test_augment.py.
SIMPLE = sorted(set(augmentations.names()) - {"albumentations", "mosaic", "mixup", "perspective"})


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_boxes_labels_and_masks_stay_with_their_pixels(name: str, resize: Resize) -> None:
    augment = Augment([{"name": name}], Fit((90, 120), resize))
    sample = sample_with_marked_boxes()
    kept = 0
    for seed in range(40):
        result = augment(sample, seed)
        assert resize == "short_side" or result.image.shape == (90, 120, 3)
        assert result.target.masks is not None
        for box, label, mask in zip(result.target.boxes, result.target.labels.tolist(), result.target.masks):
            kept += 1
            bright = torch.from_numpy(result.image[..., label - 4] > 90) & torch.from_numpy(
                np.delete(result.image, label - 4, axis=2).max(2) < 90
            )
            rows, columns = torch.nonzero(mask, as_tuple=True)
            from_mask = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - from_mask).abs().max() < 1.5
            if name not in ("photometric", "hsv"):
                assert (bright & mask).sum() > 0.8 * mask.sum()
    assert kept > 40


def test_albumentations_own_transforms_can_be_used_and_are_strict() -> None:
    part = {"name": "albumentations", "transform": "RandomRotate90", "options": {"p": 1.0}}
    result = Augment([part], Fit((120, 90)))(sample_with_marked_boxes(), 1)
    assert len(result.target) == 3
    with pytest.raises(ConfigError, match=r"no albumentations transform named 'RandomRotat90'.*RandomRotate90"):
        Augment([{"name": "albumentations", "transform": "RandomRotat90"}], Fit((9, 9)))
    with pytest.raises(ConfigError, match=r"'GaussNoise' rejects its options.*banana"):
        Augment([{"name": "albumentations", "transform": "GaussNoise", "options": {"banana": 1}}], Fit((9, 9)))
    with pytest.raises(ConfigError, match=r"'augment\[1\]\.probabilty' is not an option"):
        Augment([{"name": "flip"}, {"name": "expand", "probabilty": 1}], Fit((9, 9)))


def test_choices_of_different_transforms_are_independent() -> None:
    """One seed for every transform would flip exactly the images that are expanded."""
    augment = Augment([{"name": "expand", "fill": [0, 0, 0]}, {"name": "flip"}], Fit((90, 120)))
    outcomes = set()
    for seed in range(40):
        target = augment(sample_with_marked_boxes(), seed).target
        expanded = bool(area(target.boxes).max() < 1600 * 0.9)
        flipped = bool(target.boxes[target.labels == 4][0, 0] > target.boxes[target.labels == 5][0, 0])
        outcomes.add((expanded, flipped))
    assert len(outcomes) == 4


def test_iou_crop_keeps_the_centre_of_an_object_and_an_image_without_objects() -> None:
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
    return [batch.images for batch in unpacked(loader)]


def test_images_do_not_depend_on_the_number_of_workers() -> None:
    alone, two = batches(0), batches(2)
    assert len(alone) == len(two) == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, two))


def test_random_state_repeats_neither_between_workers_nor_between_epochs() -> None:
    """The same image everywhere: all that can differ is the random augmentation."""
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
        seen |= {image.numpy().tobytes() for batch in unpacked(loader) for image in batch.images}
    assert len(seen) == 24


def test_every_image_is_seen_and_batches_are_whole() -> None:
    for count, batch_size, world in [(10, 4, 1), (3, 8, 1), (10, 3, 2), (7, 2, 3)]:
        indices = []
        for rank in range(world):
            sampler = EpochSampler(count, batch_size, 0, rank, world)
            keys = list(sampler)
            assert len(keys) == len(sampler) == sampler.batches * batch_size
            indices += [key.image for key in keys]
        assert set(indices) == set(range(count))
    first, second = EpochSampler(50, 5, 0), EpochSampler(50, 5, 0)
    second.epoch = 1
    assert [key.image for key in first] != [key.image for key in second]


def test_last_epochs_can_be_plain() -> None:
    fit = Fit((48, 48))
    dataset = Shapes("train", train_count=4, size=48)
    loader, sampler = training_loader(
        dataset, fit, Augment(SSD_AUGMENTATION, fit), batch_size=4, workers=0, seed=0, plain_from_epoch=5
    )
    sampler.epoch = 5
    plain = next(unpacked(loader))
    order = [key.image for key in sampler]
    for row, index in enumerate(order):
        assert torch.equal(plain.images[row], fit.image(dataset[index].image))


def test_evaluation_sees_every_image_once_in_order() -> None:
    dataset = Shapes("val", val_count=7, size=48)
    loader = evaluation_loader(dataset, Fit((48, 48)), batch_size=3, workers=1)
    assert [meta.image_id for batch in unpacked(loader) for meta in batch.metas] == [
        dataset[i].meta.image_id for i in range(7)
    ]


def test_map_boxes_is_affine() -> None:
    matrix = np.array([[2.0, 0, 3], [0, 0.5, -1], [0, 0, 1]])
    assert map_boxes(torch.tensor([[1.0, 2, 3, 4]]), matrix).tolist() == [[5, 0, 9, 1]]


def test_random_augmentation_cannot_be_undone(tmp_path: Path) -> None:
    result = Augment([{"name": "flip"}], Fit((90, 120)))(sample_with_marked_boxes(), 0)
    with pytest.raises(ValueError, match="augmented at random"):
        undo(Detections.empty(), result.meta)
