"""The second stage against torchvision's RoIHeads, and against plain loops."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import box_iou

from detkit.boxes.coding import decode
from detkit.config import Experiment, InputOptions
from detkit.errors import ConfigError
from detkit.heads.base import Postprocess
from detkit.heads.fast_rcnn import FastRCNN
from detkit.heads.parts.regions import RegionStage, SampledRegions
from detkit.model import Model, build_model, load_model
from detkit.structures import ClassList, Detections, Target

SIZE = (64, 96)
CLASSES = ClassList.from_names(("a", "b"))
MAPS = [torch.zeros(2, 4, 8, 12)]
OBJECTS = torch.tensor([[5.0, 5, 45, 50], [40, 10, 90, 60], [60, 2, 80, 20]])


def build(num_classes: int = 3, **options: Any) -> RegionStage:
    torch.manual_seed(0)
    options = {"trunk": {"name": "mlp", "width": 16}, "features": {"name": "roi_pool", "size": 2}, **options}
    return RegionStage(channels=(4,), strides=(8,), num_classes=num_classes, **options)


def random_proposals(seed: int, count: int = 150) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([70.0, 45])
    around = OBJECTS[torch.randint(len(OBJECTS), (count,), generator=generator)]
    random = torch.cat((corners, corners + 3 + 40 * torch.rand(count, 2, generator=generator)), 1)
    moved = around + 6 * torch.randn(count, 4, generator=generator)
    moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
    return torch.cat((random, moved))


def target(**options: Any) -> Target:
    return Target(OBJECTS, torch.tensor([0, 2, 1]), **options)


def replaced(stage: RegionStage, logits: Tensor, offsets: Tensor) -> RegionStage:
    """The stage with answers of its own, row by row as regions are asked for, whatever they are."""
    asked = 0

    def answer(maps: Any, regions: Any) -> tuple[Tensor, Tensor]:
        nonlocal asked
        start, asked = asked, asked + sum(map(len, regions))
        return logits[start:asked], offsets[start:asked]

    stage.forward = answer  # type: ignore[method-assign,assignment]
    return stage


class TestSample:
    def test_kinds_and_counts(self) -> None:
        stage = build(samples=40, positive_fraction=0.3)
        for seed in range(10):
            torch.manual_seed(seed)
            proposals = random_proposals(seed)
            (sampled,) = stage.sample([proposals], [target()])
            best, truth = box_iou(sampled.boxes, OBJECTS).max(1)
            assert len(sampled.boxes) == 40
            assert int(sampled.positive.sum()) == 12
            assert sampled.positive[:12].all()
            assert torch.equal(sampled.positive, best >= 0.5)
            assert torch.equal(sampled.target_index[:12], truth[:12])
            among = torch.cat((proposals, OBJECTS))
            assert (sampled.boxes[:, None] == among[None]).all(-1).any(1).all()

    def test_with_room_for_all_each_region_is_there_once(self) -> None:
        """Those between the thresholds apart; the ground truths themselves are among them."""
        stage = build(samples=10**6, positive_fraction=1.0, foreground_from=0.6, background_below=0.4)
        proposals = random_proposals(1)
        (sampled,) = stage.sample([proposals], [target()])
        among = torch.cat((proposals, OBJECTS))
        best = box_iou(among, OBJECTS).max(1).values
        positive, negative = among[best >= 0.6], among[best < 0.4]
        assert ((best >= 0.4) & (best < 0.6)).any()
        assert len(positive) + len(negative) == len(sampled.boxes)
        assert sorted(sampled.boxes[sampled.positive].tolist()) == sorted(positive.tolist())
        assert sorted(sampled.boxes[~sampled.positive].tolist()) == sorted(negative.tolist())
        for box in OBJECTS:
            assert (sampled.boxes[sampled.positive] == box).all(1).any()

    def test_targets_train_where_the_proposals_miss_them_all(self) -> None:
        (sampled,) = build().sample([torch.zeros(0, 4)], [target()])
        assert sorted(sampled.boxes.tolist()) == sorted(OBJECTS.tolist())
        assert sampled.positive.all()

    def test_ignored_targets_are_neither_chosen_nor_background(self) -> None:
        ignored = torch.tensor([False, True, False])
        stage = build(samples=10**6, positive_fraction=1.0)
        for flags in ({"crowd": ignored}, {"difficult": ignored}):
            proposals = torch.cat((random_proposals(2), OBJECTS))
            (sampled,) = stage.sample([proposals], [target(**flags)])
            assert not (sampled.target_index[sampled.positive] == 1).any()
            assert not (sampled.boxes == OBJECTS[1]).all(1).any()
            negative = sampled.boxes[~sampled.positive]
            assert len(negative) > 10
            assert (box_iou(negative, OBJECTS[1:2]) < 0.5).all()
            width, height = (negative[:, 2:] - negative[:, :2]).unbind(1)
            top_left = torch.maximum(negative[:, :2], OBJECTS[1, :2])
            inside = (torch.minimum(negative[:, 2:], OBJECTS[1, 2:]) - top_left).clamp(min=0).prod(1)
            assert (inside < 0.5 * width * height).all()

    @pytest.mark.parametrize("lowest", [0.1, 0.25])
    def test_background_from_leaves_out_what_is_far_from_all_targets(self, lowest: float) -> None:
        stage = build(samples=10**6, positive_fraction=1.0, background_from=lowest)
        for seed in range(5):
            proposals = random_proposals(seed)
            among = torch.cat((proposals, OBJECTS))
            best = box_iou(among, OBJECTS).max(1).values
            assert (best < lowest).any()
            (sampled,) = stage.sample([proposals], [target()])
            wanted = among[(best >= lowest) & (best < 0.5)]
            assert sorted(sampled.boxes[~sampled.positive].tolist()) == sorted(wanted.tolist())
            assert int(sampled.positive.sum()) == int((best >= 0.5).sum())

    def test_background_from_does_not_count_in_images_without_objects(self) -> None:
        stage = build(samples=20, background_from=0.1)
        proposals = random_proposals(3)
        crowd = Target(OBJECTS[:1], torch.tensor([0]), crowd=torch.tensor([True]))
        empty, crowded = stage.sample([proposals, proposals], [Target.empty(), crowd])
        assert len(empty.boxes) == len(crowded.boxes) == 20
        assert not empty.positive.any()
        assert not crowded.positive.any()

    def test_background_near_a_crowd_alone_is_far_from_all_objects(self) -> None:
        """A region that touches only a crowd, too little to be ignored, overlaps the objects less than 0.1."""
        crowded = target(crowd=torch.tensor([False, True, False]))
        region = torch.tensor([[70.0, 30, 110, 70]])  # IoU with the crowd 0.17, with the others 0
        assert 0.1 < box_iou(region, OBJECTS[1:2]) < 0.5
        (sampled,) = build(background_from=0.1).sample([region], [crowded])
        assert not (sampled.boxes == region).all(1).any()

    def test_nothing_at_all(self) -> None:
        (sampled,) = build().sample([torch.zeros(0, 4)], [Target.empty()])
        assert isinstance(sampled, SampledRegions)
        assert [tuple(tensor.shape) for tensor in sampled] == [(0, 4), (0,), (0,)]


def samples_of_two_images() -> tuple[list[SampledRegions], list[Target]]:
    torch.manual_seed(1)
    targets = [target(), Target.empty()]
    return build(samples=60).sample([random_proposals(1), random_proposals(2, 20)], targets), targets


class TestLoss:
    @pytest.mark.parametrize("seed", range(5))
    def test_equal_to_torchvision(self, seed: int) -> None:
        sampled, targets = samples_of_two_images()
        counts = [len(regions.boxes) for regions in sampled]
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(sum(counts), 4, generator=generator, requires_grad=True)
        offsets = torch.randn(sum(counts), 3, 4, generator=generator, requires_grad=True)
        losses = replaced(build(), logits, offsets).loss(MAPS, sampled, targets)

        reference = roi_heads()
        labels = [torch.zeros(count, dtype=torch.int64) for count in counts]
        positive = sampled[0].positive
        labels[0][positive] = targets[0].labels[sampled[0].target_index[positive]] + 1
        matched = [OBJECTS[torch.where(positive, sampled[0].target_index, 0)], torch.zeros(counts[1], 4)]
        expected_offsets = reference.box_coder.encode(matched, [regions.boxes for regions in sampled])
        # a row for the background's box, which torchvision's network predicts and nothing reads
        with_background = torch.cat((torch.zeros(sum(counts), 1, 4), offsets), 1).flatten(1)
        expected = fastrcnn_loss(logits, with_background, labels, list(expected_offsets))
        assert int(positive.sum()) == 15
        torch.testing.assert_close((losses["class"], losses["box"]), expected)
        mine = torch.autograd.grad(losses["class"] + 2 * losses["box"], (logits, offsets))
        theirs = torch.autograd.grad(expected[0] + 2 * expected[1], (logits, offsets))
        torch.testing.assert_close(mine, theirs)

    def test_weight_of_the_boxes(self) -> None:
        sampled, targets = samples_of_two_images()
        count = sum(len(regions.boxes) for regions in sampled)
        answer = torch.zeros(count, 4), torch.ones(count, 3, 4)
        plain = replaced(build(), *answer).loss(MAPS, sampled, targets)
        heavy = replaced(build(box_weight=3.0), *answer).loss(MAPS, sampled, targets)
        torch.testing.assert_close(heavy["box"], 3 * plain["box"])
        assert torch.equal(heavy["class"], plain["class"])

    def test_hinge_equals_a_plain_loop(self) -> None:
        sampled, targets = samples_of_two_images()
        count = sum(len(regions.boxes) for regions in sampled)
        margins = 2 * torch.randn(count, 3, generator=torch.Generator().manual_seed(3))
        stage = replaced(build(classifier="hinge"), margins, torch.zeros(count, 3, 4))
        found = stage.loss(MAPS, sampled, targets)["class"]
        expected, row = 0.0, 0
        for regions, target in zip(sampled, targets):
            for positive, index in zip(regions.positive.tolist(), regions.target_index.tolist()):
                for label in range(3):
                    own = positive and target.labels[index] == label
                    expected += max(0.0, 1 - (1 if own else -1) * margins[row, label].item())
                row += 1
        assert found.item() == pytest.approx(expected / count, rel=1e-5)

    @pytest.mark.parametrize("classifier", ["softmax", "hinge"])
    def test_no_samples_give_no_loss_but_gradients(self, classifier: str) -> None:
        stage = build(classifier=classifier)
        sampled = stage.sample([torch.zeros(0, 4)] * 2, [Target.empty()] * 2)
        losses = stage.loss(MAPS, sampled, [Target.empty()] * 2)
        assert {name: value.item() for name, value in losses.items()} == {"class": 0.0, "box": 0.0}
        (losses["class"] + losses["box"]).backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in stage.parameters())

    def test_a_machine_of_separable_regions_reaches_no_loss(self) -> None:
        """The image shows each class in a channel of its own; a linear machine on the means tells them apart."""
        stage = RegionStage(
            channels=(4,), strides=(8,), num_classes=3, classifier="hinge",
            features={"name": "roi_pool", "size": 1}, trunk={"name": "mean"},
        )  # fmt: skip
        boxes = torch.tensor([[0.0, 0, 15, 15], [40, 0, 55, 15], [0, 40, 15, 55], [60, 40, 90, 60]])
        maps = [torch.zeros(1, 4, 8, 12)]
        for channel, (left, top, right, bottom) in enumerate((boxes / 8).int().tolist()):
            maps[0][0, channel, top : bottom + 1, left : right + 1] = 1.0
        target = Target(boxes[:3], torch.tensor([0, 1, 2]))
        sampled = stage.sample([boxes], [target])
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.5)
        for _ in range(60):
            losses = stage.loss(maps, sampled, [target])
            optimizer.zero_grad()
            losses["class"].backward()
            optimizer.step()
        assert losses["class"] == 0
        (found,) = stage.decode(maps, [boxes], [SIZE], Postprocess(0.5, 0.5, 100, 100))
        assert sorted(found.labels.tolist()) == [0, 1, 2]


def roi_heads(score: float = 0.05, overlap: float = 0.5, count: int = 100) -> RoIHeads:
    return RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, score, overlap, count)


class TestDecode:
    @pytest.mark.parametrize(("score", "overlap", "count"), [(0.05, 0.5, 100), (0.2, 0.3, 7), (0.0, 0.7, 1000)])
    def test_equal_to_torchvision(self, score: float, overlap: float, count: int) -> None:
        reference = roi_heads(score, overlap, count)
        sizes = [SIZE, (50, 30), SIZE]
        for seed in range(10):
            proposals = [random_proposals(seed, 30), random_proposals(seed + 100, 20), torch.zeros(0, 4)]
            generator = torch.Generator().manual_seed(seed)
            logits = 2 * torch.randn(100, 4, generator=generator)
            offsets = 2 * torch.randn(100, 3, 4, generator=generator)
            limits = Postprocess(score, overlap, 1000, count)
            found = replaced(build(), logits, offsets).decode(MAPS, proposals, sizes, limits)
            with_background = torch.cat((torch.full((100, 1, 4), 9.0), offsets), 1)
            expected = reference.postprocess_detections(logits, with_background.flatten(1), proposals, sizes)
            assert len(found) == 3
            for detections, boxes, scores, labels in zip(found, *expected):
                torch.testing.assert_close(detections.scores, scores, rtol=0, atol=1e-6)
                torch.testing.assert_close(detections.boxes, boxes, rtol=0, atol=1e-3)
                assert torch.equal(detections.labels, labels - 1)
            assert len(found[2]) == 0

    def test_hinge_scores_are_sigmoids_of_the_margins(self) -> None:
        proposals = [torch.tensor([[5.0, 5, 30, 30], [50, 20, 90, 60]])]
        margins = torch.tensor([[3.0, -4, -9], [-9, -9, 1.5]])
        stage = replaced(build(classifier="hinge"), margins, torch.zeros(2, 3, 4))
        (found,) = stage.decode(MAPS, proposals, [SIZE], Postprocess(0.5, 0.5, 100, 100))
        assert found.labels.tolist() == [0, 2]
        torch.testing.assert_close(found.scores, 1 / (1 + torch.exp(-4 * torch.tensor([3.0, 1.5]))))
        torch.testing.assert_close(found.boxes, proposals[0])

    def test_more_proposals_than_candidates_are_all_heard(self) -> None:
        """Two thousand proposals of selective search, each of its own place: nothing is cut but max_detections."""
        corners = torch.stack(torch.meshgrid(torch.arange(50.0), torch.arange(40.0), indexing="ij"), -1).flatten(0, 1)
        proposals = torch.cat((10 * corners, 10 * corners + 8), 1)
        logits = torch.tensor([[0.0, 5, -5, -5]]).repeat(2000, 1)
        head = FastRCNN((4,), (8,), 3, max_detections=5000)
        stage = replaced(head.regions, logits, torch.zeros(2000, 3, 4))
        (found,) = stage.decode(MAPS, [proposals], [(500, 600)], head.postprocess)
        assert len(found) == 2000

    def test_boxes_without_area_are_dropped(self) -> None:
        proposals = [torch.tensor([[200.0, 5, 230, 30], [5, 5, 5, 30], [5, 5, 30, 30]])]
        stage = replaced(build(), torch.tensor([[0.0, 5, 0, 0]]).repeat(3, 1), torch.zeros(3, 3, 4))
        (found,) = stage.decode(MAPS, proposals, [SIZE], Postprocess(0.5, 0.5, 100, 100))
        assert found.boxes.tolist() == [[5.0, 5, 30, 30]]

    def test_offsets_are_those_of_the_class(self) -> None:
        proposals = [torch.tensor([[10.0, 10, 30, 30]])]
        offsets = torch.zeros(1, 3, 4)
        offsets[0, 1] = torch.tensor([1.0, 0, 0, 0])
        stage = replaced(build(), torch.tensor([[-9.0, -9, 5, -9]]), offsets)
        (found,) = stage.decode(MAPS, proposals, [SIZE], Postprocess(0.5, 0.5, 100, 100))
        torch.testing.assert_close(found.boxes, decode(offsets[:, 1], proposals[0]))
        torch.testing.assert_close(found.boxes, torch.tensor([[12.0, 10, 32, 30]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"'head\.regions\.samples' must be at least 1, but is 0"),
        ({"background_from": 0.6}, r"background_from <= background_below <=.*0\.6, 0\.5 and 0\.5"),
        ({"background_below": 0.7}, r"they are 0\.0, 0\.7 and 0\.5"),
        ({"foreground_from": 1.5}, r"they are 0\.0, 0\.5 and 1\.5"),
        ({"background_from": -0.1}, r"they are -0\.1, 0\.5 and 0\.5"),
        ({"positive_fraction": 1.5}, "positive_fraction"),
        ({"trunk": {"name": "resnet_layer4", "network": "resnet152"}}, "must be resnet18.*not 'resnet152'"),
        (
            {"features": {"name": "roi_align"}, "trunk": {"name": "resnet_layer4", "network": "resnet18"}},
            r"takes 256 channels, but the region features have 4\. Use backbone: \{name: resnet18, levels: \[4\]",
        ),
        (
            {"features": {"name": "spp"}, "trunk": {"name": "conv_fc"}},
            "'conv_fc' needs region features with spatial dimensions.*'mlp'",
        ),
        (
            {"features": {"name": "spp"}, "trunk": {"name": "resnet_layer4"}},
            "'resnet_layer4' needs region features with spatial",
        ),
        ({"trunk": {"name": "mlq"}}, "no trunk of regions named 'mlq'.*'mlp'"),
        ({"trunk": {"name": "mlp", "width": 0}}, "width"),
        ({"trunk": {"name": "mlp", "dropout": 2.0}}, "dropout"),
        ({"trunk": {"name": "conv_fc", "depth": -1}, "features": {"name": "roi_align"}}, "depth"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def experiment(backbone: dict[str, Any], head: dict[str, Any]) -> Experiment:
    return Experiment(data={"name": "shapes"}, backbone=backbone, head=head, input=InputOptions(SIZE), name="x")


IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
TARGETS = (
    Target(OBJECTS, torch.tensor([0, 1, 1]), masks=torch.ones(3, *SIZE, dtype=torch.bool)),
    replace(Target.empty(), masks=torch.zeros(0, *SIZE, dtype=torch.bool)),
)
PROPOSALS = (random_proposals(1, 10), random_proposals(2, 10))


def train_a_step(model: Model, proposals: tuple[Tensor, ...] | None) -> dict[str, float]:
    """One step of SGD; every parameter must have moved or at least have had a gradient."""
    model.train()
    losses = model.head.loss(model(IMAGES, (SIZE, (50, 60)), proposals), TARGETS)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return {name: value.item() for name, value in losses.items()}


def predict(model: Model, proposals: tuple[Tensor, ...] | None) -> list[Detections]:
    model.eval()
    model.head.postprocess = replace(model.head.postprocess, score_threshold=0.0)
    with torch.no_grad():
        return model.head.decode(model(IMAGES, (SIZE, (50, 60)), proposals))


C4 = {
    "name": "faster_rcnn",
    "rpn": {"train_proposals": 20, "proposals": 20},
    "regions": {
        "features": {"name": "roi_align", "size": 14},
        "trunk": {"name": "resnet_layer4", "network": "resnet18"},
        "samples": 16,
    },
}
WARP = {
    "name": "fast_rcnn",
    "regions": {
        "features": {"name": "warp", "backbone": {"name": "resnet18", "levels": [4]}, "size": 48, "context": 4},
        "trunk": {"name": "mean"},
        "classifier": "hinge",
        "samples": 16,
    },
}
WHOLE = [
    pytest.param({"name": "resnet18", "levels": [4]}, C4, None, id="c4"),
    pytest.param({"name": "pixels"}, WARP, PROPOSALS, id="warp"),
]


@pytest.mark.parametrize(("backbone", "head", "proposals"), WHOLE)
def test_whole_models_train_and_predict(backbone: Any, head: Any, proposals: Any) -> None:
    torch.manual_seed(0)
    model = build_model(experiment(backbone, head), CLASSES)
    before = predict(model, proposals)
    first = train_a_step(model, proposals)
    assert first["class"] > 0
    for _ in range(2):
        last = train_a_step(model, proposals)
    assert sum(last.values()) < sum(first.values())
    after = predict(model, proposals)
    assert len(before) == len(after) == 2
    assert len(after[0]) > 0
    for size, detections in zip((SIZE, (50, 60)), after):
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= torch.tensor([size[1], size[0]] * 2)).all()


FORMS = {
    "fast r-cnn": ({"name": "vgg11", "levels": [5]}, None, {"name": "fast_rcnn", "regions": {"background_from": 0.1}}),
    "sppnet": (
        {"name": "vgg11", "levels": [5]},
        None,
        {"name": "fast_rcnn", "regions": {"features": {"name": "spp"}, "classifier": "hinge"}},
    ),
    "the original faster r-cnn": (
        {"name": "vgg11", "levels": [5]},
        None,
        {"name": "faster_rcnn", "regions": {"features": {"name": "roi_pool"}}},
    ),
    "feature pyramid": (
        {"name": "resnet18"},
        {"name": "fpn", "width": 16, "extra_levels": 1, "extra": "pool"},
        {"name": "mask_rcnn", "mask": {"width": 16}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_docstrings_name_build_and_reach_every_parameter(form: str) -> None:
    backbone, neck, head = FORMS[form]
    options = {**head, "regions": {"trunk": {"name": "mlp", "width": 8}, "samples": 16, **head.get("regions", {})}}
    whole = replace(experiment(backbone, options), neck=neck)
    proposals = PROPOSALS if head["name"] == "fast_rcnn" else None
    model = build_model(whole, CLASSES)
    losses = train_a_step(model, proposals)
    assert losses["class"] > 0
    assert len(predict(model, proposals)) == 2


def test_weights_of_the_trunk_are_loaded(tmp_path: Path) -> None:
    full = models.resnet18()
    torch.save(full.state_dict(), tmp_path / "resnet18.pth")
    trunk = {"name": "resnet_layer4", "network": "resnet18", "weights": str(tmp_path / "resnet18.pth")}
    stage = RegionStage((256,), (16,), 2, features={"name": "roi_align", "size": 14}, trunk=trunk)
    assert torch.equal(stage.trunk.layer4[1].conv2.weight, full.layer4[1].conv2.weight)  # type: ignore[union-attr]
    features = torch.randn(3, 256, 14, 14)
    expected = full.eval().avgpool(full.layer4(features)).flatten(1)
    torch.testing.assert_close(stage.eval().trunk(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backbone", "head", "proposals"), WHOLE)
def test_a_checkpoint_opens_without_the_weights_it_started_from(
    backbone: Any, head: Any, proposals: Any, tmp_path: Path
) -> None:
    """All weights are in the checkpoint; those that the head's own networks started from may be elsewhere."""
    weights = tmp_path / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), weights)
    regions = deepcopy(head["regions"])
    network = regions["features"]["backbone"] if head is WARP else regions["trunk"]
    network["weights"] = str(weights)
    model = build_model(experiment(backbone, {**head, "regions": regions}), CLASSES)
    model.save(tmp_path / "model.safetensors")
    weights.unlink()
    again = load_model(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_network_of_warped_regions_learns_as_a_backbone() -> None:
    """train.backbone_lr_factor is for weights that were trained before, and with `pixels` those are in the head."""
    model = build_model(experiment({"name": "pixels"}, WARP), CLASSES)
    groups = model.parameter_groups(1.0, 0.1, 0.0)
    slow = {id(parameter) for group in groups if group["lr"] == 0.1 for parameter in group["params"]}
    network = model.head.regions.features.backbone  # type: ignore[union-attr]
    assert {id(parameter) for parameter in network.parameters()} <= slow


@pytest.mark.parametrize("name", ["mlp", "conv_fc", "mean"])
def test_trunks_give_the_width_they_publish(name: str) -> None:
    stage = RegionStage((4,), (8,), 2, features={"name": "roi_align"}, trunk={"name": name})
    assert stage.trunk(torch.randn(5, 4, 7, 7)).shape == (5, stage.trunk.width)
    assert stage.trunk(torch.randn(0, 4, 7, 7)).shape == (0, stage.trunk.width)


def test_mean_equals_a_plain_mean() -> None:
    stage = RegionStage((4,), (8,), 2, features={"name": "roi_align"}, trunk={"name": "mean"})
    features = torch.randn(5, 4, 7, 7)
    torch.testing.assert_close(stage.trunk(features), features.flatten(2).sum(2) / 49)
    flat = RegionStage((4,), (8,), 2, features={"name": "spp"}, trunk={"name": "mean"})
    assert flat.trunk.width == 200
    assert torch.equal(flat.trunk(torch.ones(2, 200)), torch.ones(2, 200))


def test_dropout_is_off_outside_of_training() -> None:
    stage = build(trunk={"name": "mlp", "width": 16, "dropout": 0.5})
    features = torch.randn(5, 4, 2, 2)
    assert not torch.equal(stage.trunk(features), stage.trunk(features))
    stage.eval()
    assert torch.equal(stage.trunk(features), stage.trunk(features))
    assert isinstance(stage.trunk, nn.Module)
