"""What every registered head promises, whatever its task."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zoo_cases import zoo_cases

from detkit.backbones.base import Backbone
from detkit.config import load_experiment
from detkit.heads.base import Head
from detkit.inference.optimization import FastNetwork, bf16_instructions
from detkit.model import Model
from detkit.registry import heads, tasks
from detkit.structures import IGNORED_PIXEL, Classification, ClassList, Detections, Inputs, SemanticMap, Target

PREDICTIONS: dict[str, type] = {
    "detect": Detections,
    "classify": Classification,
    "segment": SemanticMap,
    **{task: prediction for task, (prediction, _) in zoo_cases("PREDICTIONS").items()},
}
INDEPENDENT = ((8, 12), (8, 16))
"""Channels and strides of the maps for heads whose levels are independent."""
FEATURES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # the others share layers between levels: ((8, 8), (8, 16))
    **dict.fromkeys(("ssd", "fcn", "dilated_fcn"), INDEPENDENT),
    **zoo_cases("HEAD_MAPS"),
}
POINTS = 5
SIZES = ((64, 96), (50, 96), (64, 70))
BATCH = 16
SMALL_TRUNK = {"trunk": {"name": "mlp", "width": 16}}
SMALL_RPN = {"anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}, "train_proposals": 40, "proposals": 30}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "classify": [
        {},
        {"multi_label": True, "pool": 2, "widths": [12, 10], "dropout": 0.5, "label_smoothing": 0.1},
        {"auxiliary": [0], "activation": "tanh"},
    ],
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
    "fcn": [{}, {"hidden": 6}, {"finest_stride": 16, "class_weights": [1.0, 2.0, 0.5]}],
    "dilated_fcn": [{}, {"auxiliary_weight": 0.0, "class_weights": [1.0, 2.0, 0.5]}],
    "yolox": [{}, {"width": 12, "depthwise": True, "l1_weight": 1.0, "centre_radius": 1.5}],
    **zoo_cases("HEAD_OPTIONS"),
}
CASES = [(name, options) for name in heads.names() for options in OPTIONS.get(name, [{}])]
IGNORING = [case for case in CASES if heads.get(case[0]).task in ("detect", "segment", "landmarks")]  # type: ignore[attr-defined]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{len(str(case[1]))}"


def built(case: tuple[str, dict[str, Any]]) -> Head:
    torch.manual_seed(0)
    name, options = case
    channels, strides = maps(name)
    return heads.build({"name": name, **options}, "head", channels=channels, strides=strides, num_classes=3)


@pytest.fixture(params=CASES, ids=case_id)
def head(request: pytest.FixtureRequest) -> Head:
    return built(request.param)


@pytest.fixture(params=[case for case in IGNORING if heads.get(case[0]).task == "detect"], ids=case_id)  # type: ignore[attr-defined]
def detector(request: pytest.FixtureRequest) -> Head:
    return built(request.param)


@pytest.fixture(params=IGNORING, ids=case_id)
def ignoring_head(request: pytest.FixtureRequest) -> Head:
    return built(request.param)


def name_of(head: Head) -> str:
    return next(name for name in heads.names() if heads.get(name) is type(head))


def maps(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the maps that a head is tested on."""
    return FEATURES.get(name, ((8, 8), (8, 16)))


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(2)
    corners = [torch.rand(25, 2, generator=generator) * torch.tensor([60.0, 40]) for _ in SIZES]
    proposals = [torch.cat((corner, corner + 4 + 30 * torch.rand(25, 2, generator=generator)), 1) for corner in corners]
    # reaching over the border of the smaller images, outside of all, and none at all
    proposals[1] = torch.cat(
        (proposals[1], torch.tensor([[-30.0, -20, 20, 30], [80, 40, 200, 90], [300, 300, 320, 320]]))
    )
    proposals[2] = torch.zeros(0, 4)
    return Inputs((64, 96), SIZES, tuple(proposals))


def features(head: Head, images: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(images, count, 64 // stride, 96 // stride, generator=generator)
        for count, stride in zip(*maps(name_of(head)))
    ]


def outputs_of(head: Head) -> Any:
    return head(features(head), inputs())


def tensors(outputs: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in tensors(item)] if isinstance(outputs, tuple) else []


def targets() -> tuple[Target, ...]:
    """One image with objects, one without, one of whose objects one is ignored; all have one class as a whole."""
    boxes = torch.tensor([[5.0, 5, 30, 40], [40, 10, 90, 60], [1, 1, 20, 20]])
    return (
        complete(Target(boxes, torch.tensor([0, 1, 2])), 0),
        complete(Target.empty(), 1),
        complete(Target(boxes[:2], torch.tensor([2, 2]), difficult=torch.tensor([False, True])), 2),
    )


def nothing() -> Target:
    """No object, no class, no pixel that counts."""
    return replace(complete(Target.empty()), semantic=torch.full((64, 96), IGNORED_PIXEL, dtype=torch.uint8))


def complete(target: Target, *image_labels: int) -> Target:
    """With every field that a head may need: each object fills its box and has points in it, one of them not visible;
    pixels are of its class, those of no object of class 0, and those of the last column of none."""
    count = len(target)
    masks = torch.zeros(count, 64, 96, dtype=torch.bool)
    semantic = torch.zeros(64, 96, dtype=torch.uint8)
    for mask, (left, top, right, bottom), label in zip(masks, target.boxes.int().tolist(), target.labels.tolist()):
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
        semantic[mask] = label
    semantic[:, -1] = IGNORED_PIXEL
    places = torch.linspace(0.2, 0.8, POINTS)[:, None]
    points = target.boxes[:, None, :2] + places * (target.boxes[:, 2:] - target.boxes[:, :2])[:, None]
    visible = torch.ones(count, POINTS, dtype=torch.bool)
    visible[:, 1] = False
    labels = torch.tensor(image_labels, dtype=torch.int64)
    return replace(target, masks=masks, points=points, visible=visible, image_labels=labels, semantic=semantic)


def test_losses_are_finite_scalars_and_reach_every_parameter(head: Head) -> None:
    losses = head.loss(outputs_of(head), targets())
    assert losses
    assert all(value.shape == () and torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all()


def test_images_without_target_train(head: Head) -> None:
    losses = head.loss(outputs_of(head), (nothing(),) * 3)
    total = sum(losses.values())
    assert torch.isfinite(total)  # type: ignore[arg-type]
    total.backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if head.task == "detect":  # that there is no object is something to learn
        assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_images_with_more_objects_than_places_train(head: Head) -> None:
    """A thousand, some of them twice, where the maps have 120 cells."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(500, 2, generator=generator) * torch.tensor([60.0, 40])
    boxes = torch.cat((corners, corners + 1 + 20 * torch.rand(500, 2, generator=generator)), 1).repeat(2, 1)
    full = Target(boxes, torch.arange(1000) % 3)
    losses = head.loss(outputs_of(head), tuple(complete(full, label) for label in (0, 0, 1)))
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def two_objects(image: int) -> Target:
    boxes = torch.tensor([[5.0, 5, 30, 40], [40, 10, 90, 50]]) + torch.tensor([[image, 0, image, 0], [0, image, 0, 0]])
    return complete(Target(boxes, torch.tensor([image % 3, (image + 1) % 3])), image % 3)


def gradient_norm(head: Head, batch: list[Target]) -> float:
    """Of all parameters, from the first len(batch) of always the same images."""
    torch.manual_seed(3)  # of what a loss samples
    head.zero_grad()
    count = len(batch)
    proposals = inputs().proposals
    assert proposals is not None
    whole = Inputs((64, 96), ((64, 96),) * count, (proposals[0],) * count)
    maps_of_batch = [feature[:count] for feature in features(head, BATCH)]
    sum(head.loss(head(maps_of_batch, whole), tuple(batch)).values()).backward()  # type: ignore[union-attr]
    norms = [parameter.grad.norm() for parameter in head.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm())


@pytest.mark.parametrize("excited", [False, True], ids=["untrained", "excited"])
def test_images_without_objects_do_not_outweigh_the_others(head: Head, excited: bool) -> None:
    """The gradient of batches with few objects is no more than some times that of one with objects in every image."""
    if excited:
        excite(head)
    full = [two_objects(image) for image in range(BATCH)]
    crowd = complete(Target(torch.tensor([[5.0, 5, 30, 40]]), torch.tensor([0]), crowd=torch.tensor([True])))
    hard = complete(Target(torch.tensor([[5.0, 5, 30, 40]]), torch.tensor([0]), difficult=torch.tensor([True])))
    whole, alone = gradient_norm(head, full), gradient_norm(head, full[:1])
    half = BATCH // 2
    for name, batch in {
        "half": full[:half] + [nothing()] * half,
        "empty": [nothing()] * BATCH,
        "crowd": [crowd] * BATCH,
        "difficult": [hard] * BATCH,
        "half crowd": full[:half] + [crowd] * half,
    }.items():
        norm = gradient_norm(head, batch)
        assert norm <= 3 * whole, f"{name}: {norm:.3g}, with objects in every image {whole:.3g}"
    one = gradient_norm(head, full[:1] + [nothing()] * (BATCH - 1))
    assert one <= 2 * max(whole, alone), f"objects in one image: {one:.3g}, that image alone {alone:.3g}"
    assert gradient_norm(head, [nothing()]) <= 3 * max(whole, alone)


def test_an_image_with_very_many_objects_is_not_drowned(detector: Head) -> None:
    """Nor does it drown the others: 500 objects in the first of the images, the others with none or with two."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(500, 2, generator=generator) * torch.tensor([60.0, 40])
    sides = 2 + 20 * torch.rand(500, 2, generator=generator)
    many = complete(Target(torch.cat((corners, corners + sides), 1), torch.arange(500) % 3), 0)
    full = [two_objects(image) for image in range(BATCH)]
    alone, whole = gradient_norm(detector, [many]), gradient_norm(detector, full)
    assert gradient_norm(detector, [many] + [nothing()] * (BATCH - 1)) <= 2 * max(alone, whole)
    assert gradient_norm(detector, [many, *full[1:]]) <= 2 * max(alone, whole)


def excite(head: Head) -> None:
    """Weights with which a head finds something in any image."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and name_of(head) not in zoo_cases("LEFT_AS_BUILT"):
            nn.init.normal_(module.weight, std=0.3)
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # some heads expect nearly everything to be background


def test_decoding_gives_one_result_for_each_image(head: Head) -> None:
    excite(head)
    found = head.eval().decode(outputs_of(head))
    assert isinstance(found, list)
    assert len(found) == 3
    for prediction, size in zip(found, SIZES):
        assert type(prediction) is PREDICTIONS[head.task]
        check_prediction(prediction, size, head)
    if head.task == "detect":
        assert sum(len(detections) for detections in found) > 0


class Maps(Backbone):
    """Maps of the channels and strides that a head is tested on, in half precision where the network runs in it."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides
        parts = zip(channels, strides)
        self.layers = nn.ModuleList(nn.Conv2d(3, count, stride, stride) for count, stride in parts)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images] if self.strides == (1,) else [layer(images) for layer in self.layers]

    def stages(self) -> list[nn.Module]:
        return []


@pytest.mark.skipif(not bf16_instructions(torch.device("cpu")), reason="this processor has no instructions for bf16")
def test_predictions_in_half_precision_are_finite_float32(head: Head) -> None:
    experiment = load_experiment(
        [], ["--data.name", "shapes", "--backbone.name", "pixels", "--head.name", "ssd", "--input.size", "[64, 96]"]
    )
    excite(head)
    model = Model(Maps(*maps(name_of(head))), None, head, experiment, ClassList.from_names(["a", "b", "c"])).eval()
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    found = {}
    for precision in ("fp32", "bf16"):
        network = FastNetwork(model, precision)  # type: ignore[arg-type]
        with network.arithmetic():
            found[precision] = head.decode(network(images, SIZES, inputs().proposals))
    for half, whole, size in zip(found["bf16"], found["fp32"], SIZES, strict=True):
        assert type(half) is type(whole)
        check_prediction(half, size, head)
        for field in dataclasses.fields(half):
            one, other = getattr(half, field.name), getattr(whole, field.name)
            assert type(one) is type(other)
            if not isinstance(one, torch.Tensor):
                continue
            assert one.dtype == other.dtype != torch.bfloat16
            assert torch.isfinite(one).all()
            # how many objects are found may change where a score is near the threshold
            first = 1 if isinstance(half, Detections) else 0
            assert one.shape[first:] == other.shape[first:]
    if head.task == "detect":
        assert sum(map(len, found["bf16"])) > 0


def check_prediction(prediction: Any, size: tuple[int, int], head: Head) -> None:
    """That it is possible for an image of (height, width) `size` in an input of 64x96 and three classes."""
    match prediction:
        case Detections():
            check_detections(prediction, size, head)
        case Classification():
            assert prediction.scores.shape == (3,)
            assert ((prediction.scores >= 0) & (prediction.scores <= 1)).all()
        case SemanticMap():
            assert tuple(prediction.labels.shape) in (size, (64, 96))
            assert (prediction.labels < 3).all()
        case _:
            zoo_cases("PREDICTIONS")[head.task][1](prediction)


def check_detections(detections: Detections, size: tuple[int, int], head: Head) -> None:
    height, width = size
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
    truths = targets()
    first = head.decode(outputs)
    second = head.decode(outputs)
    head.loss(outputs, truths)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(outputs)))
    for one, other in [*zip(first, second), *zip(truths, targets())]:
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, field.name)), field.name


def test_what_is_ignored_changes_no_loss(ignoring_head: Head) -> None:
    """A crowd over every anchor, points that are not visible and pixels of no class leave nothing to learn."""
    outputs = outputs_of(ignoring_head)
    whole = torch.tensor([[-300.0, -300, 400, 400]])
    crowd = complete(Target(whole, torch.tensor([0]), crowd=torch.tensor([True])))
    hidden = torch.zeros(1, POINTS, dtype=torch.bool)
    target = replace(crowd, visible=hidden, semantic=nothing().semantic)
    losses = ignoring_head.loss(outputs, (target,) * 3)
    assert all(value == 0 for value in losses.values())


def test_the_number_of_targets_is_checked(head: Head) -> None:
    with pytest.raises(ValueError, match="3 images but 1 targets"):
        head.loss(outputs_of(head), (nothing(),))


def test_every_head_has_a_registered_task_and_needs_what_a_target_may_have() -> None:
    fields = {field.name for field in dataclasses.fields(Target)} | {"proposals"}
    for name in heads.names():
        part = heads.get(name)
        assert part.task in tasks.names()  # type: ignore[attr-defined]
        assert part.task in PREDICTIONS  # type: ignore[attr-defined]
        assert part.needs <= fields  # type: ignore[attr-defined]
