"""input.resize crop: parts of images in training, whole images afterwards; semantic maps through augmentations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from detkit.config import InputOptions
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import Key, batches, collate, training_loader
from detkit.data.transforms import Augment, Fit
from detkit.errors import ConfigError
from detkit.structures import IGNORED_PIXEL, Meta, Sample, Target

PADDING = (0.5, 0.25, 0.75)
SIZE = (48, 64)


def coded(height: int, width: int) -> Sample:
    """An image whose pixels say their class: red is 40 times the class."""
    random = np.random.default_rng(height * 1000 + width)
    cells = random.integers(0, 5, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    labels = np.kron(cells, np.ones((16, 16), dtype=np.uint8))[:height, :width]
    image = np.stack([labels * 40, labels * 0 + 200, labels * 0 + 10], axis=-1)
    target = replace(Target.empty(), semantic=torch.from_numpy(labels.copy()))
    return Sample(image, target, Meta(1, "coded", (height, width)))


def agreement(image: np.ndarray, semantic: np.ndarray) -> float:
    """The part of the pixels that count whose class is that which their colour says."""
    counted = semantic != IGNORED_PIXEL
    return float((np.rint(image[..., 0][counted] / 40) == semantic[counted]).mean())


@pytest.mark.parametrize("size", [(100, 120), (48, 64), (30, 200), (200, 30), (20, 20)])
def test_a_crop_is_a_part_of_the_image_with_its_labels(size: tuple[int, int]) -> None:
    sample, augment = coded(*size), Augment([], Fit(SIZE, "crop", PADDING))
    assert sample.target.semantic is not None
    whole = sample.target.semantic.numpy()
    places = set()
    for seed in range(20):
        found = augment(sample, seed)
        assert found.image.shape == (*SIZE, 3)
        assert found.target.semantic is not None
        semantic = found.target.semantic.numpy()
        height, width = min(SIZE[0], size[0]), min(SIZE[1], size[1])
        inside = semantic[:height, :width]
        assert agreement(found.image[:height, :width], inside) == 1.0
        assert (inside != IGNORED_PIXEL).all()
        assert (semantic[height:] == IGNORED_PIXEL).all()
        assert (semantic[:, width:] == IGNORED_PIXEL).all()
        assert (found.image[height:] == [128, 64, 191]).all()
        matches = [
            (top, left)
            for top in range(size[0] - height + 1)
            for left in range(size[1] - width + 1)
            if (whole[top : top + height, left : left + width] == inside).all()
        ]
        assert matches
        places.add(matches[0])
    assert (len(places) > 5) == (size[0] > SIZE[0] + 10 or size[1] > SIZE[1] + 10)


def test_evaluation_keeps_the_image_and_pads_small_ones_and_batches() -> None:
    fit = Fit(SIZE, "crop", PADDING)
    fitted = [fit(coded(*size)) for size in ((100, 50), (20, 90), (48, 64))]
    assert [tuple(item.image.shape[1:]) for item in fitted] == [(100, 64), (48, 90), (48, 64)]
    assert [item.size for item in fitted] == [(100, 50), (20, 90), (48, 64)]
    batch = collate(fitted, fit)
    assert tuple(batch.images.shape) == (3, 3, 100, 90)
    for image, item in zip(batch.images, fitted):
        height, width = item.size
        colour = torch.tensor(PADDING).view(3, 1, 1)
        assert (image[:, height:] == colour).all()
        assert (image[:, :, width:] == colour).all()
        assert item.target.semantic is not None
        assert (item.target.semantic[height:] == IGNORED_PIXEL).all()
        assert agreement(255 * image[:, :height, :width].permute(1, 2, 0).numpy(),
                         item.target.semantic[:height, :width].numpy()) == 1.0  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        {"name": "flip", "horizontal": 1.0, "vertical": 1.0},
        {"name": "random_scale"},
        {"name": "zoom_crop", "probability": 1.0},
        {"name": "expand", "max_ratio": 1.3, "fill": [0.0, 0.0, 0.0], "probability": 1.0},
        {"name": "perspective", "fill": 0.0},
        {"name": "albumentations", "transform": "Rotate", "options": {"limit": 45, "p": 1.0}},
    ],
)
@pytest.mark.parametrize("resize", ["crop", "stretch", "letterbox", "short_side"])
def test_labels_go_where_their_pixels_go(part: dict[str, Any], resize: Any) -> None:
    """And where an augmentation makes up pixels, they do not count."""
    size = (96, 128) if resize == "short_side" else SIZE
    augment, fit = Augment([part], Fit(size, resize, PADDING)), Fit(size, resize, PADDING)
    sample = coded(100, 120)
    for seed in range(10):
        found = augment(sample, seed)
        semantic = fit(found).target.semantic
        assert semantic is not None
        assert found.target.semantic is not None
        assert agreement(found.image, found.target.semantic.numpy()) > 0.75  # colours are mixed between cells
        made_up = (found.image == 0).all(axis=-1)
        made_up_but_counted = made_up & (found.target.semantic.numpy() != IGNORED_PIXEL)
        assert made_up_but_counted.mean() < 0.01


def test_half_a_pixel_is_not_lost_when_scaling() -> None:
    """Halved and doubled labels lie over the halved and doubled image without a shift."""
    sample = coded(96, 128)
    for factor in (0.5, 2.0):
        augment = Augment([{"name": "random_scale", "smallest": factor, "largest": factor}], Fit((32, 32), "crop"))
        found = [augment(sample, seed) for seed in range(5)]
        assert all(agreement(item.image, item.target.semantic.numpy()) > 0.93 for item in found)  # type: ignore[union-attr]


def test_colours_alone_leave_labels_alone() -> None:
    sample = coded(*SIZE)
    found = Augment([{"name": "photometric", "probability": 1.0}], Fit(SIZE, "stretch"))(sample, 0)
    assert found.target.semantic is not None
    assert torch.equal(found.target.semantic, sample.target.semantic)  # type: ignore[arg-type]
    assert (found.image != sample.image).any()


@pytest.mark.parametrize("augment", [None, [{"name": "flip"}]])
def test_training_cuts_also_without_augmentation_and_in_plain_epochs(augment: Any) -> None:
    dataset = Shapes("train", train_count=6, size=96, semantic=True)
    fit = Fit((32, 64), "crop", PADDING)
    parts = None if augment is None else Augment(augment, fit)
    loader, sampler = training_loader(
        dataset, fit, parts, batch_size=3, workers=0, seed=0, plain_from_epoch=1, sizes=[(32, 64), (64, 64)]
    )
    for sampler.epoch in range(2):
        for batch in batches(loader):
            assert tuple(batch.images.shape[2:]) in ((32, 64), (64, 64))
            assert all(tuple(target.semantic.shape) == tuple(batch.images.shape[2:]) for target in batch.targets)
    reader = loader.dataset
    assert torch.equal(reader[Key(1, 0)].image, reader[Key(1, 0)].image)
    assert not torch.equal(reader[Key(1, 0)].image, reader[Key(2, 0)].image)


def test_mixes_refuse_semantic_maps() -> None:
    dataset = Shapes("train", train_count=6, size=64, semantic=True)
    augment = Augment([{"name": "mixup", "probability": 0.0}], Fit((32, 32), "crop"))
    with pytest.raises(ConfigError, match="is not supported for semantic maps"):
        augment(dataset[0], 0, dataset)
    augment(dataset[0], 0)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"'input\.overlap' must lie in 0\.\.0\.9, but is 1\.0"):
        InputOptions(overlap=1.0)
    assert InputOptions((96, 64), "crop", (0.5, 1.5)).training_sizes
    with pytest.raises(ConfigError, match="'random_scale' draws from smallest"):
        Augment([{"name": "random_scale", "smallest": 2.0, "largest": 1.0}], Fit((32, 32), "crop"))
