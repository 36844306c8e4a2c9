"""The YOLOv2 head against plain loops, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.errors import ConfigError
from detkit.model import build_model
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.darknet.yolo_grid import GridOutputs, lay_grid, predicted_boxes
from detkit.zoo.darknet.yolov2 import COCO_ANCHORS, YOLOv2, darknet_reorg, space_to_depth

HEIGHT, WIDTH, CLASSES, MAP = 64, 96, 3, (4, 6)
ANCHORS = [[8.0, 8.0], [30.0, 14.0], [15.0, 40.0]]


def make(**options: object) -> YOLOv2:
    given = {"name": "yolov2", "width": 8, "depth": 1, "anchors": ANCHORS, **options}
    return heads.build(given, "head", channels=(4,), strides=(16,), num_classes=CLASSES)


def random_outputs(generator: torch.Generator, images: int = 2) -> GridOutputs:
    cells, anchors = lay_grid((MAP,), (HEIGHT, WIDTH), [torch.tensor(ANCHORS)])
    values = torch.randn(images, len(cells), 5 + CLASSES, generator=generator)
    values[..., 2:4] *= 0.4
    return GridOutputs(values, cells, anchors, (MAP,), (HEIGHT, WIDTH), ((HEIGHT, WIDTH),) * images)


def random_target(generator: torch.Generator, count: int, difficult: float = 0.2) -> Target:
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH - 5.0, HEIGHT - 5])
    far = corners + 3 + torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat((corners, torch.minimum(far, torch.tensor([float(WIDTH), HEIGHT]))), 1)
    return Target(
        boxes,
        torch.randint(CLASSES, (count,), generator=generator),
        difficult=torch.rand(count, generator=generator) < difficult,
    )


def predict_near(outputs: GridOutputs, targets: tuple[Target, ...], generator: torch.Generator) -> None:
    """Let all anchors of the cell of each image's first ground truth predict it, more or less."""
    for values, target in zip(outputs.values, targets):
        for left, top, right, bottom in target.boxes[:1].tolist():
            x, y = (left + right) / 2 / WIDTH * MAP[1], (top + bottom) / 2 / HEIGHT * MAP[0]
            first = (int(y) * MAP[1] + int(x)) * len(ANCHORS)
            inside = torch.tensor([x % 1, y % 1]).clamp(0.01, 0.99)
            for place, anchor in enumerate(torch.tensor(ANCHORS), start=first):
                values[place, :2] = inside.logit()
                values[place, 2:4] = (torch.tensor([right - left, bottom - top]) / anchor).log()
                values[place, :4] += 0.4 * torch.randn(4, generator=generator)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU, and the part of a that lies in b."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    own = (a[2] - a[0]) * (a[3] - a[1])
    return width * height / (own + (b[2] - b[0]) * (b[3] - b[1]) - width * height), width * height / max(own, 1e-9)


def cut(box: list[float]) -> list[float]:
    return [min(max(value, 0), limit) for value, limit in zip(box, (WIDTH, HEIGHT) * 2)]


def shape_overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    both = min(a[0], b[0]) * min(a[1], b[1])
    return both / (a[0] * a[1] + b[0] * b[1] - both)


def plain_box(raw: list[float], column: int, row: int, anchor: list[float], size: tuple[int, int]) -> list[float]:
    """Figure 3 of the paper; `size` is (rows, columns)."""
    x = (sigmoid(raw[0]) + column) / size[1] * WIDTH
    y = (sigmoid(raw[1]) + row) / size[0] * HEIGHT
    width, height = anchor[0] * math.exp(raw[2]), anchor[1] * math.exp(raw[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def plain_losses(outputs: GridOutputs, targets: tuple[Target, ...], rescore: bool) -> dict[str, float]:
    """Darknet's region layer as loops over the ground truths, rows, columns and anchors."""
    rows, columns = MAP
    sums = {"box": 0.0, "objectness": 0.0, "class": 0.0}
    for image, target in enumerate(targets):
        raw = outputs.values[image].reshape(rows, columns, len(ANCHORS), -1).tolist()
        truths = target.boxes.tolist()
        owner: dict[tuple[int, int, int], int] = {}
        quiet: set[tuple[int, int, int]] = set()
        for index, box in enumerate(truths):
            width, height = box[2] - box[0], box[3] - box[1]
            row, column = int((box[1] + box[3]) / 2 / HEIGHT * rows), int((box[0] + box[2]) / 2 / WIDTH * columns)
            shapes = [shape_overlap((width, height), (a[0], a[1])) for a in ANCHORS]
            place = (row, column, shapes.index(max(shapes)))
            if target.ignored[index]:
                quiet.add(place)
            else:
                owner[place] = index
        for row in range(rows):
            for column in range(columns):
                for a, anchor in enumerate(ANCHORS):
                    values = raw[row][column][a]
                    box = plain_box(values, column, row, anchor, MAP)
                    objectness = sigmoid(values[4])
                    if (row, column, a) in owner:
                        truth = truths[owner[row, column, a]]
                        width, height = truth[2] - truth[0], truth[3] - truth[1]
                        wanted = (
                            (truth[0] + truth[2]) / 2 / WIDTH * columns - column,
                            (truth[1] + truth[3]) / 2 / HEIGHT * rows - row,
                            math.log(width / anchor[0]),
                            math.log(height / anchor[1]),
                        )
                        found = (sigmoid(values[0]), sigmoid(values[1]), values[2], values[3])
                        scale = 2 - width * height / (WIDTH * HEIGHT)
                        sums["box"] += 0.5 * scale * sum((f - w) ** 2 for f, w in zip(found, wanted))
                        confidence = overlap(box, truth)[0] if rescore else 1.0
                        sums["objectness"] += 0.5 * 5 * (objectness - confidence) ** 2
                        label = target.labels[owner[row, column, a]]
                        sums["class"] += float(F.cross_entropy(torch.tensor(values[5:]), label))
                    elif (row, column, a) not in quiet:
                        near = any(overlap(box, truth)[0] > 0.6 for truth in truths)
                        inside = any(
                            overlap(cut(box), truth)[1] >= 0.5
                            for truth, ignored in zip(truths, target.ignored.tolist())
                            if ignored
                        )
                        if not near and not inside:
                            sums["objectness"] += 0.5 * objectness**2
    return {name: value / len(targets) for name, value in sums.items()}


@pytest.mark.parametrize("rescore", [True, False])
def test_losses_equal_plain_loops(rescore: bool) -> None:
    head = make(rescore=rescore)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        outputs = random_outputs(generator)
        targets = tuple(random_target(generator, count) for count in (seed % 9, 0 if seed % 5 == 0 else 12))
        predict_near(outputs, targets, generator)
        mine = head.loss(outputs, targets)
        for name, value in plain_losses(outputs, targets, rescore).items():
            assert float(mine[name]) == pytest.approx(value, rel=1e-4, abs=1e-5), (seed, name)


def test_gradients_are_those_of_darknet() -> None:
    """Of centres scale * (sigma - t) * sigma * (1 - sigma), of sides scale * (value - t), of classes p - target."""
    head = make(rescore=False)
    outputs = random_outputs(torch.Generator().manual_seed(0), images=1)
    values = outputs.values.requires_grad_()
    target = Target(torch.tensor([[20.0, 18, 50, 31]]), torch.tensor([1]))
    sum(head.loss(outputs, (target,)).values()).backward()  # type: ignore[union-attr]
    place = (1 * MAP[1] + 2) * len(ANCHORS) + 1  # row 1, column 2, the anchor of 30 x 14
    raw, gradient = values[0, place].detach(), values.grad[0, place]
    scale = 2 - 30 * 13 / (HEIGHT * WIDTH)
    centre = raw[:2].sigmoid()
    wanted = torch.tensor([35 / 16 - 2, 24.5 / 16 - 1])
    torch.testing.assert_close(gradient[:2], scale * (centre - wanted) * centre * (1 - centre))
    torch.testing.assert_close(gradient[2:4], scale * (raw[2:4] - torch.tensor([0.0, math.log(13 / 14)])))
    objectness = raw[4].sigmoid()
    torch.testing.assert_close(gradient[4], 5 * (objectness - 1) * objectness * (1 - objectness))
    torch.testing.assert_close(gradient[5:], raw[5:].softmax(0) - torch.tensor([0.0, 1, 0]))


def test_predicted_boxes_equal_the_papers_figure() -> None:
    outputs = random_outputs(torch.Generator().manual_seed(1))
    boxes = predicted_boxes(outputs.values, outputs.cells, outputs.anchors)
    for place in range(boxes.shape[1]):
        cell, a = divmod(place, len(ANCHORS))
        row, column = divmod(cell, MAP[1])
        expected = plain_box(outputs.values[1, place].tolist(), column, row, ANCHORS[a], MAP)
        torch.testing.assert_close(boxes[1, place], torch.tensor(expected))


def test_scores_are_objectness_times_probability() -> None:
    outputs = random_outputs(torch.Generator().manual_seed(2), images=1)
    outputs.values[..., 4] = -20
    outputs.values[0, 7, 4:] = torch.tensor([1.0, 2.0, 0.0, -1.0])
    found = make().decode(outputs)[0]
    expected = torch.tensor(1.0).sigmoid() * torch.tensor([2.0, 0.0, -1.0]).softmax(0)
    torch.testing.assert_close(found.scores, expected)
    assert found.labels.tolist() == [0, 1, 2]


def test_huge_predictions_stay_finite() -> None:
    outputs = random_outputs(torch.Generator().manual_seed(2), images=1)
    values = (outputs.values * 1e4).requires_grad_()
    head = make()
    losses = head.loss(outputs._replace(values=values), (random_target(torch.Generator().manual_seed(0), 4),))
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert values.grad.isfinite().all()  # type: ignore[union-attr]
    assert head.decode(outputs._replace(values=values.detach()))[0].boxes.isfinite().all()


def test_a_target_on_the_far_edge_has_a_place() -> None:
    target = Target(torch.tensor([[WIDTH, HEIGHT, WIDTH, HEIGHT], [0, 0, 0, 0.0]]).float(), torch.tensor([0, 1]))
    losses = make().loss(random_outputs(torch.Generator().manual_seed(0), 1), (target,))
    assert all(torch.isfinite(value) for value in losses.values())


def c_reorg(features: Tensor, stride: int = 2) -> Tensor:
    """reorg_cpu of Darknet's src/blas.c: loops over flat memory, as its [reorg] layer calls it."""
    channels, rows, columns = features.shape
    flat, out = features.flatten().tolist(), [0.0] * features.numel()
    part = channels // stride**2
    for k in range(channels):
        for j in range(rows):
            for i in range(columns):
                offset, c2 = divmod(k, part)
                w2, h2 = i * stride + offset % stride, j * stride + offset // stride
                source = w2 + columns * stride * (h2 + rows * stride * c2)
                out[i + columns * (j + rows * k)] = flat[source]
    return torch.tensor(out).reshape(channels * stride**2, rows // stride, columns // stride)


def test_reorg() -> None:
    features = torch.randn(2, 8, 6, 10)
    ours = darknet_reorg(features)
    assert torch.equal(ours, torch.stack([c_reorg(image) for image in features]))
    plain = space_to_depth(features)
    assert plain.shape == ours.shape == (2, 32, 3, 5)
    for row in range(3):
        for column in range(5):
            block = features[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(plain[:, :, row, column].sort().values, block.flatten(1).sort().values)


@pytest.mark.parametrize("fine", [(13, 25), (12, 24), (14, 26)])
def test_passthrough_of_maps_that_were_rounded(fine: tuple[int, int]) -> None:
    head = heads.build(
        {"name": "yolov2", "width": 8, "passthrough": 4}, "head", channels=(5, 6), strides=(16, 32), num_classes=2
    )
    features = [torch.randn(2, 5, *fine), torch.randn(2, 6, (fine[0] + 1) // 2, fine[1] // 2)]
    outputs = head(features, Inputs((208, 400), ((208, 400),) * 2))
    assert outputs.values.shape == (2, features[1].shape[2] * features[1].shape[3] * 5, 7)


def test_wants_one_map_or_two() -> None:
    for strides in ((8, 16, 32), (8, 32), (16, 0)):
        with pytest.raises(ConfigError, match="reads one feature map, or two of which the second has twice the stride"):
            heads.build({"name": "yolov2"}, "head", channels=(4,) * len(strides), strides=strides, num_classes=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"anchors": []}, r"'head\.anchors' must be positive \[width, height\] pairs"),
        ({"anchors": [[5, 0]]}, r"'head\.anchors' must be positive"),
        ({"anchors": [[5, 5, 5]]}, r"head\.anchors"),
        ({"ignore_above": 1.5}, r"'head\.ignore_above' must be in 0\.\.1"),
        ({"depth": 0}, r"'head\.depth' must be at least 1"),
        ({"reorg": "darknet", "passthrough": 6}, "must be a multiple of 4"),
        ({"box_weight": -1}, r"'head\.box_weight' must be at least 0"),
        ({"ignore_abov": 0.5}, "Did you mean 'ignore_above'"),
    ],
)
def test_wrong_options(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_default_anchors_are_yolov2s() -> None:
    assert COCO_ANCHORS[0] == (0.57273 * 32, 0.677385 * 32)
    assert len(COCO_ANCHORS) == 5


@pytest.mark.slow
def test_overfits_eight_images(tiny: object) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    experiment = tiny(  # type: ignore[operator]
        "--backbone", "{name: darknet_tiny, levels: [3, 4], widths: [8, 16, 32, 64, 64, 8, 8]}",
        "--head",
        "{name: yolov2, width: 64, passthrough: 16, anchors: [[14, 14], [20, 20], [28, 28], [38, 38], [50, 50]]}",
        "--input.size", "[96, 96]",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(experiment, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    fitted = [model.fit(dataset[index]) for index in range(8)]
    images = torch.stack([image for image, *_ in fitted])
    for _ in range(250):
        losses = model.train().head.loss(model(images, ((96, 96),) * 8), tuple(item.target for item in fitted))
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert evaluate(model, dataset, batch_size=8, workers=0).scores.coco["mAP50"] > 0.95
