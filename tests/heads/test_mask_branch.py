"""The mask branch against torchvision's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign

from detkit.errors import ConfigError
from detkit.heads.mask_rcnn import MaskBranch
from detkit.heads.parts.regions import SampledRegions
from detkit.registry import build_part, heads
from detkit.structures import Inputs, Target

SIZE = (64, 96)
STRIDES = (8, 16)
TARGETS = torch.tensor([[5.0, 5, 45, 50], [40, 10, 90, 60], [60, 2, 80, 20]])


def build(strides: tuple[int, ...] = STRIDES, num_classes: int = 3, **options: Any) -> MaskBranch:
    torch.manual_seed(0)
    options = {"features": {"name": "roi_align", "size": 7}, "depth": 2, "width": 8, **options}
    injected = {"channels": (8,) * len(strides), "strides": strides, "num_classes": num_classes}
    return build_part(MaskBranch, options, "head.mask", "mask branch", **injected)


def random_maps(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator) for stride in STRIDES]


def random_regions(seed: int, count: int = 9) -> SampledRegions:
    """Near the ground truths, some of them background; a few reach over the border."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (count,), generator=generator)
    boxes = TARGETS[target] + 8 * torch.randn(count, 4, generator=generator)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    return SampledRegions(boxes, target, torch.arange(count) < count - 3)


def ellipses(seed: int) -> Target:
    """Objects that fill a part of their boxes, with ragged edges."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
    masks = []
    for left, top, right, bottom in TARGETS.tolist():
        inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2
        masks.append(inside + 0.2 * torch.rand(SIZE, generator=generator) < 1)
    return Target(TARGETS, torch.tensor([0, 2, 1]), masks=torch.stack(masks))


def nothing() -> SampledRegions:
    return SampledRegions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))


def without_objects() -> Target:
    empty = Target.empty()
    return Target(empty.boxes, empty.labels, masks=torch.zeros(0, *SIZE, dtype=torch.bool))


def test_true_masks_equal_torchvision() -> None:
    branch = build()
    for seed in range(10):
        regions, target = random_regions(seed), ellipses(seed)
        found = branch._crop(target, regions.boxes, regions.target_index)
        expected = project_masks_on_boxes(target.masks, regions.boxes, regions.target_index, 14)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert 0.1 < found.mean() < 0.9
    one = branch._crop(target, TARGETS[1:2], torch.tensor([1]))
    assert one.shape == (1, 14, 14)
    # not the first of the masks, though the only one that is used
    torch.testing.assert_close(one, project_masks_on_boxes(target.masks, TARGETS[1:2], torch.tensor([1]), 14))
    none = branch._crop(target, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, 14, 14)


def reference_of(branch: MaskBranch) -> nn.Module:
    """Torchvision's head and predictor with the same weights; row 0 of its predictor is the background's."""
    head = MaskRCNNHeads(8, (8, 8), 1)
    predictor = MaskRCNNPredictor(8, 8, 4)
    for mine, theirs in zip(branch.convolutions, head):
        theirs[0].load_state_dict(mine[0].state_dict())  # type: ignore[index]
    predictor.conv5_mask.load_state_dict(branch.upsample.state_dict())
    with torch.no_grad():
        predictor.mask_fcn_logits.weight[1:] = branch.predictor.weight
        predictor.mask_fcn_logits.bias[1:] = branch.predictor.bias  # type: ignore[index]
    return nn.Sequential(head, predictor)


def test_loss_equals_torchvision() -> None:
    branch = build()
    reference = reference_of(branch)
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    for seed in range(6):
        sampled, targets = [random_regions(seed), random_regions(seed + 50, 5)], [ellipses(seed), ellipses(seed + 50)]
        maps = [feature.requires_grad_() for feature in random_maps(seed)]
        found = branch.loss(maps, sampled, targets)
        boxes = [regions.boxes[regions.positive] for regions in sampled]
        truths = [regions.target_index[regions.positive] for regions in sampled]
        logits = reference(pool({"0": maps[0], "1": maps[1]}, boxes, [SIZE] * 2))
        masks, labels = [target.masks for target in targets], [target.labels + 1 for target in targets]
        expected = maskrcnn_loss(logits, boxes, masks, labels, truths)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(torch.autograd.grad(found, maps), torch.autograd.grad(expected, maps)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_masks_of_the_labels_equal_torchvision() -> None:
    branch = build()
    reference = reference_of(branch)
    boxes = [random_regions(1).boxes, torch.zeros(0, 4)]
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2])
    with torch.no_grad():
        found = branch(random_maps(), boxes, labels).sigmoid()
        pooled = MultiScaleRoIAlign(["0", "1"], 7, 2)(dict(zip("01", random_maps())), boxes, [SIZE] * 2)
        expected = maskrcnn_inference(reference(pooled), [labels + 1])[0][:, 0]
    assert found.shape == (9, 14, 14)
    torch.testing.assert_close(found, expected)


def test_weight() -> None:
    sampled, targets = [random_regions(0), nothing()], [ellipses(0), without_objects()]
    plain = build().loss(random_maps(), sampled, targets)
    torch.testing.assert_close(build(weight=3.0).loss(random_maps(), sampled, targets), 3 * plain)
    assert plain > 0


@pytest.mark.parametrize("norm", [False, True])
def test_no_objects_give_no_loss_but_gradients(norm: bool) -> None:
    branch = build(norm=norm).train()
    loss = branch.loss(random_maps(), [nothing(), nothing()], [without_objects()] * 2)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in branch.parameters())
    assert all(buffer.isfinite().all() for buffer in branch.buffers())


def test_learns_the_mask_of_one_object() -> None:
    branch = build()
    maps, target = random_maps(), ellipses(0)
    sampled = [SampledRegions(TARGETS, torch.arange(3), torch.ones(3, dtype=torch.bool)), nothing()]
    optimizer = torch.optim.Adam(branch.parameters(), lr=0.01)
    for _ in range(160):
        loss = branch.loss(maps, sampled, [target, without_objects()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = branch(maps, [TARGETS, torch.zeros(0, 4)], target.labels) > 0
    wanted = branch._crop(target, TARGETS, torch.arange(3)) > 0.5
    assert (found == wanted).float().mean() > 0.95


def test_targets_need_masks() -> None:
    with pytest.raises(ValueError, match="mask_rcnn needs targets with masks"):
        build()._crop(Target(TARGETS, torch.tensor([0, 2, 1])), TARGETS, torch.arange(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"name": "spp"}}, r"needs region features with spatial dimensions\. Use head\.mask\.features"),
        ({"features": {"name": "roi_align", "sise": 14}}, r"'head\.mask\.features\.sise'.*'size'"),
        ({"widht": 4}, r"'head\.mask\.widht' is not an option of the mask branch.*'width'"),
        ({"depth": -1}, "depth"),
        ({"width": 0}, "width"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_warp_in_a_mask_branch_is_refused_by_its_name() -> None:
    features = {"name": "warp", "backbone": {"name": "resnet18"}}
    with pytest.raises(ConfigError, match="The region features 'warp' read the pixels of the image"):
        build(features=features)


SMALL = {"trunk": {"name": "mlp", "width": 16}}
RPN = {"anchors": {"name": "pyramid", "sizes": [[16.0], [40.0]]}, "train_proposals": 40, "proposals": 30}
MASK = {"depth": 1, "width": 8}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fast_rcnn", {"regions": SMALL}),
        ("fast_rcnn", {"regions": {**SMALL, "features": {"name": "spp"}, "classifier": "hinge"}}),
        ("faster_rcnn", {"regions": SMALL, "rpn": RPN}),
        ("mask_rcnn", {"regions": SMALL, "rpn": RPN, "mask": MASK}),
        ("mask_rcnn", {"regions": {"trunk": {"name": "conv_fc"}}, "rpn": RPN, "mask": {**MASK, "norm": True}}),
    ],
)
def test_heads_train_and_predict_in_mixed_precision(name: str, options: dict[str, Any], channels_last: bool) -> None:
    """As the training loop does: maps in float32, layers under autocast; losses and detections in float32."""
    torch.manual_seed(0)
    head = heads.build({"name": name, **options}, "head", channels=(8, 8), strides=STRIDES, num_classes=3)
    maps = random_maps()
    if channels_last:
        head = head.to(memory_format=torch.channels_last)
        maps = [feature.contiguous(memory_format=torch.channels_last) for feature in maps]
    inputs = Inputs(SIZE, (SIZE, (50, 70)), (random_regions(1).boxes, random_regions(2, 0).boxes))
    targets = (ellipses(0), without_objects())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(maps, inputs)
        losses = head.loss(outputs, targets)
        found = head.eval().decode(outputs)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert len(found) == 2
    exact = head.loss(head(maps, inputs), (without_objects(),) * 2)
    assert all(value.isfinite() for value in exact.values())
