"""Images larger than the network's input, in windows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detkit.config import load_experiment
from detkit.data.formats.shapes import Shapes
from detkit.data.loader import collate
from detkit.engine.evaluate import evaluate
from detkit.engine.images import predict_sample
from detkit.heads.parts.semantic import SemanticOutputs
from detkit.inference.predictor import Predictor
from detkit.inference.windows import _tent, predict, predict_with_losses, window_starts
from detkit.model import Model, build_model
from detkit.structures import Batch, ClassList, Meta, Sample, Target
from detkit.tasks.base import task_of

CLASSES = ClassList.from_names(["background", "circle", "square", "triangle", "star"])
CONFIG = """
data: {name: shapes, train_count: 8, val_count: 6, size: 100}
backbone: {name: small_ssd, widths: [4, 8, 8], level_channels: 8}
head: {name: fcn}
input: {size: [64, 64], resize: crop, overlap: 0.5}
train: {epochs: 1, batch_size: 4, workers: 0}
"""


@pytest.fixture
def model(tmp_path: Any) -> Model:
    """Random weights of which a pixel's class depends."""
    torch.manual_seed(0)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    built = build_model(load_experiment([str(path)]), CLASSES).eval()
    for score in built.head.scores:
        torch.nn.init.normal_(score.weight)
    return built


def sample(height: int, width: int, seed: int = 0) -> Sample:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    semantic = torch.from_numpy(random.integers(0, 5, (height, width), dtype=np.uint8))
    return Sample(image, replace(Target.empty(), semantic=semantic), Meta(seed, f"random {seed}", (height, width)))


def batch_of(model: Model, *samples: Sample) -> Batch:
    return collate([model.fit(item) for item in samples], model.fit)


@torch.no_grad()
def plain(model: Model, item: Sample, overlap: float = 0.5) -> Tensor:
    """The labels by loops over windows and all logits of the image at once."""
    image = model.fit(item).image
    height, width = image.shape[1:]
    sums, weights = torch.zeros(5, height, width), torch.zeros(height, width)
    for top in window_starts(height, 64, overlap):
        for left in window_starts(width, 64, overlap):
            window = image[None, :, top : top + 64, left : left + 64]
            weight = torch.outer(_tent(64), _tent(64))
            sums[:, top : top + 64, left : left + 64] += model(window, ((64, 64),)).logits[0] * weight
            weights[top : top + 64, left : left + 64] += weight
    return (sums / weights).argmax(0)[: item.size[0], : item.size[1]]


@pytest.mark.parametrize(
    ("length", "window", "overlap", "expected"),
    [
        (300, 100, 0.5, [0, 50, 100, 150, 200]),
        (300, 100, 0.0, [0, 100, 200]),
        (301, 100, 0.0, [0, 67, 134, 201]),
        (100, 100, 0.5, [0]),
        (101, 100, 0.5, [0, 1]),
    ],
)
def test_windows_cover_a_side_evenly(length: int, window: int, overlap: float, expected: list[int]) -> None:
    assert window_starts(length, window, overlap) == expected


@pytest.mark.parametrize("seed", range(50))
def test_windows_leave_no_pixel_out_and_overlap_enough(seed: int) -> None:
    random = np.random.default_rng(seed)
    window = int(random.integers(1, 200))
    length, overlap = window + int(random.integers(0, 1000)), float(random.uniform(0, 0.9))
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= max(1, int(window * (1 - overlap)))).all()


@pytest.mark.parametrize("size", [(64, 64), (200, 64), (130, 101), (64, 65), (40, 150)])
def test_windows_are_the_weighted_mean_of_their_logits(model: Model, size: tuple[int, int]) -> None:
    item = sample(*size)
    with torch.no_grad():
        (found,) = predict(model, batch_of(model, item))
    assert tuple(found.labels.shape) == size
    assert found.labels.unique().numel() > 1
    assert (found.labels == plain(model, item)).float().mean() > 0.9999  # equal but for rounding


def test_an_image_not_larger_than_the_input_is_seen_at_once(model: Model) -> None:
    """Exactly: also beside larger images, and smaller ones with their padding."""
    small, fitting, large = sample(40, 50, 1), sample(64, 64, 2), sample(90, 130, 3)
    with torch.no_grad():
        expected = [model.head.decode(model(*network_input(model, item)))[0].labels for item in (small, fitting)]
        for order in ([small, fitting], [small, fitting, large], [small], [fitting]):
            found = predict(model, batch_of(model, *order))
            for prediction, target in zip(found, expected[1:] if order == [fitting] else expected):
                assert torch.equal(prediction.labels, target)


def network_input(model: Model, item: Sample) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    fitted = model.fit(item)
    assert tuple(fitted.image.shape[1:]) == (64, 64)
    return fitted.image[None], (fitted.size,)


def test_no_prediction_depends_on_the_others_of_its_batch(model: Model) -> None:
    items = [sample(90, 130, 3), sample(64, 64, 2), sample(150, 70, 4), sample(30, 20, 5)]
    with torch.no_grad():
        together = predict(model, batch_of(model, *items))
        for item, found in zip(items, together):
            (alone,) = predict(model, batch_of(model, item))
            assert (found.labels == alone.labels).float().mean() > 0.9999


def test_no_more_windows_at_once_than_the_batch_has_images(model: Model) -> None:
    counts = []

    def network(images: Tensor, sizes: Any, proposals: Any) -> SemanticOutputs:
        counts.append(len(images))
        assert images.shape[2:] == (64, 64)
        return model(images, sizes, proposals)

    with torch.no_grad():
        predict(model, batch_of(model, sample(200, 200), sample(200, 100)), network)
    assert max(counts) == 2
    assert sum(counts) == 6 * 6 + 6 * 3


def test_losses_of_windows_are_averaged(model: Model) -> None:
    item = sample(64, 96)
    with torch.no_grad():
        _, losses = predict_with_losses(model, batch_of(model, item))
        fitted, expected = model.fit(item), []
        for left in (0, 32):
            outputs = model(fitted.image[None, :, :, left : left + 64], ((64, 64),))
            part = replace(Target.empty(), semantic=item.target.semantic[:, left : left + 64])  # type: ignore[index]
            expected.append(model.head.loss(outputs, (part,))["pixel"].item())
    assert losses["pixel"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_evaluation_prediction_and_sample_images_agree(model: Model) -> None:
    dataset = Shapes("val", val_count=3, size=100, semantic=True)
    evaluation = evaluate(model, dataset, batch_size=2, workers=0)
    task = task_of(model.head)
    assert evaluation.scores.images == 3
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    for index in range(3):
        image = predict_sample(model, task, dataset[index])
        target = dataset.target(index).semantic
        assert target is not None
        confusion += torch.bincount(target.long().flatten() * 5 + image.labels.flatten(), minlength=25).view(5, 5)
        expected = plain(model, dataset[index])
        assert (image.labels == expected).float().mean() > 0.999
    assert (confusion - evaluation.scores.confusion).abs().sum() < 30
    predictor = Predictor(model, "cpu", precision="fp32")  # folds batch norms: rounding differs
    found = predictor.predict(dataset[2].image)
    assert (found.labels == image.labels).float().mean() > 0.99
    assert found.class_names == CLASSES.names


def test_a_large_image_is_not_held_as_logits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tall image only one row of windows at a time."""
    sizes = []
    original = torch.Tensor.new_zeros

    def new_zeros(self: Tensor, *size: Any, **options: Any) -> Tensor:
        sizes.append(size)
        return original(self, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    with torch.no_grad():
        (found,) = predict(model, batch_of(model, sample(1000, 70)))
    assert tuple(found.labels.shape) == (1000, 70)
    assert (5, 64, 70) in sizes
    assert all(np.prod(size) <= 5 * 64 * 70 for size in sizes)
