"""Mosaic, mixup and training at several scales: pixels, boxes, masks, and the same images whoever reads them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from detkit.config import InputOptions
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import EpochSampler, batches, evaluation_loader, training_loader
from detkit.data.transforms import Augment, Fit
from detkit.engine.train import train
from detkit.errors import ConfigError, DataError
from detkit.structures import Batch, Meta, Sample, Target

GREY = 114
PLAIN = {"scale": [1, 1], "translation": 0}
YOLOX = [
    {"name": "mosaic", "rotation": 10, "shear": 2, "scale": [0.1, 2]},
    {"name": "mixup", "probability": 0.7},
    {"name": "hsv"},
    {"name": "flip"},
]
# The corners of the colour cube: far from one another and from grey.
COLORS = np.array([[255 * (index >> bit & 1) for bit in range(3)] for index in range(8)], dtype=np.uint8)


def picture(size: tuple[int, int], boxes: Sequence[Sequence[float]], labels: Sequence[int], name: int = 0) -> Sample:
    """A grey image with a rectangle for each box, in the colour of its label, with masks, proposals and flags."""
    image = np.full((*size, 3), GREY, dtype=np.uint8)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for index, ((left, top, right, bottom), label) in enumerate(zip(boxes, labels)):
        image[int(top) : int(bottom), int(left) : int(right)] = COLORS[label]
        masks[index, int(top) : int(bottom), int(left) : int(right)] = True
    labels_ = torch.tensor(labels, dtype=torch.int64)
    targets = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = Target(targets, labels_, crowd=labels_ % 2 == 0, difficult=labels_ % 3 == 0, masks=masks)
    return Sample(image, target, Meta(name, f"image {name}", size), targets.clone())


def four_images(seed: int, limits: tuple[int, int] = (40, 300)) -> list[Sample]:
    """Images of random sizes, each with two objects in colours of their own."""
    random = np.random.default_rng(seed)
    images = []
    for number in range(4):
        height, width = random.integers(*limits, 2).tolist()
        boxes = []
        for half in range(2):
            left, right = (half * width // 2, width // 2 + half * (width - width // 2))
            corners = np.sort(random.choice(np.arange(left, right + 1), 2, replace=False))
            rows = np.sort(random.choice(height + 1, 2, replace=False))
            boxes.append([corners[0], rows[0], corners[1], rows[1]])
        images.append(picture((height, width), boxes, [2 * number, 2 * number + 1], number))
    return images


class InTurn:
    """Hands out the same images one after the other, whatever index is asked for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.next = samples, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        self.next += 1
        return self.samples[(self.next - 1) % len(self.samples)]


def mixed(parts: list[dict[str, Any]], samples: list[Sample], seed: int, size: tuple[int, int] = (96, 128)) -> Sample:
    others: Any = InTurn(samples[1:])
    return Augment(parts, Fit(size))(samples[0], seed, others)


def pixels_of(image: np.ndarray, label: int) -> np.ndarray:
    """(H, W) bool, where the image has the label's colour."""
    return np.abs(image.astype(int) - COLORS[label]).max(2) < 60


def check_sound(sample: Sample) -> None:
    height, width = sample.size
    for boxes in (sample.target.boxes, sample.proposals):
        assert boxes is not None
        assert torch.isfinite(boxes).all()
        assert ((boxes >= 0) & (boxes <= torch.tensor([width, height, width, height]))).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
    assert sample.target.masks is not None
    assert sample.target.masks.shape == (len(sample.target), height, width)


def test_mosaic_is_four_images_around_a_point() -> None:
    """Against plain copies, where images have the input's size and the cut is the middle of the canvas."""
    height, width = 40, 60
    centres = set()
    for seed in range(15):
        random = np.random.default_rng(seed)
        samples = []
        for number in range(4):
            image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image[..., 0] = number
            samples.append(replace(picture((height, width), [[10, 5, 30, 25]], [number]), image=image))
        result = mixed([{"name": "mosaic", **PLAIN}], samples, seed, (height, width))
        tiles = result.image[..., 0]
        inside = int((np.isin(tiles[0], [0, 2])).sum()), int((np.isin(tiles[:, 0], [0, 1])).sum())
        column, row = inside[0] + width // 2, inside[1] + height // 2
        centres.add((row, column))
        canvas = np.full((2 * height, 2 * width, 3), GREY, dtype=np.uint8)
        expected = []
        for number, (top, left) in enumerate(
            [(row - height, column - width), (row - height, column), (row, column - width), (row, column)]
        ):
            for y in range(max(0, top), min(2 * height, top + height)):
                for x in range(max(0, left), min(2 * width, left + width)):
                    canvas[y, x] = samples[number].image[y - top, x - left]
            corners = [left + 10, top + 5, left + 30, top + 25]
            cut = [
                min(max(value - shift, 0), limit)
                for value, shift, limit in zip(corners, [width // 2, height // 2] * 2, [width, height] * 2)
            ]
            if (cut[2] - cut[0]) * (cut[3] - cut[1]) >= 0.2 * 400:
                expected.append([number, *cut])
        assert np.array_equal(result.image, canvas[height // 2 : height // 2 + height, width // 2 : width // 2 + width])
        target = result.target
        assert [[label, *box] for label, box in zip(target.labels.tolist(), target.boxes.tolist())] == expected
    assert len(centres) > 10


@pytest.mark.parametrize("limits", [(40, 300), (3, 40), (500, 1200)])
def test_pixels_under_each_box_have_the_colour_of_its_object(limits: tuple[int, int]) -> None:
    """Whatever the sizes of the four images; and what is dropped is not there to be seen."""
    size, kept_count, dropped = (96, 128), 0, 0
    for seed in range(25):
        samples = four_images(seed, limits)
        result = mixed([{"name": "mosaic", **PLAIN}], samples, seed, size)
        check_sound(result)
        assert result.target.masks is not None
        found = result.target.labels.tolist()
        assert len(set(found)) == len(found)
        for box, label, mask in zip(result.target.boxes, found, result.target.masks):
            left, top, right, bottom = box.round().int().tolist()
            colored = pixels_of(result.image, label)
            source = samples[label // 2].size
            # Where an image is enlarged, its edges are as wide as one of its pixels.
            edge = 1 + int(min(size[0] / source[0], size[1] / source[1]))
            assert colored[top + edge : bottom - edge, left + edge : right - edge].all()
            # No pixel of it lies outside of its box.
            colored[max(0, top - edge) : bottom + edge, max(0, left - edge) : right + edge] = False
            assert not colored.any()
            rows, columns = torch.nonzero(mask, as_tuple=True)
            if len(rows):
                from_mask = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box - from_mask).abs().max() <= 1
        kept_count += len(found)
        for sample in samples:
            scale = min(size[0] / sample.size[0], size[1] / sample.size[1])
            for label, box in zip(sample.target.labels.tolist(), sample.target.boxes.tolist()):
                sides = (box[2] - box[0]) * scale, (box[3] - box[1]) * scale
                if min(sides) > 6:
                    visible = pixels_of(result.image, label).sum() / (sides[0] * sides[1])
                    assert visible > 0.1 if label in found else visible < 0.3
                    dropped += label not in found
    assert kept_count > 50
    assert dropped > 10


def widened(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """The mask and the pixels around it."""
    return torch.nn.functional.max_pool2d(mask[None, None].float(), 2 * pixels + 1, 1, pixels)[0, 0] > 0


def test_masks_follow_their_objects_through_any_cut() -> None:
    part = {"name": "mosaic", "rotation": 30, "shear": 10, "scale": [0.6, 1.4], "perspective": 0.2}
    inside = 0
    for seed in range(40):
        result = mixed([part], four_images(seed, (130, 400)), seed)
        check_sound(result)
        assert result.target.masks is not None
        for box, label, mask in zip(result.target.boxes, result.target.labels.tolist(), result.target.masks):
            colored = torch.from_numpy(pixels_of(result.image, label))
            # All but the blended edge.
            assert not (colored & ~widened(mask, 1)).any()
            assert not (~colored & ~widened(~mask, 2)).any()
            rows, columns = torch.nonzero(mask, as_tuple=True)
            if len(rows):
                corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box[:2] < corners[:2] + 1).all()
                assert (box[2:] > corners[2:] - 1).all()
                inside += 1
    assert inside > 60


def test_flags_and_proposals_of_all_four_images_are_kept() -> None:
    for seed in range(20):
        result = mixed([YOLOX[0]], four_images(seed), seed)
        target = result.target
        assert torch.equal(target.crowd, target.labels % 2 == 0)
        assert torch.equal(target.difficult, target.labels % 3 == 0)
        # Here proposals are the ground truths: they fare alike, but come in turn.
        assert result.proposals is not None
        assert sorted(result.proposals.tolist()) == sorted(target.boxes.tolist())
    samples = [
        replace(
            picture((60, 60), [], [], number), proposals=torch.tensor([[0.0, 0, 60, 60 - rank] for rank in range(3)])
        )
        for number in range(2)
    ]
    blended = mixed([{"name": "mixup", "probability": 1, "scale": [1, 1]}], samples, 0, (60, 60))
    assert blended.proposals is not None
    assert blended.proposals[:, 3].tolist() == [60, 60, 59, 59, 58, 58]
    with_none = [replace(sample, proposals=None) for sample in four_images(0)]
    assert mixed(YOLOX[:2], with_none, 0).proposals is None


def test_mixup_is_the_mean_of_two_images() -> None:
    random = np.random.default_rng(0)
    for seed in range(10):
        one, two = picture((40, 60), [[0, 0, 20, 10]], [1]), picture((40, 60), [[30, 5, 60, 40]], [2])
        one, two = (
            replace(sample, image=random.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for sample in (one, two)
        )
        part = {"name": "mixup", "probability": 1, "scale": [1, 1], "flip": 0}
        result = mixed([part], [one, two], seed, (40, 60))
        assert np.abs(result.image - (one.image.astype(float) + two.image) / 2).max() <= 0.5
        assert result.target.boxes.tolist() == [[0, 0, 20, 10], [30, 5, 60, 40]]
        assert result.target.labels.tolist() == [1, 2]
        mirrored = mixed([{**part, "flip": 1}], [one, two], seed, (40, 60))
        assert np.abs(mirrored.image - (one.image.astype(float) + two.image[:, ::-1]) / 2).max() <= 0.5
        assert mirrored.target.boxes.tolist() == [[0, 0, 20, 10], [0, 5, 30, 40]]
        for sample, mask in zip((one, two), result.target.masks):  # type: ignore[arg-type]
            assert torch.equal(mask, sample.target.masks[0])  # type: ignore[index]


def test_the_weights_of_mixup_follow_their_distribution() -> None:
    black, white = picture((8, 8), [[0, 0, 8, 8]], [0]), picture((8, 8), [[0, 0, 8, 8]], [7])
    for alpha, deviation in ((1.5, 0.25), (32, 1 / (4 * 65) ** 0.5)):
        part = {"name": "mixup", "probability": 1, "scale": [1, 1], "alpha": alpha}
        augment = Augment([part], Fit((8, 8)))
        values = np.array([augment(black, seed, [white]).image[4, 4, 0] / 255 for seed in range(200)])
        assert abs(values.mean() - 0.5) < 0.05
        assert abs(values.std() - deviation) < 0.2 * deviation


def test_mixup_places_the_second_image_at_random() -> None:
    corners = set()
    for seed in range(60):
        one, two = picture((90, 120), [], []), picture((200, 61), [[5, 50, 60, 190]], [7])
        result = mixed([{"name": "mixup", "probability": 1, "scale": [0.5, 2]}], [one, two], seed, (90, 120))
        check_sound(result)
        bright = torch.from_numpy(result.image.min(2) > 150)
        if not len(result.target):
            assert bright.sum() < 0.3 * 2 * 2 * 55 * 140 * (90 / 200) ** 2
            continue
        left, top, right, bottom = result.target.boxes[0].round().int().tolist()
        corners.add((left, top))
        assert bright[top + 1 : bottom - 1, left + 1 : right - 1].all()
        bright[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
        assert not bright.any()
    assert len(corners) > 30


def test_mixing_changes_none_of_the_images() -> None:
    samples = four_images(3)
    before = [(sample.image.copy(), sample.target.boxes.clone(), sample.target.masks.clone()) for sample in samples]  # type: ignore[union-attr]
    augment = Augment(YOLOX, Fit((64, 64)))
    for seed in range(10):
        augment(samples[0], seed, samples)
    for sample, (image, boxes, masks) in zip(samples, before):
        assert np.array_equal(sample.image, image)
        assert torch.equal(sample.target.boxes, boxes)
        assert torch.equal(sample.target.masks, masks)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
@pytest.mark.parametrize("sizes", [(1, 3), (5, 90), (1500, 1900)])
def test_nothing_unsound_comes_out(resize: Any, sizes: tuple[int, int]) -> None:
    """Tiny and huge images, with and without objects, one after another and mixed with themselves."""
    augment = Augment([*YOLOX, {"name": "perspective", "probability": 0.5}], Fit((48, 64), resize))
    random = np.random.default_rng(0)
    for seed in range(8 if sizes[0] < 1000 else 3):
        samples = []
        for _ in range(3):
            height, width = random.integers(*sizes, 2).tolist()
            boxes = (
                [[0, 0, width, height], [0, 0, 1, 1], [width - 1, 0, width, height]] if random.uniform() < 0.7 else []
            )
            samples.append(picture((height, width), boxes, [1, 2, 3][: len(boxes)]))
        for others in (samples, samples[:1]):
            result = augment(samples[0], seed, others)
            assert result.size == (48, 64)
            check_sound(result)
            assert result.meta.matrix is None
            fitted = Fit((48, 64), resize)(result)
            assert tuple(fitted.image.shape) == (3, 48, 64)
    empty = [picture((50, 40), [], [])]
    assert len(augment(empty[0], 0, empty).target) == 0


def test_a_mixed_image_names_all_its_sources() -> None:
    result = mixed([{"name": "mosaic"}], four_images(0), 0)
    assert result.meta.source == "image 0 + image 1 + image 2 + image 3"


def test_mixes_leave_the_other_augmentations_as_they_are() -> None:
    """Off, by probability or by the caller, they are as if they were not in the list."""
    rest = [{"name": "photometric"}, {"name": "zoom_crop"}, {"name": "flip"}]
    off = [{"name": "mosaic", "probability": 0}, {"name": "mixup", "probability": 0}]
    fit = Fit((64, 64))
    for seed in range(20):
        samples = four_images(seed)
        expected = Augment(rest, fit)(samples[0], seed)
        for result in (
            Augment([*off, *rest], fit)(samples[0], seed, samples),
            Augment([*YOLOX[:2], *rest], fit)(samples[0], seed),
        ):
            assert np.array_equal(result.image, expected.image)
            assert torch.equal(result.target.boxes, expected.target.boxes)


def test_mosaic_and_mixup_happen_with_their_probabilities() -> None:
    samples = [picture((20, 20), [[0, 0, 20, 20]], [number], number) for number in range(4)]
    augment = Augment([{"name": "mosaic", "probability": 0.6}, {"name": "mixup", "probability": 0.3}], Fit((20, 20)))
    counts = [len(augment(samples[0], seed, samples).meta.source.split(" + ")) for seed in range(300)]
    # Alone, mixed up, four, four and mixed up.
    shares = [counts.count(count) / 300 for count in (1, 2, 4, 5)]
    assert np.allclose(shares, [0.28, 0.12, 0.42, 0.18], atol=0.08)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "mosaic", "probability": 1.5}, r"'mosaic\.probability' must be in 0\.\.1, but is 1\.5"),
        ({"name": "mosaic", "scale": [2, 1]}, r"'mosaic\.scale' is the smallest and the largest factor"),
        ({"name": "mosaic", "perspective": 0.6}, r"'mosaic\.perspective' must be in 0\.\.0\.49"),
        ({"name": "mosaic", "centre": 1}, r"'augment\[0\]\.centre' is not an option of the augmentation 'mosaic'"),
        ({"name": "mixup", "alpha": 0}, r"'mixup\.alpha' must be greater than 0, or null .* but is 0"),
        ({"name": "mixup", "scale": [-1, 1]}, r"'mixup\.scale'"),
        ({"name": "mixup", "flip": -1}, r"'mixup\.flip'"),
    ],
)
def test_impossible_options_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment([part], Fit((32, 32)))


def read(
    workers: int = 0, epochs: Sequence[int] = (0,), parts: Any = YOLOX, masks: bool = False, **options: Any
) -> list[Batch]:
    fit = Fit((64, 64), "letterbox")
    dataset = Shapes("train", train_count=10, size=80, masks=masks)
    loader, sampler = training_loader(
        dataset, fit, Augment(parts, fit) if parts else None, batch_size=4, workers=workers, seed=3, **options
    )
    found = []
    for epoch in epochs:
        sampler.epoch = epoch
        found += list(batches(loader))
    return found


def equal(one: Sequence[Batch], two: Sequence[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.images, b.images)
        and all(
            torch.equal(s.boxes, t.boxes)
            and torch.equal(s.labels, t.labels)
            and (s.masks is None or torch.equal(s.masks, t.masks))
            for s, t in zip(a.targets, b.targets)
        )
        for a, b in zip(one, two)
    )


SIZES = InputOptions((64, 64), "letterbox", (0.5, 1.5)).training_sizes


@pytest.mark.parametrize("sizes", [(), SIZES])
def test_workers_and_resumed_runs_see_the_same_images(sizes: Any) -> None:
    alone = read(0, (0, 1, 2), masks=True, sizes=sizes)
    assert equal(alone, read(2, (0, 1, 2), masks=True, sizes=sizes))
    assert equal(alone[6:], read(0, (2,), masks=True, sizes=sizes))
    assert not equal(alone[:3], alone[3:6])


def test_images_without_mixes_are_made_from_seed_epoch_and_index_as_ever() -> None:
    parts = [{"name": "photometric"}, {"name": "iou_crop"}, {"name": "flip"}]
    fit = Fit((64, 64), "letterbox")
    dataset, augment = Shapes("train", train_count=10, size=80), Augment(parts, fit)
    order = np.random.default_rng([3, 1]).permutation(10)
    expected = []
    for index in [*order, *order[:2]]:
        seed = int(np.random.SeedSequence([3, 1, index]).generate_state(1)[0])
        expected.append(fit(augment(dataset[int(index)], seed)).image)
    assert torch.equal(torch.cat([batch.images for batch in read(0, (1,), parts)]), torch.stack(expected))


def test_the_last_epochs_can_be_unmixed_and_then_plain() -> None:
    options = {"unmixed_from_epoch": 1, "plain_from_epoch": 2}
    found = read(0, (0, 1, 2), **options)
    assert equal(found[:3], read(0, (0,)))
    assert equal(found[3:6], read(0, (1,), YOLOX[2:]))
    assert equal(found[6:], read(0, (2,), []))
    assert not equal(found[:3], read(0, (0,), YOLOX[2:]))


def test_a_partner_that_cannot_be_read_is_an_error_naming_it() -> None:
    class Broken(Shapes):
        def __getitem__(self, index: int) -> Sample:
            if index == 5:
                raise DataError("The image 'five.jpg' is broken.")
            return super().__getitem__(index)

    fit = Fit((32, 32))
    dataset = Broken("train", train_count=6, size=32)
    augment = Augment([{"name": "mosaic"}], fit)
    loader, _ = training_loader(dataset, fit, augment, batch_size=6, workers=0, seed=0)
    with pytest.raises(DataError, match=r"five\.jpg"):
        list(batches(loader))


def test_each_batch_has_one_size_and_batches_differ() -> None:
    assert SIZES == ((32, 32), (64, 64), (96, 96))
    found = read(0, range(6), sizes=SIZES)
    sizes = [tuple(batch.images.shape[2:]) for batch in found]
    assert set(sizes) == set(SIZES)
    for batch, size in zip(found, sizes):
        for target in batch.targets:
            assert (target.boxes <= torch.tensor([size[1], size[0]] * 2)).all()
    # Boxes grow with the image.
    plain = read(0, range(6), [], sizes=SIZES)
    areas = {size: [] for size in SIZES}  # type: ignore[var-annotated]
    for batch in plain:
        areas[tuple(batch.images.shape[2:])] += [
            target.boxes[:, 2:].max().item() for target in batch.targets if len(target)
        ]  # type: ignore[index]
    means = [float(np.mean(areas[size])) for size in SIZES]
    assert means[0] < means[1] < means[2]
    masks = read(0, (0,), masks=True, sizes=SIZES)
    assert all(target.masks.shape[1:] == batch.images.shape[2:] for batch in masks for target in batch.targets)  # type: ignore[union-attr]


def test_all_processes_take_the_same_size_and_the_same_order_as_with_one_size() -> None:
    for epoch in range(3):
        keys = []
        for rank in range(3):
            sampler, plain = EpochSampler(50, 4, 7, rank, 3, SIZES), EpochSampler(50, 4, 7, rank, 3)
            sampler.epoch = plain.epoch = epoch
            keys.append(list(sampler))
            assert [key.image for key in keys[-1]] == [key.image for key in plain]
            assert {key.size for key in plain} == {None}
        sizes = [[key.size for key in rank] for rank in keys]
        assert sizes[0] == sizes[1] == sizes[2]
        assert all(len(set(sizes[0][first : first + 4])) == 1 for first in range(0, len(sizes[0]), 4))


def test_evaluation_keeps_to_the_size_of_the_input() -> None:
    loader = evaluation_loader(Shapes("val", val_count=4, size=80), Fit((64, 64)), batch_size=2, workers=0)
    assert {tuple(batch.images.shape) for batch in batches(loader)} == {(2, 3, 64, 64)}


@pytest.mark.parametrize(
    ("size", "factors", "expected"),
    [
        ((320, 320), (0.9, 1.1), [(288, 288), (320, 320), (352, 352)]),
        ((416, 416), (320 / 416, 608 / 416), [(side, side) for side in range(320, 609, 32)]),
        ((300, 300), (1, 1.1), [(320, 320)]),
        ((240, 480), (0.5, 1.0), [(128, 256), (160, 320), (192, 384), (224, 448)]),
        ((480, 320), (0.8, 1.0), [(384, 256), (448, 288), (480, 320)]),
        ((64, 64), (0.01, 1), [(32, 32), (64, 64)]),
    ],
)
def test_training_sizes(size: tuple[int, int], factors: tuple[float, float], expected: Any) -> None:
    assert list(InputOptions(size, "stretch", factors).training_sizes) == expected
    assert InputOptions(size).training_sizes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"resize": "short_side", "multi_scale": (0.5, 1.5)},
            r"'input\.multi_scale' cannot be combined with .* short_side",
        ),
        ({"multi_scale": (1.5, 0.5)}, r"smallest and the largest factor .* is \[1\.5, 0\.5\]"),
        ({"multi_scale": (0.0, 1.0)}, r"greater than 0"),
        ({"size": (300, 300), "multi_scale": (0.98, 1.02)}, r"leaves no multiple of 32"),
    ],
)
def test_scales_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputOptions(**options)


def test_a_model_that_cannot_take_the_smallest_size_is_refused_at_the_start(tiny: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"'input\.multi_scale' gives inputs as small as \[32, 32\], which this model"
    ):
        train(tiny("--input.multi_scale", "[0.5, 1.5]"))
    folder = train(tiny("--input.multi_scale", "[1, 1.5]", "--augment", "[{name: mosaic}]", "--train.epochs", "1"))
    assert folder is not None
    assert (folder.images / "training_batch.jpg").is_file()
