"""What every registered head promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from detkit.heads.base import Head
from detkit.registry import heads
from detkit.types import Inputs, Target

STRIDES = (8, 16)
SIZES = ((64, 96), (50, 96), (64, 70))
SMALL_TRUNK = {"trunk": {"name": "mlp", "width": 16}}
SMALL_RPN = {"anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}, "train_proposals": 40, "proposals": 30}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ssd": [
        {},
        {"matching": "bipartite", "box_loss": "l1", "negatives_per_positive": None},
        {"box_loss": "ciou", "tower": 2, "tower_width": 8},
        {"anchors": {"name": "per_pixel", "sizes": [[0.2, 0.3]]}},
        {"anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}},
    ],
    "fast_rcnn": [
        {"regions": SMALL_TRUNK},
        {"regions": {**SMALL_TRUNK, "classifier": "hinge", "features": {"name": "spp", "grids": [2, 1]}}},
        {"regions": {"features": {"name": "roi_align"}, "trunk": {"name": "conv_fc", "channels": 8, "width": 16}}},
        {"regions": {"features": {"name": "roi_align"}, "trunk": {"name": "mean"}, "background_from": 0.1}},
    ],
    "faster_rcnn": [
        {"rpn": SMALL_RPN, "regions": SMALL_TRUNK},
        {"rpn": {**SMALL_RPN, "depth": 2, "box_loss": "giou"}, "regions": {**SMALL_TRUNK, "box_loss": "giou"}},
    ],
    "mask_rcnn": [
        {"rpn": SMALL_RPN, "regions": SMALL_TRUNK, "mask": {"depth": 1, "width": 8}},
        {"rpn": SMALL_RPN, "regions": SMALL_TRUNK, "mask": {"depth": 2, "width": 8, "norm": True}},
    ],
    "retinanet": [
        {},
        {"depth": 2, "norm": True, "box_loss": "giou", "gamma": 0.0},
        {"depth": 0, "anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}, "candidates": 20},
    ],
    "localize": [{}, {"box_loss": "smooth_l1"}],
    "sliding_window": [{}, {"windows": [[3, 2]], "width": 16, "positive_fraction": 1.0}],
    "yolov1": [
        {"hidden": 32, "dropout": 0.0},
        {"grid": 4, "boxes": 3, "layers": "convolution", "hidden": 16, "dropout": 0.0},
    ],
    "yolov2": [
        {"width": 16, "passthrough": 4},
        {
            "width": 16,
            "passthrough": 4,
            "reorg": "darknet",
            "depth": 1,
            "rescore": False,
            "anchors": [[9, 9], [40, 20]],
        },
    ],
    "yolov3": [{}, {"anchors": [[9, 9], [40, 20]], "widths": [12, 20], "ignore_above": 0.3}],
    "yolox": [{}, {"width": 12, "depthwise": True, "l1_weight": 1.0, "centre_radius": 1.5}],
}
CASES = [(name, options) for name in heads.names() for options in OPTIONS.get(name, [{}])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{len(str(case[1]))}")
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    name, options = request.param
    return heads.build({"name": name, **options}, "head", channels=channels(name), strides=STRIDES, num_classes=3)


def channels(name: str) -> tuple[int, int]:
    """Heads whose levels are independent, and those that share layers between levels."""
    return (8, 12) if name in ("ssd", "localize", "sliding_window", "yolov1", "yolov2", "yolov3") else (8, 8)


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(2)
    corners = [torch.rand(25, 2, generator=generator) * torch.tensor([60.0, 40]) for _ in SIZES]
    proposals = [torch.cat((corner, corner + 4 + 30 * torch.rand(25, 2, generator=generator)), 1) for corner in corners]
    # reaching over the border of the smaller pictures, outside of all, and none at all
    proposals[1] = torch.cat(
        (proposals[1], torch.tensor([[-30.0, -20, 20, 30], [80, 40, 200, 90], [300, 300, 320, 320]]))
    )
    proposals[2] = torch.zeros(0, 4)
    return Inputs((64, 96), SIZES, tuple(proposals))


def features(head: Head) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    name = next(name for name in heads.names() if heads.get(name) is type(head))
    return [
        torch.randn(3, count, 64 // stride, 96 // stride, generator=generator)
        for count, stride in zip(channels(name), STRIDES)
    ]


def outputs_of(head: Head) -> Any:
    return head(features(head), inputs())


def tensors(outputs: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in tensors(item)] if isinstance(outputs, tuple) else []


def targets() -> tuple[Target, ...]:
    boxes = torch.tensor([[5.0, 5, 30, 40], [40, 10, 90, 60], [1, 1, 20, 20]])
    return (
        with_masks(Target(boxes, torch.tensor([0, 1, 2]))),
        with_masks(Target.empty()),
        with_masks(Target(boxes[:2], torch.tensor([2, 2]), difficult=torch.tensor([False, True]))),
    )


def with_masks(target: Target) -> Target:
    """Each object fills its box."""
    masks = torch.zeros(len(target), 64, 96, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, target.boxes.int().tolist()):
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return replace(target, masks=masks)


def test_losses_are_finite_scalars_and_reach_every_parameter(head: Head) -> None:
    losses = head.loss(outputs_of(head), targets())
    assert losses
    assert all(value.shape == () and torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all()


def test_pictures_without_objects_train(head: Head) -> None:
    losses = head.loss(outputs_of(head), (with_masks(Target.empty()),) * 3)
    total = sum(losses.values())
    assert torch.isfinite(total)  # type: ignore[arg-type]
    total.backward()  # type: ignore[union-attr]
    assert sum(parameter.grad.abs().sum() for parameter in head.parameters() if parameter.grad is not None) > 0


def test_decoding_gives_one_result_for_each_image_inside_it(head: Head) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # some heads expect nearly everything to be background
    found = head.eval().decode(outputs_of(head))
    assert isinstance(found, list)
    assert len(found) == 3
    assert sum(len(detections) for detections in found) > 0
    for detections, (height, width) in zip(found, SIZES):
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
    outputs = outputs_of(head)
    before = [tensor.clone() for tensor in tensors(outputs)]
    first = head.decode(outputs)
    second = head.decode(outputs)
    head.loss(outputs, targets())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(outputs)))
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(first, second))


def test_what_is_ignored_changes_no_loss_of_its_anchors(head: Head) -> None:
    """A crowd over every anchor leaves nothing to learn from it but the objects themselves."""
    outputs = outputs_of(head)
    crowd = Target(torch.tensor([[-300.0, -300, 400, 400]]), torch.tensor([0]), crowd=torch.tensor([True]))
    losses = head.loss(outputs, (with_masks(crowd),) * 3)
    assert all(value == 0 for value in losses.values())


def test_the_number_of_targets_is_checked(head: Head) -> None:
    with pytest.raises(ValueError, match="3 images but 1 targets"):
        head.loss(outputs_of(head), (Target.empty(),))


def test_names_of_heads_have_a_task_and_needs() -> None:
    for name in heads.names():
        part = heads.get(name)
        assert isinstance(part.task, str)  # type: ignore[attr-defined]
        assert part.needs  # type: ignore[attr-defined]
