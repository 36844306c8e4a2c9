"""RetinaNet's own arithmetic, and that it learns."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, sigmoid_focal_loss
from torchvision.ops import nms as torchvision_nms

from detkit.boxes import decode, encode
from detkit.boxes.convert import clip
from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.errors import ConfigError, DetkitError
from detkit.heads.retinanet import RetinaNet, RetinaNetOutputs
from detkit.model import build_model
from detkit.registry import heads
from detkit.structures import Inputs, Target

ONES = (1.0, 1.0, 1.0, 1.0)
SIZE = (48, 64)


def head(**options: Any) -> RetinaNet:
    options = {"channels": (8, 8), "strides": (8, 16), "num_classes": 3, **options}
    return heads.build({"name": "retinanet", **options}, "head")


def random_outputs(head: RetinaNet, images: int = 2, deviation: float = 1.0, seed: int = 0) -> RetinaNetOutputs:
    """As of a network, on real anchors, with logits around -2."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.zeros(images, 8, SIZE[0] // stride, SIZE[1] // stride) for stride in head.strides]
    outputs = head(features, Inputs(SIZE, (SIZE,) * images))
    return outputs._replace(
        logits=deviation * torch.randn(outputs.logits.shape, generator=generator) - 2,
        offsets=0.3 * torch.randn(outputs.offsets.shape, generator=generator),
    )


def test_default_anchors_are_the_papers() -> None:
    """Three sizes an octave and three ratios, areas from 32^2 on P3 (Lin et al. 2017, section 4)."""
    outputs = random_outputs(head())
    assert outputs.level_counts == (6 * 8 * 9, 3 * 4 * 9)
    sides = outputs.anchors[:, 2:] - outputs.anchors[:, :2]
    for start, smallest in ((0, 32), (6 * 8 * 9, 64)):
        expected = torch.tensor([smallest * 2 ** (third / 3) for third in range(3)] * 3)
        torch.testing.assert_close(sides[start : start + 9].prod(1).sqrt(), expected, rtol=0.04, atol=0)
        ratios = sides[start : start + 9, 1] / sides[start : start + 9, 0]
        torch.testing.assert_close(ratios, torch.tensor([0.5, 1, 2]).repeat_interleave(3), rtol=0.08, atol=0)


def test_an_untrained_network_gives_every_anchor_its_prior() -> None:
    torch.manual_seed(0)
    network = head(prior=0.02)
    features = [torch.randn(1, 8, 6, 8), torch.randn(1, 8, 3, 4)]
    outputs = network(features, Inputs(SIZE, (SIZE,)))
    torch.testing.assert_close(outputs.logits.sigmoid(), torch.full_like(outputs.logits, 0.02), rtol=0.05, atol=0)


def test_levels_share_their_layers_and_a_location_moves_its_own_anchors() -> None:
    torch.manual_seed(0)
    network = head(depth=2)
    feature = torch.randn(1, 8, 3, 4)
    first, second = (network([other, feature], Inputs(SIZE, (SIZE,))) for other in (feature, torch.zeros(1, 8, 6, 8)))
    count = 3 * 4 * 9
    assert torch.equal(first.logits[:, :count], first.logits[:, count:])
    assert torch.equal(first.offsets[:, count:], second.offsets[:, -count:])

    network = head(depth=0)
    nn.init.zeros_(network.box_predictor.weight)
    network.box_predictor.weight.data[:, :, 1, 1] = 1.0
    features = [torch.zeros(1, 8, 6, 8), torch.zeros(1, 8, 3, 4)]
    features[1][0, :, 1, 2] = 1.0
    outputs = network(features, Inputs(SIZE, (SIZE,)))
    moved = outputs.offsets[0].abs().sum(1).nonzero().flatten()
    assert moved.tolist() == list(range(432 + (1 * 4 + 2) * 9, 432 + (1 * 4 + 3) * 9))
    centres = (outputs.anchors[moved, :2] + outputs.anchors[moved, 2:]) / 2
    torch.testing.assert_close(centres, torch.tensor([[2.0 * 16, 1.0 * 16]]).expand_as(centres))


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_a_plain_loop(seed: int) -> None:
    network = head(alpha=0.3, gamma=1.5, box_weight=2.0, box_loss="smooth_l1")
    outputs = random_outputs(network, images=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(4, 2, generator=generator) * torch.tensor([30.0, 20])
    boxes = torch.cat((corners, corners + 8 + 25 * torch.rand(4, 2, generator=generator)), 1)
    labels = torch.tensor([2, 0, 1, 1])
    targets = (Target(boxes, labels), Target.empty(), Target(boxes[:1], labels[:1]))
    box_sum = 0.0
    object_sums, background_sums, negatives = ([0.0] * 3 for _ in range(3))
    positives = between = 0
    for image, target in enumerate(targets):
        overlap = box_iou(outputs.anchors, target.boxes) if len(target) else torch.zeros(len(outputs.anchors), 1)
        best = {int(index) for truth in overlap.T for index in (truth == truth.max()).nonzero() if truth.max() > 0}
        for index in range(len(outputs.anchors)):
            value, truth = overlap[index].max(0)
            positive = bool(value >= 0.5) or index in best
            if not positive and value >= 0.4:
                between += 1
                continue
            wanted = torch.zeros(3)
            if positive:
                positives += 1
                wanted[target.labels[truth]] = 1
                offsets = encode(target.boxes[truth][None], outputs.anchors[index][None], deviations=ONES)[0]
                mine = outputs.offsets[image, index]
                box_sum += float(F.smooth_l1_loss(mine, offsets, reduction="sum", beta=1 / 9))
            sums = object_sums if positive else background_sums
            sums[image] += float(sigmoid_focal_loss(outputs.logits[image, index], wanted, 0.3, 1.5, "sum"))
            negatives[image] += not positive
    assert positives > 10
    assert between > 0
    losses = network.loss(outputs, targets)
    # The second image has no object: together its negatives and those of the others count as much as the others' alone.
    class_sum = sum(object_sums) + sum(background_sums) * (negatives[0] + negatives[2]) / sum(negatives)
    assert float(losses["class"]) == pytest.approx(class_sum / positives, rel=1e-4)
    assert float(losses["box"]) == pytest.approx(2 * box_sum / positives, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_decoding_equals_a_plain_loop(seed: int) -> None:
    """The best of each level among all its classes, then suppression by class over all levels."""
    network = head(candidates=60, max_detections=50, score_threshold=0.1)
    outputs = random_outputs(network, images=2, seed=seed)._replace(sizes=(SIZE, (40, 50)))
    for image, found in enumerate(network.decode(outputs)):
        rows, labels, scores = [], [], []
        start = 0
        for count in outputs.level_counts:
            level = outputs.logits[image, start : start + count].sigmoid()
            pairs = [(float(level[a, c]), start + a, c) for a in range(count) for c in range(3) if level[a, c] > 0.1]
            best = sorted(pairs, reverse=True)[:60]
            assert len(best) == 60 < len(pairs)
            scores += [score for score, _, _ in best]
            rows += [row for _, row, _ in best]
            labels += [label for _, _, label in best]
            start += count
        boxes = clip(decode(outputs.offsets[image, rows], outputs.anchors[rows], deviations=ONES), outputs.sizes[image])
        kept = torch.cat(
            [
                of_class[torchvision_nms(boxes[of_class], torch.tensor(scores)[of_class], 0.5)]
                for label in range(3)
                for of_class in [(torch.tensor(labels) == label).nonzero().flatten()]
            ]
        )
        kept = kept[torch.tensor(scores)[kept].argsort(descending=True)][:50]
        torch.testing.assert_close(found.scores, torch.tensor(scores)[kept])
        torch.testing.assert_close(found.boxes, boxes[kept])
        assert torch.equal(found.labels, torch.tensor(labels)[kept])


def test_nothing_above_the_threshold_is_no_detection() -> None:
    network = head()
    outputs = random_outputs(network)
    quiet = outputs._replace(logits=torch.full_like(outputs.logits, -10))
    assert [len(found) for found in network.decode(quiet)] == [0, 0]
    broken = outputs._replace(logits=torch.full_like(outputs.logits, math.nan))
    with pytest.raises(DetkitError, match="scores are NaN"):
        network.decode(broken)


def test_group_norm_has_groups_of_eight_channels() -> None:
    norms = [
        module for module in head(channels=(64, 64), norm=True, depth=3).modules() if isinstance(module, nn.GroupNorm)
    ]
    assert [norm.num_groups for norm in norms] == [8] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8, 16)}, r"same number of channels, but they have \[8, 16\]. Add a neck"),
        ({"strides": (8, 0)}, "no default anchors for a map pooled"),
        (
            {"channels": (12, 12), "norm": True},
            r"'head\.norm' uses groups of 8 channels, but the maps have 12 channels",
        ),
        (
            {"anchors": {"name": "pyramid", "sizes": [[16.0], [32.0, 40.0]]}},
            "same number of anchors per location",
        ),
        ({"depth": -1}, r"'head\.depth' must be at least 0"),
        ({"alpha": 1.5}, r"'head\.alpha' must be in 0\.\.1"),
        ({"gamma": -1.0}, r"'head\.gamma' must be at least 0"),
        ({"prior": 0.0}, r"'head\.prior' must be in 1e-06\.\.0\.5"),
        ({"foreground_from": 0.3}, r"'head\.background_below' must not be above"),
        ({"candidates": 0}, "must be at least 1"),
        ({"gama": 2.0}, "Did you mean 'gamma'"),
        ({"box_loss": "l3"}, r"'head\.box_loss'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    injected = {"channels": (8, 8), "strides": (8, 16), "num_classes": 3}
    injected = {key: options.pop(key, value) for key, value in injected.items()}
    with pytest.raises(ConfigError, match=message):
        heads.build({"name": "retinanet", **options}, "head", **injected)


@pytest.mark.slow
def test_overfits_eight_images(tiny: Any) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    experiment = tiny(
        *("--backbone", "{name: resnet18, levels: [2, 3, 4]}"),
        *("--neck", "{name: fpn, width: 64, norm: true}"),
        *("--head", "{name: retinanet, depth: 2, norm: true}"),
        *("--input.size", "[96, 96]"),
    )
    torch.manual_seed(0)
    model = build_model(experiment, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    fitted = [model.fit(dataset[index]) for index in range(8)]
    images = torch.stack([image.image for image in fitted])
    targets = tuple(image.target for image in fitted)
    for _ in range(200):
        losses = model.train().head.loss(model(images, ((96, 96),) * 8), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert evaluate(model, dataset, batch_size=8, workers=0).scores.coco["mAP50"] > 0.95
