"""The SSD head's own arithmetic, and that it learns."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detkit.boxes import encode, match_bipartite
from detkit.boxes.anchors import per_pixel_anchors
from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.heads.parts.anchor_layouts import PerPixel
from detkit.heads.parts.losses import box_loss
from detkit.heads.ssd import SSD, SSDOutputs
from detkit.model import build_model
from detkit.structures import Inputs, Target


def test_small_ssd_has_the_anchors_and_outputs_of_its_source(tiny: Any) -> None:
    """Dive into Deep Learning, 14.7: 256 px give five maps of 32, 16, 8, 4 and 1, and 5,444 anchors."""
    experiment = tiny(
        "--head.anchors", "{name: per_pixel}", "--head.matching", "bipartite", "--input.size", "[256,256]"
    )
    from detkit.structures import ClassList

    model = build_model(experiment, ClassList.from_names(["banana"])).eval()
    outputs = model(torch.zeros(2, 3, 256, 256), ((256, 256),) * 2)
    assert outputs.anchors.shape == (5444, 4)
    assert outputs.logits.shape == (2, 5444, 2)
    assert outputs.offsets.shape == (2, 5444, 4)


def test_loss_equals_a_plain_loop() -> None:
    """Bipartite matching, cross-entropy of all anchors and L1 of the masked offsets, as the source writes them."""
    torch.manual_seed(0)
    anchors = per_pixel_anchors((4, 4), (64, 64), (0.3, 0.5), (1.0, 2.0, 0.5))
    boxes = torch.tensor([[3.0, 5, 30, 40], [30, 20, 60, 60]])
    labels = torch.tensor([1, 0])
    logits, offsets = torch.randn(1, len(anchors), 3), torch.randn(1, len(anchors), 4)
    head = SSD((8,), (16,), 2, matching="bipartite", negatives_per_positive=None, box_loss="l1")
    mine = head.loss(SSDOutputs(logits, offsets, anchors, ((64, 64),)), (Target(boxes, labels),))
    match = match_bipartite(anchors, boxes)
    class_loss = box_sum = 0.0
    positives = 0
    for index, anchor in enumerate(anchors):
        target = int(match.target_index[index])
        positive = bool(match.positive[index])
        label = int(labels[target]) + 1 if positive else 0
        class_loss += float(F.cross_entropy(logits[0, index][None], torch.tensor([label])))
        if positive:
            positives += 1
            wanted = encode(boxes[target][None], anchor[None])[0]
            box_sum += float((offsets[0, index] - wanted).abs().sum())
    assert positives >= 2
    assert float(mine["class"]) == pytest.approx(class_loss / positives, rel=1e-5)
    assert float(mine["box"]) == pytest.approx(box_sum / positives, rel=1e-5)


def test_layouts_put_all_anchors_of_a_location_together() -> None:
    """Channel order of the predictors and order of the anchors must agree: move one location's output, see its box."""
    head = SSD((4,), (16,), 2, anchors={"name": "per_pixel", "sizes": [[0.3, 0.5]]})
    features = [torch.zeros(1, 4, 3, 5)]
    features[0][0, :, 1, 2] = 1.0
    for predictor in head.box_predictors:
        torch.nn.init.zeros_(predictor.weight)
        predictor.weight.data[:, :, 1, 1] = 1.0
    outputs = head(features, Inputs((48, 80), ((48, 80),)))
    moved = outputs.offsets[0].abs().sum(1) > 0
    per_location = PerPixel(((0.3, 0.5),)).per_location(1)[0]
    location = 1 * 5 + 2
    expected = torch.zeros(3 * 5 * per_location, dtype=torch.bool)
    expected[location * per_location : (location + 1) * per_location] = True
    assert torch.equal(moved, expected)
    centres = (outputs.anchors[moved][:, :2] + outputs.anchors[moved][:, 2:]) / 2
    torch.testing.assert_close(centres, torch.tensor([[2.5 * 16, 1.5 * 16]]).expand_as(centres))


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_box_losses_are_zero_at_the_target_and_for_none(kind: Any) -> None:
    anchors = torch.tensor([[0.0, 0, 20, 30], [10, 10, 50, 40]])
    target = encode(torch.tensor([[2.0, 3, 25, 30], [12, 8, 44, 44]]), anchors)
    assert box_loss(target, anchors, target, kind).item() == pytest.approx(0, abs=1e-5)
    assert box_loss(target + 1, anchors, target, kind).item() > 0.05
    assert box_loss(target[:0], anchors[:0], target[:0], kind).item() == 0


@pytest.mark.slow
def test_overfits_eight_images(tiny: Any) -> None:
    dataset = Shapes("train", train_count=8, size=96)
    experiment = tiny("--backbone", "{name: small_ssd}", "--input.size", "[96, 96]")
    torch.manual_seed(0)
    model = build_model(experiment, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    fitted = [model.fit(dataset[index]) for index in range(8)]
    images = torch.stack([image for image, *_ in fitted])
    for _ in range(250):
        losses = model.train().head.loss(model(images, ((96, 96),) * 8), tuple(target for _, _, target, _ in fitted))
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert evaluate(model, dataset, batch_size=8, workers=0).scores.coco["mAP50"] > 0.95
