"""The region-proposal network against torchvision's, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionNetwork
from torchvision.models.detection.rpn import RPNHead

from detkit.boxes.matching import match_two_thresholds
from detkit.errors import ConfigError
from detkit.heads.faster_rcnn import FasterRCNN
from detkit.heads.parts.rpn import ProposalOutputs, RegionProposalNetwork
from detkit.registry import build_part
from detkit.structures import Inputs, Target

STRIDES = (8, 16)
SIZE = (64, 96)
SIZES = (SIZE, (50, 70))
ANCHORS = {"name": "pyramid", "sizes": [[16.0], [40.0]]}
OBJECTS = torch.tensor([[5.0, 5, 45, 50], [40, 10, 90, 60]])
TARGETS = (Target(OBJECTS, torch.tensor([0, 1])), Target.empty())


def build(strides: tuple[int, ...] = STRIDES, channels: tuple[int, ...] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_part(
        RegionProposalNetwork,
        {"anchors": ANCHORS, **options},
        "head.rpn",
        "region-proposal network",
        channels=channels or (8,) * len(strides),
        strides=strides,
    )


def random_maps(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator) for stride in STRIDES]


def outputs_of(network: RegionProposalNetwork, seed: int = 0) -> ProposalOutputs:
    return network(random_maps(seed), Inputs(SIZE, SIZES))


@pytest.mark.parametrize("depth", [1, 2])
def test_whole_stage_equals_torchvision(depth: int) -> None:
    """Same weights: same outputs, anchors, proposals; with every anchor sampled the same losses and gradients."""
    network = build(depth=depth, samples=10**6, positive_fraction=1.0, candidates=60, proposals=30)
    head = RPNHead(8, 3, conv_depth=depth)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
        for mine, theirs in zip(network.convolutions, head.conv):
            theirs[0].load_state_dict(mine.state_dict())
        head.cls_logits.load_state_dict(network.objectness.state_dict())
        head.bbox_pred.load_state_dict(network.offsets.state_dict())
    limits = {"training": 60, "testing": 60}, {"training": 30, "testing": 30}
    reference = TorchvisionNetwork(
        AnchorGenerator(((16,), (40,)), ((0.5, 1.0, 2.0),) * 2), head, 0.7, 0.3, 10**6, 1.0, *limits, 0.7
    )
    for seed in range(5):
        maps = random_maps(seed)
        outputs = network(maps, Inputs(SIZE, SIZES))
        found = network.propose(outputs, network.amounts)
        losses = network.loss(outputs, TARGETS)
        images = ImageList(torch.zeros(2, 3, *SIZE), list(SIZES))
        targets = [{"boxes": target.boxes} for target in TARGETS]
        proposals, expected = reference(images, dict(enumerate(maps)), targets)
        for mine, theirs in zip(found, proposals):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)
            assert not mine.requires_grad
        torch.testing.assert_close(losses["objectness"], expected["loss_objectness"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses["proposal_box"], expected["loss_rpn_box_reg"], rtol=1e-4, atol=1e-6)
        network.zero_grad()
        head.zero_grad()
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        torch.testing.assert_close(network.offsets.weight.grad, head.bbox_pred.weight.grad, rtol=1e-4, atol=1e-5)
        theirs = head.conv[0][0].weight.grad
        torch.testing.assert_close(network.convolutions[0].weight.grad, theirs, rtol=1e-4, atol=1e-5)


def test_each_anchor_has_its_own_answer() -> None:
    """The order of the flattened maps is that of the anchors: place by place, the anchors of a place together."""
    network = build(depth=0)
    outputs = outputs_of(network)
    assert outputs.level_counts == (8 * 12 * 3, 4 * 6 * 3)
    assert outputs.anchors.shape == (sum(outputs.level_counts), 4)
    maps = random_maps(0)
    for level, (row, column, anchor) in enumerate([(5, 7, 1), (2, 3, 2)]):
        stride, start = STRIDES[level], (0, outputs.level_counts[0])[level]
        index = start + (row * maps[level].shape[3] + column) * 3 + anchor
        place = maps[level][1, :, row, column]
        logit = network.objectness.weight[anchor, :, 0, 0] @ place
        torch.testing.assert_close(outputs.objectness[1, index], logit)
        offsets = network.offsets.weight[4 * anchor : 4 * anchor + 4, :, 0, 0] @ place
        torch.testing.assert_close(outputs.offsets[1, index], offsets)
        centre = (outputs.anchors[index, :2] + outputs.anchors[index, 2:]) / 2
        assert centre.tolist() == [column * stride, row * stride]


def test_labels_of_the_sampled_anchors() -> None:
    """Logits that know the answer have no loss; those that know the opposite have all of it."""
    network = build(samples=64, positive_fraction=0.5)
    anchors = outputs_of(network).anchors
    match = match_two_thresholds(anchors, OBJECTS, low=0.3, high=0.7)
    assert 0 < int(match.positive.sum()) < 32
    logits = torch.zeros(2, len(anchors))
    logits[0] = torch.where(match.positive, 50.0, -50.0)
    logits[0, match.ignored] = math.nan  # takes no part
    logits[1] = -50.0
    perfect = outputs_of(network)._replace(objectness=logits)
    assert network.loss(perfect, TARGETS)["objectness"].item() == pytest.approx(0, abs=1e-6)
    assert network.loss(perfect._replace(objectness=-logits), TARGETS)["objectness"].item() == pytest.approx(50)


def test_images_without_objects_teach_background() -> None:
    network = build(samples=64)
    outputs = outputs_of(network)
    losses = network.loss(outputs, (Target.empty(), Target.empty()))
    assert losses["proposal_box"] == 0
    assert losses["objectness"].item() == pytest.approx(math.log(2), abs=0.05)
    sum(losses.values()).backward()
    assert network.objectness.bias.grad.min() > 0  # every logit goes down
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not network.offsets.weight.grad.any()


def test_the_best_anchor_of_a_target_is_an_object_however_small_their_overlap() -> None:
    tiny = Target(torch.tensor([[30.0, 30, 33, 33]]), torch.tensor([0]))
    network = build(samples=10**6, positive_fraction=1.0)
    losses = network.loss(outputs_of(network), (tiny, Target.empty()))
    assert losses["proposal_box"] > 0


def test_losses_without_any_sampled_anchor() -> None:
    crowd = Target(torch.tensor([[-300.0, -300, 400, 400]]), torch.tensor([0]), crowd=torch.tensor([True]))
    network = build()
    losses = network.loss(outputs_of(network), (crowd, crowd))
    assert {name: value.item() for name, value in losses.items()} == {"objectness": 0.0, "proposal_box": 0.0}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())


def test_the_box_loss_has_its_weight() -> None:
    options = {"samples": 10**6, "positive_fraction": 1.0}
    plain = build(**options).loss(outputs_of(build(**options)), TARGETS)
    heavy = build(box_weight=4.0, **options).loss(outputs_of(build(**options)), TARGETS)
    torch.testing.assert_close(heavy["proposal_box"], 4 * plain["proposal_box"])
    assert torch.equal(heavy["objectness"], plain["objectness"])


def test_default_anchors_are_those_of_the_papers() -> None:
    one = build((16,), anchors=None)
    sides = (one.layout([(1, 1)], (16, 16), (16,)) * torch.tensor([-1.0, -1, 1, 1])).view(9, 2, 2).sum(1)
    areas = sides.prod(1).view(3, 3)
    for column, size in enumerate((128, 256, 512)):
        torch.testing.assert_close(areas[:, column], torch.full((3,), float(size**2)), rtol=0.02, atol=0)
    torch.testing.assert_close(
        sides[:, 1] / sides[:, 0], torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3), rtol=0.02, atol=0
    )
    several = build((4, 8, 16, 32, 64), anchors=None)
    anchors = several.layout([(1, 1)] * 5, (64, 64), (4, 8, 16, 32, 64)).view(5, 3, 4)
    assert [(a[1, 2] - a[1, 0]).item() for a in anchors] == [32, 64, 128, 256, 512]


def test_default_anchors_of_a_map_pooled_from_the_whole_image_are_refused() -> None:
    """small_ssd with level_channels as its last width has maps of one width, the last of stride 0."""
    with pytest.raises(ConfigError, match=r"no default anchors .* Set 'head\.rpn\.anchors'"):
        build((8, 0), anchors=None)
    network = build((8, 0), anchors={"name": "pyramid", "sizes": [[16.0], [60.0]]})
    anchors = network.layout([(8, 8), (1, 1)], (64, 64), (8, 0))
    assert ((anchors[:, 2:] - anchors[:, :2]) > 0).all()


def test_training_has_limits_of_its_own() -> None:
    network = build(candidates=5, proposals=4, train_candidates=50, train_proposals=40)
    outputs = outputs_of(network)
    assert all(len(boxes) <= 4 for boxes in network.propose(outputs, network.amounts))
    assert any(len(boxes) > 10 for boxes in network.propose(outputs, network.train_amounts))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["objectness", "offsets"])
def test_broken_outputs_show_in_the_losses(part: str, value: float) -> None:
    """The loop stops at a loss that is not finite and names it and the images; no other error may come before."""
    head = FasterRCNN((8, 8), STRIDES, 2, rpn={"anchors": ANCHORS, "samples": 10**6}, regions={"samples": 8})
    outputs = head(random_maps(0), Inputs(SIZE, SIZES))
    tensor = getattr(outputs.proposals, part).clone()
    tensor[0] = value
    losses = head.loss(outputs._replace(proposals=outputs.proposals._replace(**{part: tensor})), TARGETS)
    assert not torch.isfinite(sum(losses.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8, 4)}, r"but they have \[8, 4\]\. Add a neck \(\{name: fpn\}\)"),
        ({"samples": 0}, "must be at least 1, but is 0"),
        ({"candidates": 0}, "must be at least 1, but is 0"),
        ({"train_proposals": 0}, "must be at least 1, but is 0"),
        (
            {"anchors": {"name": "pyramid", "sizes": [[8.0], [16.0, 32.0]]}},
            r"same number of anchors per location on each level, but gives \[3, 6\]",
        ),
        ({"anchors": {"name": "pyramids"}}, "no anchor layout named 'pyramids'.*'pyramid'"),
        ({"anchors": {"sizes": [[8.0]]}}, r"'head\.rpn\.anchors' needs a 'name'"),
        ({"sample": 5}, r"'head\.rpn\.sample' is not an option of the region-proposal network.*'samples'"),
        ({"box_loss": "l3"}, r"head\.rpn\.box_loss.*l3"),
        ({"channels": (8, 8), "nms_treshold": 0.5}, r"'head\.rpn\.nms_treshold'.*'nms_threshold'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foreground_from": 0.2}, "foreground_from"),
        ({"background_below": -0.1}, "background_below"),
        ({"foreground_from": 1.5}, "foreground_from"),
        ({"positive_fraction": 2.0}, "positive_fraction"),
        ({"nms_threshold": 1.5}, "nms_threshold"),
        ({"depth": -1}, "depth"),
        ({"anchors": {"name": "pyramid", "sizes": [[8.0], [16.0], [32.0]]}}, "3 levels, but the model has 2"),
    ],
)
def test_values_out_of_range_are_refused_when_built(options: dict[str, Any], message: str) -> None:
    """With the name of the option, not at the first image."""
    with pytest.raises(ConfigError, match=message):
        build(**options)
