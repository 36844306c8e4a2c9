"""The localisation head's own arithmetic, and that it learns."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detkit.data.formats.shapes import Shapes
from detkit.errors import ConfigError, DetkitError
from detkit.model import build_model
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.localization.localize import Localize, LocalizeOutputs

SIZES = ((64, 96), (40, 60), (64, 96), (64, 80), (64, 96))
BOXES = torch.tensor([[10.0, 10, 20, 20], [20, 10, 50, 34], [0, 0, 40, 40]])
LABELS = torch.tensor([0, 2, 1])


def outputs(seed: int = 0) -> LocalizeOutputs:
    generator = torch.Generator().manual_seed(seed)
    return LocalizeOutputs(
        torch.randn(5, generator=generator), torch.randn(5, 3, generator=generator),
        torch.rand(5, 4, generator=generator), SIZES,
    )  # fmt: skip


def targets() -> tuple[Target, ...]:
    """The largest is the second, the third being a crowd; none; the last; nothing but ignored; the first of equals."""
    return (
        Target(BOXES, LABELS, crowd=torch.tensor([False, False, True])),
        Target.empty(),
        Target(BOXES, LABELS),
        Target(BOXES[:1], LABELS[:1], difficult=torch.tensor([True])),
        Target(BOXES[[1, 1, 0]], torch.tensor([1, 2, 0])),
    )


@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_a_plain_loop(seed: int, kind: Any) -> None:
    raw = outputs(seed)
    truths = {0: (20, 10, 50, 34, 2), 2: (0, 0, 40, 40, 1), 4: (20, 10, 50, 34, 1)}
    presence = classes = boxes = 0.0
    for image, (height, width) in enumerate(SIZES):
        if image == 3:
            continue
        chance = float(raw.presence[image].sigmoid())
        presence -= float(torch.tensor(chance if image in truths else 1 - chance).log())
        if image not in truths:
            continue
        left, top, right, bottom, label = truths[image]
        classes -= float(raw.logits[image].log_softmax(0)[label])
        centre = torch.tensor([(left + right) / 2 / width, (top + bottom) / 2 / height])
        wanted = torch.cat((centre, torch.tensor([(right - left) / width, (bottom - top) / height])))
        difference = raw.boxes[image] - wanted
        boxes += float(
            difference.square().sum() if kind == "l2"
            else F.smooth_l1_loss(raw.boxes[image], wanted, reduction="sum", beta=1 / 9)
        )  # fmt: skip
    head = Localize((4,), (16,), 3, box_loss=kind, box_weight=2.0)
    losses = head.loss(raw, targets())
    assert float(losses["presence"]) == pytest.approx(presence / 4, rel=1e-5)
    assert float(losses["class"]) == pytest.approx(classes / 3, rel=1e-5)
    assert float(losses["box"]) == pytest.approx(2 * boxes / 3, rel=1e-5)


def test_images_without_an_object_teach_presence_alone() -> None:
    raw = outputs()
    for tensor in raw[:3]:
        tensor.requires_grad_()
    head = Localize((4,), (16,), 3)
    losses = head.loss(raw, (Target.empty(),) * 5)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert losses["class"] == losses["box"] == 0
    assert raw.presence.grad is not None
    assert (raw.presence.grad > 0).all()
    for tensor in (raw.logits, raw.boxes):
        assert tensor.grad is None or not tensor.grad.any()


def test_the_target_decodes_to_itself() -> None:
    height, width = SIZES[1]
    box = torch.tensor([35 / width, 22 / height, 30 / width, 24 / height])
    raw = LocalizeOutputs(torch.tensor([3.0]), torch.tensor([[0.0, 5.0, 1.0]]), box[None], SIZES[1:2])
    (found,) = Localize((4,), (16,), 3).decode(raw)
    torch.testing.assert_close(found.boxes, torch.tensor([[20.0, 10, 50, 34]]))
    expected = torch.tensor(3.0).sigmoid() * torch.tensor([0.0, 5, 1]).softmax(0)[1]
    torch.testing.assert_close(found.scores, expected[None])
    assert found.labels.tolist() == [1]


def test_one_detection_or_none_inside_the_image() -> None:
    head = Localize((4,), (16,), 3, score_threshold=0.3)
    presence = torch.tensor([5.0, -5, 5, 5, 0])
    logits = torch.tensor([[9.0, 0, 0]] * 4 + [[0.0, 0, 0]])
    boxes = torch.tensor([[0.9, 0.9, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1], [0.5, 0.5, -0.3, 0.4], [7, 7, 1, 1], [0.5] * 4])
    found = head.decode(LocalizeOutputs(presence, logits, boxes, SIZES))
    assert [len(detections) for detections in found] == [1, 0, 1, 1, 0]
    torch.testing.assert_close(found[0].boxes, torch.tensor([[96 * 0.65, 64 * 0.65, 96, 64]]))
    torch.testing.assert_close(found[2].boxes, torch.tensor([[48, 64 * 0.3, 48, 64 * 0.7]]))  # a negative width is none
    torch.testing.assert_close(found[3].boxes, torch.tensor([[80.0, 64, 80, 64]]))
    with pytest.raises(DetkitError, match="scores are NaN"):
        head.decode(LocalizeOutputs(presence * torch.nan, logits, boxes, SIZES))


def test_padding_and_its_batch_change_nothing() -> None:
    """An image of 40 x 60 pixels alone, and in a batch of 64 x 96: of its map the cells count that it reaches into."""
    torch.manual_seed(0)
    head = Localize((4, 8), (8, 16), 3)
    inside = torch.randn(1, 8, 3, 4)
    whole = torch.full((2, 8, 4, 6), 100.0)
    whole[:1, :, :3, :4] = inside
    alone = head([torch.zeros(1, 4, 5, 8), inside], Inputs((40, 60), ((40, 60),)))
    together = head([torch.zeros(2, 4, 8, 12), whole], Inputs((64, 96), ((40, 60), (64, 96))))
    for mine, theirs in zip(alone[:3], together[:3]):
        torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(
        torch.cat((together.presence[1:], together.logits[1], together.boxes[1])), head.predictor(whole[1].mean((1, 2)))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_weight": -1.0}, r"'head\.box_weight' must be at least 0"),
        ({"box_loss": "giou"}, r"'head\.box_loss'"),
        ({"score_threshold": 2.0}, "score threshold must lie in 0..1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heads.build({"name": "localize", **options}, "head", channels=(8,), strides=(16,), num_classes=3)


def test_learns_six_images_by_heart(tiny: Any) -> None:
    dataset = Shapes("train", train_count=6, size=64, max_objects=1)
    experiment = tiny(
        "--backbone", "{name: small_ssd, widths: [8, 16], level_channels: 32}", "--head", "{name: localize}"
    )
    torch.manual_seed(0)
    model = build_model(experiment, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    fitted = [model.fit(dataset[index]) for index in range(6)]
    images = torch.stack([image.image for image in fitted])
    targets = tuple(image.target for image in fitted)
    for _ in range(120):
        losses = model.train().head.loss(model(images, ((64, 64),) * 6), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert sum(losses.values()) < 0.05  # type: ignore[operator]
    for found, target in zip(model.head.decode(model(images, ((64, 64),) * 6)), targets):
        assert found.labels.tolist() == target.labels.tolist()
        assert (found.boxes - target.boxes).abs().max() < 6
