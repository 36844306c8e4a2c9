"""The convolutional sweep against the same network run on every crop, and the head's own arithmetic."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from detkit.errors import ConfigError
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.localization.sliding_window import SlidingWindow, SlidingWindowOutputs


def head(**options: Any) -> SlidingWindow:
    injected = {"channels": (8, 12), "strides": (8, 16), "num_classes": 3}
    injected = {key: options.pop(key, value) for key, value in injected.items()}
    return heads.build({"name": "sliding_window", **options}, "head", **injected)


def fully_connected(convolutions: nn.Sequential) -> nn.Sequential:
    """The same classifier with its layers as they are for a single window: fully connected."""
    layers: list[nn.Module] = [nn.Flatten()]
    for layer in convolutions:
        if isinstance(layer, nn.Conv2d):
            linear = nn.Linear(layer.weight[0].numel(), layer.out_channels)
            linear.weight.data, linear.bias.data = layer.weight.data.flatten(1), layer.bias.data  # type: ignore[union-attr]
            layers.append(linear)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("size", "places"), [((14, 14), (1, 1)), ((16, 16), (2, 2)), ((28, 28), (8, 8)), ((18, 26), (3, 7))]
)
def test_one_pass_equals_every_crop(size: tuple[int, int], places: tuple[int, int]) -> None:
    """The network of the lectures on sliding windows: 14 x 14 pixels, a 5 x 5 convolution without padding, a pool of 2,
    a window of 5 x 5 cells, and 400, 400 and 4 values. Images of 16 and 28 pixels have 2 x 2 and 8 x 8 windows."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
    network = head(channels=(16,), strides=(2,), windows=[[5, 5]], width=400)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = network([trunk(image)], Inputs(size, (size,) * 2)).logits
        classifier = fully_connected(network.classifiers[0][0])  # type: ignore[index]
        crops = [
            classifier(trunk(image[:, :, top : top + 14, left : left + 14]))
            for top in range(0, 2 * places[0], 2)
            for left in range(0, 2 * places[1], 2)
        ]
    assert found.std() > 0.01
    torch.testing.assert_close(found, torch.stack(crops, dim=1), rtol=1e-4, atol=1e-5)


def test_windows_lie_where_their_cells_do() -> None:
    """Of several sizes, on two levels: a value in one cell moves those windows alone that hold the cell's centre."""
    torch.manual_seed(0)
    network = head(windows=[[2, 2], [3, 1]])
    quiet = [torch.zeros(1, 8, 8, 12), torch.zeros(1, 12, 4, 6)]
    before = network(quiet, Inputs((64, 96), ((64, 96),)))
    counts = [7 * 11, 6 * 12, 3 * 5, 2 * 6]
    assert before.windows.shape == (sum(counts), 4)
    assert before.windows[0].tolist() == [0, 0, 16, 16]
    assert before.windows[counts[0]].tolist() == [0, 0, 8, 24]
    assert before.windows[-1].tolist() == [80, 16, 96, 64]
    for level, (row, column) in ((0, (4, 7)), (1, (2, 3))):
        loud = [feature.clone() for feature in quiet]
        loud[level][0, :, row, column] = 5.0
        moved = (network(loud, Inputs((64, 96), ((64, 96),))).logits != before.logits)[0].any(1)
        stride = (8, 16)[level]
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        holds = (before.windows[:, 0] < x) & (x < before.windows[:, 2])
        holds &= (before.windows[:, 1] < y) & (y < before.windows[:, 3])
        of_level = torch.arange(sum(counts)) < counts[0] + counts[1]
        assert torch.equal(moved, holds & (of_level if level == 0 else ~of_level))


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_a_plain_loop(seed: int) -> None:
    """With places for all windows nothing is left to chance."""
    network = head(samples=10_000, positive_fraction=1.0)
    raw = random_outputs(network, seed)
    boxes = torch.tensor([[3.0, 3, 34, 30], [30, 4, 96, 60], [40, 40, 50, 47]])
    targets = (Target(boxes, torch.tensor([1, 2, 0])), Target.empty())
    overlap = box_iou(raw.windows, boxes)
    best = {int(index) for target in overlap.T for index in (target == target.max()).nonzero()}
    total = 0.0
    counted = positives = 0
    for index in range(len(raw.windows)):
        value, target = overlap[index].max(0)
        total -= float(raw.logits[1, index].log_softmax(0)[0])
        counted += 1
        if value >= 0.5 or index in best:
            total -= float(raw.logits[0, index].log_softmax(0)[1 + int(targets[0].labels[target])])
            positives += 1
        elif value < 0.3:
            total -= float(raw.logits[0, index].log_softmax(0)[0])
        else:
            continue
        counted += 1
    assert positives >= 3
    assert counted < 2 * len(raw.windows)
    assert float(network.loss(raw, targets)["class"]) == pytest.approx(total / counted, rel=1e-5)


def random_outputs(network: SlidingWindow, seed: int = 0) -> SlidingWindowOutputs:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.zeros(2, 8, 8, 12), torch.zeros(2, 12, 4, 6)]
    raw = network(features, Inputs((64, 96), ((64, 96), (40, 50))))
    return raw._replace(logits=2 * torch.randn(raw.logits.shape, generator=generator))


def test_only_so_many_windows_are_sampled() -> None:
    """Of each image `samples`: the gradient reaches no other window."""
    network = head(samples=12, positive_fraction=0.25)
    raw = random_outputs(network)
    raw.logits.requires_grad_()
    target = Target(torch.tensor([[3.0, 3, 34, 30], [30, 4, 96, 60]]), torch.tensor([1, 2]))
    network.loss(raw, (target, Target.empty()))["class"].backward()
    assert raw.logits.grad is not None
    assert raw.logits.grad.any(2).sum(1).tolist() == [12, 12]
    # The gradient of the right class is negative: three of the first image's are objects.
    assert (raw.logits.grad[0, :, 1:] < 0).any(1).sum() <= 3
    assert (raw.logits.grad[1, :, 0] < 0).sum() == 12


def test_decoding_keeps_the_windows_of_each_class_inside_the_image() -> None:
    network = head(windows=[[2, 2]], nms_threshold=0.2)
    raw = random_outputs(network)
    logits = torch.full_like(raw.logits, -20.0)
    logits[..., 0] = 20.0

    def show(image: int, window: list[int], label: int, value: float) -> None:
        place = (raw.windows == torch.tensor(window)).all(1)
        assert place.sum() == 1
        logits[image, place, label + 1] = value

    show(0, [8, 8, 24, 24], 1, 24.0)
    show(0, [16, 8, 32, 24], 1, 23.0)  # overlaps it by a third: goes
    show(0, [16, 8, 32, 24], 2, 22.0)  # stays, being another class, though 23 leaves it little
    show(0, [32, 16, 64, 48], 0, 25.0)
    show(1, [40, 32, 56, 48], 0, 25.0)  # the image ends at 50 x 40
    show(1, [56, 0, 72, 16], 0, 30.0)  # in the padding
    found = network.decode(raw._replace(logits=logits))
    assert found[0].labels.tolist() == [0, 1, 2]
    assert found[0].boxes.tolist() == [[32, 16, 64, 48], [8, 8, 24, 24], [16, 8, 32, 24]]
    torch.testing.assert_close(found[0].scores[2], torch.tensor([20.0, 23, 22]).softmax(0)[2], rtol=1e-4, atol=0)
    assert found[1].boxes.tolist() == [[40, 32, 50, 40]]


def test_a_map_smaller_than_a_window_is_refused() -> None:
    network = head(windows=[[5, 2]])
    features = [torch.zeros(1, 8, 8, 12), torch.zeros(1, 12, 4, 6)]
    with pytest.raises(ConfigError, match=r"5x2 cells of 'head\.windows' does not fit on the map of stride 16.*4x6"):
        network(features, Inputs((64, 96), ((64, 96),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (8, 0)}, "cannot slide over a map pooled from the whole image"),
        ({"windows": []}, r"'head\.windows' must hold sizes"),
        ({"windows": [[2, 0]]}, r"of 1 cell at least, but is \[\[2, 0\]\]"),
        ({"samples": 0}, r"'head\.samples' must be at least 1"),
        ({"positive_fraction": 2.0}, r"'head\.positive_fraction' must be in 0\.\.1"),
        ({"background_below": 0.6}, r"'head\.background_below' must not be above"),
        ({"window": [[2, 2]]}, "Did you mean 'windows'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head(**options)


def test_learns_where_a_pattern_is() -> None:
    """A bright square of 32 pixels anywhere on a map of stride 8, and images without."""
    torch.manual_seed(0)
    network = head(channels=(1,), strides=(8,), num_classes=1, windows=[[4, 4]], width=16)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)

    def scene(seed: int) -> tuple[Tensor, tuple[Target, ...]]:
        generator = torch.Generator().manual_seed(seed)
        feature = 0.1 * torch.randn(4, 1, 12, 16, generator=generator)
        targets = []
        for image in range(3):
            row, column = (int(torch.randint(limit, (1,), generator=generator)) for limit in (9, 13))
            feature[image, :, row : row + 4, column : column + 4] += 1
            box = torch.tensor([[column, row, column + 4, row + 4]]) * 8.0
            targets.append(Target(box, torch.tensor([0])))
        return feature, (*targets, Target.empty())

    inputs = Inputs((96, 128), ((96, 128),) * 4)
    for step in range(100):
        feature, targets = scene(step)
        loss = network.loss(network([feature], inputs), targets)["class"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    feature, targets = scene(1000)
    for found, target in zip(network.decode(network([feature], inputs)), targets):
        sure = found[found.scores > 0.5]
        assert sure.boxes[:1].tolist() == target.boxes.tolist()
    assert F.softmax(network([feature], inputs).logits[3], dim=1)[:, 1].max() < 0.5
