"""What every registered head promises."""

from typing import Any

import pytest
import torch
from torch import nn

from detkit.heads.base import Head
from detkit.registry import heads
from detkit.types import Inputs, Target

CHANNELS, STRIDES = (8, 12), (8, 16)
INPUTS = Inputs((64, 96), ((64, 96), (50, 96), (64, 70)))
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ssd": [
        {},
        {"matching": "bipartite", "box_loss": "l1", "negatives_per_positive": None},
        {"box_loss": "ciou", "tower": 2, "tower_width": 8},
        {"anchors": {"name": "per_pixel", "sizes": [[0.2, 0.3]]}},
        {"anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}},
    ]
}
CASES = [(name, options) for name in heads.names() for options in OPTIONS.get(name, [{}])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{len(str(case[1]))}")
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    name, options = request.param
    return heads.build({"name": name, **options}, "head", channels=CHANNELS, strides=STRIDES, num_classes=3)


def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, channels, 64 // stride, 96 // stride, generator=generator)
        for channels, stride in zip(CHANNELS, STRIDES)
    ]


def targets() -> tuple[Target, ...]:
    boxes = torch.tensor([[5.0, 5, 30, 40], [40, 10, 90, 60], [1, 1, 20, 20]])
    return (
        Target(boxes, torch.tensor([0, 1, 2])),
        Target.empty(),
        Target(boxes[:2], torch.tensor([2, 2]), difficult=torch.tensor([False, True])),
    )


def test_losses_are_finite_scalars_and_reach_every_parameter(head: Head) -> None:
    losses = head.loss(head(features(), INPUTS), targets())
    assert losses
    assert all(value.shape == () and torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all()


def test_pictures_without_objects_train(head: Head) -> None:
    losses = head.loss(head(features(), INPUTS), (Target.empty(),) * 3)
    total = sum(losses.values())
    assert torch.isfinite(total)  # type: ignore[arg-type]
    total.backward()  # type: ignore[union-attr]
    assert sum(parameter.grad.abs().sum() for parameter in head.parameters() if parameter.grad is not None) > 0


def test_decoding_gives_one_result_for_each_image_inside_it(head: Head) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    found = head.eval().decode(head(features(), INPUTS))
    assert isinstance(found, list)
    assert len(found) == 3
    assert sum(len(detections) for detections in found) > 0
    for detections, (height, width) in zip(found, INPUTS.sizes):
        assert len(detections) <= head.postprocess.max_detections
        assert torch.equal(detections.scores, detections.scores.sort(descending=True).values)
        assert (detections.labels < 3).all()
        assert (detections.scores > head.postprocess.score_threshold).all()
        boxes = detections.boxes
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width).all()
        assert (boxes[:, 1::2] <= height).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()


def test_decode_and_loss_leave_their_arguments_alone(head: Head) -> None:
    outputs = head(features(), INPUTS)
    before = [tensor.clone() for tensor in outputs if isinstance(tensor, torch.Tensor)]
    first = head.decode(outputs)
    second = head.decode(outputs)
    head.loss(outputs, targets())
    after = [tensor for tensor in outputs if isinstance(tensor, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(first, second))


def test_what_is_ignored_changes_no_loss_of_its_anchors(head: Head) -> None:
    """A crowd over every anchor leaves nothing to learn from it but the objects themselves."""
    outputs = head(features(), INPUTS)
    crowd = Target(torch.tensor([[-300.0, -300, 400, 400]]), torch.tensor([0]), crowd=torch.tensor([True]))
    losses = head.loss(outputs, (crowd,) * 3)
    assert all(value == 0 for value in losses.values())


def test_the_number_of_targets_is_checked(head: Head) -> None:
    with pytest.raises(ValueError, match="3 images but 1 targets"):
        head.loss(head(features(), INPUTS), (Target.empty(),))


def test_names_of_heads_have_a_task_and_needs() -> None:
    for name in heads.names():
        part = heads.get(name)
        assert isinstance(part.task, str)  # type: ignore[attr-defined]
        assert part.needs  # type: ignore[attr-defined]
