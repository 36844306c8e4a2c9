"""The YOLOv3 head and its neck against plain loops, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.errors import ConfigError
from detkit.model import build_model
from detkit.registry import heads, necks
from detkit.structures import Target
from detkit.zoo.darknet.yolo_grid import GridOutputs, lay_grid
from detkit.zoo.darknet.yolov3 import YOLOv3
from detkit.zoo.darknet.yolov3_neck import YOLOv3Neck

HEIGHT, WIDTH, CLASSES = 64, 96, 3
MAPS = ((8, 12), (4, 6), (2, 3))
ANCHORS = [[6.0, 7.0], [12.0, 8.0], [14.0, 20.0], [30.0, 16.0], [25.0, 45.0], [60.0, 40.0]]
PER_CELL = 2


def make(**options: object) -> YOLOv3:
    given = {"name": "yolov3", "anchors": ANCHORS, **options}
    return heads.build(given, "head", channels=(4, 4, 4), strides=(8, 16, 32), num_classes=CLASSES)


def random_outputs(generator: torch.Generator, images: int = 2) -> GridOutputs:
    levels = torch.tensor(ANCHORS).reshape(3, PER_CELL, 2)
    cells, anchors = lay_grid(MAPS, (HEIGHT, WIDTH), list(levels))
    values = torch.randn(images, len(cells), 5 + CLASSES, generator=generator)
    values[..., 2:4] *= 0.4
    return GridOutputs(values, cells, anchors, MAPS, (HEIGHT, WIDTH), ((HEIGHT, WIDTH),) * images)


def random_target(generator: torch.Generator, count: int) -> Target:
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH - 5.0, HEIGHT - 5])
    far = corners + 3 + torch.rand(count, 2, generator=generator) ** 2 * 60
    boxes = torch.cat((corners, torch.minimum(far, torch.tensor([float(WIDTH), HEIGHT]))), 1)
    return Target(
        boxes,
        torch.randint(CLASSES, (count,), generator=generator),
        crowd=torch.rand(count, generator=generator) < 0.2,
    )


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def cross_entropy(raw: float, target: float) -> float:
    return -target * math.log(sigmoid(raw)) - (1 - target) * math.log(1 - sigmoid(raw))


def overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU, and the part of a that lies in b."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    own = (a[2] - a[0]) * (a[3] - a[1])
    return width * height / (own + (b[2] - b[0]) * (b[3] - b[1]) - width * height), width * height / max(own, 1e-9)


def best_anchor(box: list[float]) -> int:
    sides = (box[2] - box[0], box[3] - box[1])
    found = []
    for anchor in ANCHORS:
        both = min(sides[0], anchor[0]) * min(sides[1], anchor[1])
        found.append(both / (sides[0] * sides[1] + anchor[0] * anchor[1] - both))
    return found.index(max(found))


def plain_losses(outputs: GridOutputs, targets: tuple[Target, ...]) -> dict[str, float]:
    """Darknet's yolo layers as loops over levels, rows, columns, anchors and ground truths."""
    sums = {"box": 0.0, "objectness": 0.0, "class": 0.0}
    for image, target in enumerate(targets):
        truths, ignored = target.boxes.tolist(), target.ignored.tolist()
        start = 0
        for level, (rows, columns) in enumerate(MAPS):
            for row in range(rows):
                for column in range(columns):
                    for a in range(PER_CELL):
                        place = start + (row * columns + column) * PER_CELL + a
                        raw = outputs.values[image, place].tolist()
                        anchor = ANCHORS[level * PER_CELL + a]
                        x = (sigmoid(raw[0]) + column) / columns * WIDTH
                        y = (sigmoid(raw[1]) + row) / rows * HEIGHT
                        sides = [anchor[k] * math.exp(raw[2 + k]) for k in (0, 1)]
                        box = [x - sides[0] / 2, y - sides[1] / 2, x + sides[0] / 2, y + sides[1] / 2]
                        mine = [
                            t
                            for t, truth in enumerate(truths)
                            if best_anchor(truth) == level * PER_CELL + a
                            and int((truth[0] + truth[2]) / 2 / WIDTH * columns) == column
                            and int((truth[1] + truth[3]) / 2 / HEIGHT * rows) == row
                        ]
                        counted = [t for t in mine if not ignored[t]]
                        if counted:
                            truth = truths[counted[-1]]
                            width, height = truth[2] - truth[0], truth[3] - truth[1]
                            scale = 2 - width * height / (WIDTH * HEIGHT)
                            centre = ((truth[0] + truth[2]) / 2 / WIDTH * columns - column,
                                      (truth[1] + truth[3]) / 2 / HEIGHT * rows - row)  # fmt: skip
                            logs = (math.log(width / anchor[0]), math.log(height / anchor[1]))
                            sums["box"] += scale * sum(cross_entropy(raw[k], centre[k]) for k in (0, 1))
                            sums["box"] += scale * sum(0.5 * (raw[2 + k] - logs[k]) ** 2 for k in (0, 1))
                            sums["objectness"] += cross_entropy(raw[4], 1)
                            labels = {int(target.labels[t]) for t in counted}
                            sums["class"] += sum(cross_entropy(raw[5 + c], c in labels) for c in range(CLASSES))
                        elif not mine:
                            cut = [min(max(v, 0), limit) for v, limit in zip(box, (WIDTH, HEIGHT) * 2)]
                            near = any(overlap(box, truth)[0] > 0.5 for truth in truths)
                            inside = any(overlap(cut, t)[1] >= 0.5 for t, crowd in zip(truths, ignored) if crowd)
                            if not near and not inside:
                                sums["objectness"] += cross_entropy(raw[4], 0)
            start += rows * columns * PER_CELL
    return {name: value / len(targets) for name, value in sums.items()}


def test_losses_equal_plain_loops() -> None:
    head = make()
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        outputs = random_outputs(generator)
        targets = tuple(random_target(generator, count) for count in (seed % 9, 0 if seed % 5 == 0 else 12))
        mine = head.loss(outputs, targets)
        for name, value in plain_losses(outputs, targets).items():
            assert float(mine[name]) == pytest.approx(value, rel=1e-4, abs=1e-4), (seed, name)


def test_nan_beside_a_crowd_alone_is_seen() -> None:
    """A box that is NaN overlaps nothing that would make its place ignored: training must stop at it."""
    outputs = random_outputs(torch.Generator().manual_seed(0), images=1)
    broken = outputs._replace(values=torch.full_like(outputs.values, math.nan))
    crowd = Target(torch.tensor([[10.0, 10, 60, 50]]), torch.tensor([0]), crowd=torch.tensor([True]))
    assert make().loss(broken, (crowd,))["objectness"].isnan()


def test_two_targets_at_one_place_are_two_classes_of_one_box() -> None:
    """The later ground truth gives the box; the classes of both count, as each class is a question of its own."""
    outputs = random_outputs(torch.Generator().manual_seed(0), images=1)
    target = Target(torch.tensor([[10.0, 10, 22, 18], [11.0, 10, 23, 18]]), torch.tensor([0, 2]))
    losses = make().loss(outputs, (target,))
    row, column = 1, 2  # of both, on the finest level, whose second anchor has their shape
    values = outputs.values[0, (row * 12 + column) * PER_CELL + 1]
    expected = F.binary_cross_entropy_with_logits(values[5:], torch.tensor([1.0, 0, 1]), reduction="sum")
    torch.testing.assert_close(losses["class"], expected)
    assert losses == pytest.approx(plain_losses(outputs, (target,)), rel=1e-4)


def test_each_target_has_one_place_over_all_levels() -> None:
    """An object in the shape of an anchor trains the level of that anchor alone."""
    head = make()
    for index, (width, height) in enumerate(ANCHORS):
        outputs = random_outputs(torch.Generator().manual_seed(index), images=1)
        values = outputs.values.requires_grad_()
        box = torch.tensor([[48 - width / 2, 32 - height / 2, 48 + width / 2, 32 + height / 2]])
        head.loss(outputs, (Target(box, torch.tensor([0])),))["box"].backward()
        trained = values.grad[0].abs().sum(1).nonzero().flatten().tolist()  # type: ignore[index]
        assert len(trained) == 1
        bounds = [0, 8 * 12 * PER_CELL, 8 * 12 * PER_CELL + 4 * 6 * PER_CELL, len(outputs.cells)]
        level = index // PER_CELL
        assert bounds[level] <= trained[0] < bounds[level + 1]


def test_scores_of_classes_are_independent() -> None:
    outputs = random_outputs(torch.Generator().manual_seed(2), images=1)
    outputs.values[..., 4] = -20
    outputs.values[0, 7, 4:] = torch.tensor([1.0, 2.0, 1.9, -20.0])
    found = make().decode(outputs)[0]
    expected = torch.tensor(1.0).sigmoid() * torch.tensor([2.0, 1.9]).sigmoid()
    torch.testing.assert_close(found.scores, expected)
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"anchors": [[5, 5]] * 4}, r"the same number for each of the 3 feature maps, but there are 4.*--anchors"),
        ({"widths": [8, 8]}, r"'head\.widths' must be 3 positive numbers"),
        ({"ignore_above": -1}, r"'head\.ignore_above' must be in 0\.\.1"),
        ({"anchor": [[5, 5]] * 3}, "Did you mean 'anchors'"),
    ],
)
def test_wrong_options(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_no_default_anchors_for_one_map() -> None:
    with pytest.raises(ConfigError, match=r"no default anchors for 1 feature maps.*--anchors 3"):
        heads.build({"name": "yolov3"}, "head", channels=(4,), strides=(8,), num_classes=2)


def test_neck_of_yolov3() -> None:
    neck = YOLOv3Neck((256, 512, 1024), (8, 16, 32))
    assert neck.channels == (128, 256, 512)
    # 1x1 and 3x3 in turn, behind 384 = 128 + 256 and 768 = 256 + 512 channels
    weights = [[tuple(layer[0].weight.shape[:3]) for layer in block] for block in neck.blocks]
    assert weights[0] == [(128, 384, 1), (256, 128, 3), (128, 256, 1), (256, 128, 3), (128, 256, 1)]
    assert weights[1][0] == (256, 768, 1)
    assert weights[2][0] == (512, 1024, 1)
    assert [tuple(lateral[0].weight.shape) for lateral in neck.laterals] == [(128, 256, 1, 1), (256, 512, 1, 1)]


def test_neck_of_yolov3_tiny() -> None:
    neck = necks.build(
        {"name": "yolov3_neck", "widths": [128, 256], "depths": [0, 1]},
        "neck", channels=(256, 1024), strides=(16, 32),
    )  # fmt: skip
    assert neck.channels == (384, 256)
    features = [torch.randn(1, 256, 5, 7), torch.randn(1, 1024, 3, 4)]
    fine, coarse = neck.eval()(features)
    assert torch.equal(coarse, neck.blocks[1](features[1]))
    # the coarse map first, then the finer one as it is
    assert torch.equal(fine[:, 128:], features[0])
    enlarged = F.interpolate(neck.laterals[0](coarse), (5, 7), mode="nearest")
    assert torch.equal(fine[:, :128], enlarged)


@pytest.mark.parametrize(
    ("options", "strides", "match"),
    [
        ({}, (8, 0), "needs maps of ascending strides"),
        ({"widths": [8]}, (8, 16), r"'neck\.widths' must be 2 positive numbers"),
        ({"depths": [2]}, (8, 16), r"'neck\.depths' must be one number"),
        ({"depths": [1, 1, 1]}, (8, 16), r"'neck\.depths' must be one number, or 2"),
    ],
)
def test_wrong_options_of_the_neck(options: dict, strides: tuple, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        necks.build({"name": "yolov3_neck", **options}, "neck", channels=(8, 8), strides=strides)


@pytest.mark.slow
def test_overfits_eight_images(tiny: object) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    experiment = tiny(  # type: ignore[operator]
        "--backbone", "{name: darknet_tiny, levels: [3, 4], widths: [8, 16, 32, 64, 64, 8, 8]}",
        "--neck", "{name: yolov3_neck, widths: [32, 32], depths: [1]}",
        "--head", "{name: yolov3, anchors: [[12, 12], [18, 18], [25, 25], [32, 32], [42, 42], [55, 55]]}",
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
