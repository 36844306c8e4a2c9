"""The YOLO head against plain loops, and that it learns."""

import math

import pytest
import torch
from torch import Tensor

from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.errors import ConfigError
from detkit.model import build_model
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.darknet.yolov1 import YOLOv1, YOLOv1Outputs

HEIGHT, WIDTH, CLASSES, GRID, BOXES = 60, 90, 3, 3, 2


def make(**options: object) -> YOLOv1:
    given = {"name": "yolov1", "grid": GRID, "boxes": BOXES, "hidden": 8, **options}
    return heads.build(given, "head", channels=(4,), strides=(16,), num_classes=CLASSES)


def random_outputs(generator: torch.Generator, images: int = 2) -> YOLOv1Outputs:
    cells = GRID**2
    coordinates = torch.rand(images, cells, BOXES, 4, generator=generator)
    coordinates[..., 2:] -= 0.2  # some roots are negative
    return YOLOv1Outputs(
        coordinates,
        torch.randn(images, cells, BOXES, generator=generator),
        torch.randn(images, cells, CLASSES, generator=generator),
        (HEIGHT, WIDTH),
        ((HEIGHT, WIDTH),) * images,
    )


def random_target(generator: torch.Generator, count: int) -> Target:
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH - 5.0, HEIGHT - 5])
    far = corners + 2 + torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat((corners, torch.minimum(far, torch.tensor([float(WIDTH), HEIGHT]))), 1)
    return Target(
        boxes,
        torch.randint(CLASSES, (count,), generator=generator),
        difficult=torch.rand(count, generator=generator) < 0.2,
    )


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def pixels(raw: list[float], column: int, row: int) -> list[float]:
    x, y = (column + raw[0]) / GRID * WIDTH, (row + raw[1]) / GRID * HEIGHT
    width, height = raw[2] ** 2 * WIDTH, raw[3] ** 2 * HEIGHT
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def plain_losses(outputs: YOLOv1Outputs, targets: tuple[Target, ...]) -> dict[str, float]:
    """Equation 3 of the paper, written as loops over cells and boxes."""
    sums = {"box": 0.0, "objectness": 0.0, "class": 0.0}
    for image, target in enumerate(targets):
        owner: dict[tuple[int, int], int] = {}
        quiet: set[tuple[int, int]] = set()
        for index, (left, top, right, bottom) in enumerate(target.boxes.tolist()):
            cell = (int((left + right) / 2 / WIDTH * GRID), int((top + bottom) / 2 / HEIGHT * GRID))
            if target.ignored[index]:
                quiet.add(cell)
                for column in range(GRID):
                    for row in range(GRID):
                        step = (WIDTH / GRID, HEIGHT / GRID)
                        width = min(right, (column + 1) * step[0]) - max(left, column * step[0])
                        height = min(bottom, (row + 1) * step[1]) - max(top, row * step[1])
                        if max(width, 0) * max(height, 0) >= 0.5 * step[0] * step[1]:
                            quiet.add((column, row))
            else:
                owner.setdefault(cell, index)
        for row in range(GRID):
            for column in range(GRID):
                raw = outputs.coordinates[image, row * GRID + column].tolist()
                confidence = outputs.confidences[image, row * GRID + column].tolist()
                chosen = None
                if (column, row) in owner:
                    truth = owner[column, row]
                    box = target.boxes[truth].tolist()
                    overlaps = [iou(pixels(values, column, row), box) for values in raw]
                    chosen = max(range(BOXES), key=lambda k: overlaps[k])
                    if max(overlaps) == 0:
                        chosen = min(range(BOXES), key=lambda k: distance(pixels(raw[k], column, row), box))
                    x = (box[0] + box[2]) / 2 / WIDTH * GRID - column
                    y = (box[1] + box[3]) / 2 / HEIGHT * GRID - row
                    wanted = (x, y, math.sqrt((box[2] - box[0]) / WIDTH), math.sqrt((box[3] - box[1]) / HEIGHT))
                    sums["box"] += 5 * sum((p - t) ** 2 for p, t in zip(raw[chosen], wanted))
                    sums["objectness"] += (confidence[chosen] - overlaps[chosen]) ** 2
                    for label in range(CLASSES):
                        probability = float(outputs.classes[image, row * GRID + column, label])
                        sums["class"] += (probability - (label == int(target.labels[truth]))) ** 2
                if (column, row) not in quiet:
                    sums["objectness"] += 0.5 * sum(confidence[k] ** 2 for k in range(BOXES) if k != chosen)
    return {name: value / len(targets) for name, value in sums.items()}


def distance(a: list[float], b: list[float]) -> float:
    sides = (WIDTH, HEIGHT)
    centres = sum((((a[k] + a[k + 2]) - (b[k] + b[k + 2])) / 2 / sides[k]) ** 2 for k in (0, 1))
    return centres + sum((((a[k + 2] - a[k]) - (b[k + 2] - b[k])) / sides[k]) ** 2 for k in (0, 1))


def test_losses_equal_plain_loops() -> None:
    head = make()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        outputs = random_outputs(generator)
        if seed % 4 == 0:
            outputs.coordinates[..., 2:] *= (
                0.01  # so small that no box overlaps its ground truth: the nearest one answers
            )
        targets = tuple(random_target(generator, count) for count in (seed % 7, 0 if seed % 5 == 0 else 3))
        mine = head.loss(outputs, targets)
        for name, value in plain_losses(outputs, targets).items():
            assert float(mine[name]) == pytest.approx(value, rel=1e-4, abs=1e-5), (seed, name)


def outputs_of_one(box: Tensor, confidence: float) -> YOLOv1Outputs:
    """Cell 5 (row 1, column 2) alone predicts something, with its second box."""
    outputs = YOLOv1Outputs(
        torch.zeros(1, 9, 2, 4), torch.zeros(1, 9, 2), torch.zeros(1, 9, 3), (HEIGHT, WIDTH), ((HEIGHT, 80),)
    )
    outputs.coordinates[0, 5, 1] = box
    outputs.confidences[0, 5, 1] = confidence
    outputs.classes[0, 5] = torch.tensor([-0.5, 0.5, 1.5])
    return outputs


def test_decode() -> None:
    """Score is confidence times probability; the box is cut to the image inside the padding."""
    found = make().decode(outputs_of_one(torch.tensor([0.5, 0.25, 0.5, 1.0]), 0.8))[0]
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.4]))
    assert found.labels.tolist() == [2, 1]
    # centre 75, 25; 22.5 wide and 60 high
    torch.testing.assert_close(found.boxes, torch.tensor([[63.75, 0.0, 80.0, 55.0]] * 2))
    assert len(make().decode(outputs_of_one(torch.ones(4), -0.8))[0]) == 0
    assert make().decode(outputs_of_one(torch.ones(4), 7.0))[0].scores.max() == 1


def test_the_coarsest_map_with_places_is_read() -> None:
    head = heads.build(
        {"name": "yolov1", "hidden": 8}, "head", channels=(4, 6, 5), strides=(8, 16, 0), num_classes=CLASSES
    )
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 5, 1, 1)]
    outputs = head(features, Inputs((64, 64), ((64, 64),) * 2))
    assert outputs.coordinates.shape == (2, 49, 2, 4)
    assert outputs.classes.shape == (2, 49, 3)


def test_the_network_of_the_paper() -> None:
    """7 x 7 x 30 values for VOC's 20 classes, a hidden layer of 4096."""
    with torch.device("meta"):
        head = heads.build({"name": "yolov1"}, "head", channels=(1024,), strides=(64,), num_classes=20)
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [
        (4096, 7 * 7 * 1024), (4096,), (7 * 7 * 30, 4096), (7 * 7 * 30,),
    ]  # fmt: skip


def test_convolutions_number_cells_row_by_row() -> None:
    head = make(layers="convolution", dropout=0.0)
    features = torch.zeros(1, 4, GRID, GRID)
    before = head([features], Inputs((HEIGHT, WIDTH), ((HEIGHT, WIDTH),)))
    features[0, :, 1, 2] = 5.0
    after = head([features], Inputs((HEIGHT, WIDTH), ((HEIGHT, WIDTH),)))
    moved = (after.classes - before.classes).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"grid": 0}, r"'head\.grid' must be at least 1"),
        ({"boxes": 0}, r"'head\.boxes' must be at least 1"),
        ({"dropout": 2}, r"'head\.dropout' must be in 0\.\.1"),
        ({"coordinate_weight": -1}, r"'head\.coordinate_weight' must be at least 0"),
        ({"layers": "dense"}, r"head\.layers"),
        ({"bokses": 2}, r"'head\.bokses' is not an option.*Did you mean 'boxes'"),
    ],
)
def test_wrong_options(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_a_map_without_places_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a spatial feature map"):
        heads.build({"name": "yolov1"}, "head", channels=(4,), strides=(0,), num_classes=2)


@pytest.mark.slow
def test_overfits_eight_images(tiny: object) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    experiment = tiny(  # type: ignore[operator]
        "--backbone", "{name: darknet_tiny, levels: [4], widths: [8, 16, 32, 64, 64, 8, 8]}",
        "--head", "{name: yolov1, grid: 12, hidden: 256, dropout: 0.0}",
        "--input.size", "[96, 96]",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(experiment, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    fitted = [model.fit(dataset[index]) for index in range(8)]
    images = torch.stack([image for image, *_ in fitted])
    for _ in range(300):
        losses = model.train().head.loss(model(images, ((96, 96),) * 8), tuple(item.target for item in fitted))
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert evaluate(model, dataset, batch_size=8, workers=0).scores.coco["mAP50"] > 0.95
