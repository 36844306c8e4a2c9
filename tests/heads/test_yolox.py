"""The YOLOX head's own arithmetic, and that it learns."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detkit.boxes.sim_ota import match_sim_ota
from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.errors import ConfigError
from detkit.heads.yolox import YOLOX, YOLOXOutputs, _encode
from detkit.model import Model, build_model
from detkit.registry import heads
from detkit.structures import Inputs, Target

SIZE = (64, 96)
SIZES = (SIZE, (50, 90))


def raw_outputs(seed: int = 0, classes: int = 3) -> YOLOXOutputs:
    """Random outputs for two images, on maps of strides 8 and 16."""
    random = torch.Generator().manual_seed(seed)
    head = YOLOX((4, 4), (8, 16), classes)
    blank = head.eval()([torch.zeros(2, 4, 8, 12), torch.zeros(2, 4, 4, 6)], Inputs(SIZE, SIZES))

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random)

    return blank._replace(
        class_logits=normal(blank.class_logits),
        objectness=normal(blank.objectness),
        offsets=normal(blank.offsets) * 0.7 + torch.tensor([0.5, 0.5, 1.3, 1.3]),
    )


def truths() -> tuple[Target, Target]:
    boxes = torch.tensor([[5.0, 5, 30, 40], [40, 10, 90, 60], [60, 30, 70, 41]])
    difficult = torch.tensor([False, True, False])
    return Target(boxes, torch.tensor([0, 2, 1]), difficult=difficult), Target(boxes[1:2], torch.tensor([1]))


def loop_boxes(outputs: YOLOXOutputs, image: int) -> list[list[float]]:
    cells = [(x, y, 8.0) for y in range(0, 64, 8) for x in range(0, 96, 8)]
    cells += [(x, y, 16.0) for y in range(0, 64, 16) for x in range(0, 96, 16)]
    boxes = []
    for (x, y, stride), (dx, dy, width, height) in zip(cells, outputs.offsets[image].tolist(), strict=True):
        centre_x, centre_y = x + dx * stride, y + dy * stride
        half_width, half_height = math.exp(width) * stride / 2, math.exp(height) * stride / 2
        boxes.append([centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height])
    return boxes


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if min(width, height) <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def cross_entropy(logit: float, target: float) -> float:
    score = 1 / (1 + math.exp(-logit))
    return -target * math.log(score) - (1 - target) * math.log(1 - score)


@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_plain_loops(seed: int) -> None:
    """IoU loss 1 - IoU^2 times 5, objectness of all that is not ignored, classes to be as probable as the IoU."""
    outputs, targets = raw_outputs(seed), truths()
    expected = {"box": 0.0, "objectness": 0.0, "class": 0.0, "l1": 0.0}
    positives = ignored = 0
    for image, target in enumerate(targets):
        boxes = loop_boxes(outputs, image)
        assert np.allclose(outputs.boxes()[image].numpy(), boxes, rtol=1e-5, atol=1e-3)
        predicted = (torch.tensor(boxes), outputs.class_logits[image], outputs.objectness[image])
        points = outputs.corners + outputs.strides[:, None] / 2
        match = match_sim_ota(points, outputs.strides, *predicted, target.boxes, target.labels, target.ignored)
        for cell, box in enumerate(boxes):
            positive = bool(match.positive[cell])
            if match.ignored[cell]:
                ignored += 1
                continue
            expected["objectness"] += cross_entropy(float(outputs.objectness[image, cell]), float(positive))
            if not positive:
                continue
            positives += 1
            truth = target.boxes[match.target_index[cell]].tolist()
            iou = overlap(box, truth)
            expected["box"] += 5 * (1 - iou**2)
            for label, logit in enumerate(outputs.class_logits[image, cell].tolist()):
                right = label == int(target.labels[match.target_index[cell]])
                expected["class"] += cross_entropy(logit, iou * right)
            stride, (x, y) = float(outputs.strides[cell]), outputs.corners[cell].tolist()
            wanted = [((truth[0] + truth[2]) / 2 - x) / stride, ((truth[1] + truth[3]) / 2 - y) / stride]
            wanted += [math.log((truth[2] - truth[0]) / stride), math.log((truth[3] - truth[1]) / stride)]
            expected["l1"] += sum(abs(a - b) for a, b in zip(outputs.offsets[image, cell].tolist(), wanted))
    assert positives >= 3
    assert ignored > 5
    losses = YOLOX((4, 4), (8, 16), 3, l1_weight=0.5).loss(outputs, targets)
    expected["l1"] *= 0.5
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value / positives, rel=1e-4)
    assert "l1" not in YOLOX((4, 4), (8, 16), 3).loss(outputs, targets)


def test_offsets_of_the_target_give_the_target() -> None:
    outputs = raw_outputs()
    boxes = torch.tensor([[5.0, 5, 30, 40]]).expand(outputs.offsets.shape[1], 4)
    positive = torch.zeros(outputs.objectness.shape, dtype=torch.bool)
    positive[1] = True
    offsets = torch.stack((outputs.offsets[0], _encode(boxes, outputs, positive)))
    torch.testing.assert_close(outputs._replace(offsets=offsets).boxes()[1], boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_decoding_equals_the_authors_rule(seed: int) -> None:
    """The best class of each cell, its score times the objectness, a threshold, suppression class by class."""
    outputs = raw_outputs(seed)
    head = YOLOX((4, 4), (8, 16), 3, score_threshold=0.3, nms_threshold=0.45)
    for image, detections in enumerate(head.decode(outputs)):
        candidates = []
        for cell, box in enumerate(loop_boxes(outputs, image)):
            scores = outputs.class_logits[image, cell].sigmoid() * outputs.objectness[image, cell].sigmoid()
            height, width = SIZES[image]
            inside = [min(max(side, 0.0), limit) for side, limit in zip(box, (width, height, width, height))]
            if float(scores.max()) > 0.3:
                candidates.append((float(scores.max()), int(scores.argmax()), inside))
        kept: list[tuple[float, int, list[float]]] = []
        for score, label, box in sorted(candidates, reverse=True):
            if all(label != other or overlap(box, better) <= 0.45 for _, other, better in kept):
                kept.append((score, label, box))
        assert len(candidates) > len(kept) > 5
        assert detections.labels.tolist() == [label for _, label, _ in kept]
        assert np.allclose(detections.scores.numpy(), [score for score, _, _ in kept], atol=1e-6)
        assert np.allclose(detections.boxes.numpy(), [box for *_, box in kept], atol=1e-3)


def test_an_untrained_head_finds_everything_improbable() -> None:
    torch.manual_seed(0)
    head = YOLOX((16, 16), (8, 16), 3)
    outputs = head([torch.randn(2, 16, 8, 12), torch.randn(2, 16, 4, 6)], Inputs(SIZE, SIZES))
    assert 0.003 < float(outputs.objectness.detach().sigmoid().mean()) < 0.03
    assert 0.003 < float(outputs.class_logits.detach().sigmoid().mean()) < 0.03


def test_enormous_predictions_keep_losses_and_gradients_finite() -> None:
    outputs = raw_outputs()
    offsets = (outputs.offsets * 1000).requires_grad_()
    logits = (outputs.class_logits * 1000).requires_grad_()
    losses = YOLOX((4, 4), (8, 16), 3).loss(outputs._replace(offsets=offsets, class_logits=logits), truths())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(value) for value in losses.values())
    assert torch.isfinite(offsets.grad).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"candidates": 0}, r"'head\.candidates' must be at least 1"),
        ({"width": 0}, r"'head\.width' must be at least 1"),
        ({"centre_radius": -1.0}, r"'head\.centre_radius' must be at least 0"),
        ({"l1_weight": -1.0}, r"'head\.l1_weight'"),
        ({"score_threshold": 2.0}, "score threshold"),
        ({"centre_radios": 2.0}, "Did you mean 'centre_radius'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        heads.build({"name": "yolox", **options}, "head", channels=(8, 8), strides=(8, 16), num_classes=3)


def test_a_map_of_the_whole_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="no cells on a map pooled from the whole image"):
        YOLOX((8, 8), (8, 0), 3)


def small(tiny: Any, side: int, depth: float, width: float, depthwise: bool = False) -> Model:
    size = f"depth: {depth}, depthwise: {str(depthwise).lower()}"
    experiment = tiny(
        *("--backbone", f"{{name: csp_darknet, width: {width}, {size}}}"),
        *("--neck", f"{{name: pafpn, {size}}}"),
        *("--head", f"{{name: yolox, depthwise: {str(depthwise).lower()}}}"),
        *("--input.size", f"[{side}, {side}]"),
    )
    torch.manual_seed(0)
    return build_model(experiment, Shapes("train", train_count=1).classes)


@pytest.mark.parametrize("depthwise", [False, True])
def test_trains_from_empty_and_full_images(tiny: Any, depthwise: bool) -> None:
    """Batches without objects fall by themselves, and do not keep those with objects from falling."""
    corners = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 50
    full = Target(torch.cat((corners, corners + 12), 1), torch.arange(60) % 4)
    empty = (Target.empty(),) * 3
    sizes = ((64, 64),) * 3

    def trained(batches: list[tuple[Target, ...]]) -> list[float]:
        model = small(tiny, 64, 0.1, 0.125, depthwise).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        images, totals = torch.rand(3, 3, 64, 64), []
        for targets in batches:
            total = torch.stack(list(model.head.loss(model(images, sizes), targets).values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        assert all(math.isfinite(total) for total in totals)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        return totals

    alternating = trained([(full, Target.empty(), full), empty] * 8)
    assert alternating[-2] < alternating[0]
    alone = trained([empty] * 6)
    assert alone[-1] < alone[0]


@pytest.mark.slow
def test_overfits_eight_images(tiny: Any) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    model = small(tiny, 96, 0.33, 0.25)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    fitted = [model.fit(dataset[index]) for index in range(8)]
    images = torch.stack([image.image for image in fitted])
    targets = tuple(image.target for image in fitted)
    for _ in range(200):
        losses = model.train().head.loss(model(images, ((96, 96),) * 8), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert evaluate(model, dataset, batch_size=8, workers=0).scores.coco["mAP50"] > 0.95
