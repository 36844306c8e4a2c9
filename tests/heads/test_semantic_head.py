"""What all heads that name the class of every pixel share: their loss and their labels."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detkit.errors import ConfigError, DetkitError
from detkit.heads.parts.semantic import SemanticOutputs, labels_of, pixel_loss
from detkit.registry import heads
from detkit.structures import IGNORED_PIXEL, Target


def target_of(labels: torch.Tensor) -> Target:
    return replace(Target.empty(), semantic=labels.to(torch.uint8))


def fcn(**options: object) -> torch.nn.Module:
    return heads.build({"name": "fcn", **options}, "head", channels=(4,), strides=(8,), num_classes=3)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 0.0]])
def test_the_loss_is_the_weighted_mean_over_pixels_that_count(seed: int, weights: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, 7, 5, generator=generator)
    target = torch.randint(0, 3, (2, 7, 5), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORED_PIXEL
    weight = None if weights is None else torch.tensor(weights)
    logits.requires_grad_()
    found = pixel_loss(logits, target, weight)
    expected = F.cross_entropy(logits, target, weight, ignore_index=IGNORED_PIXEL)
    torch.testing.assert_close(found, expected)
    total, count = 0.0, 0.0
    for logit, label in zip(logits.movedim(1, -1).reshape(-1, 3).tolist(), target.flatten().tolist()):
        if label != IGNORED_PIXEL:
            one = 1.0 if weights is None else weights[label]
            total += one * (math.log(sum(map(math.exp, logit))) - logit[label])
            count += one
    assert found.item() == pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_a_pixel_that_counts_costs_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 4, 4), IGNORED_PIXEL))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()  # type: ignore[union-attr]
    assert pixel_loss(logits, torch.zeros(1, 4, 4).long(), torch.tensor([0.0, 1, 1])) == 0


def test_the_padding_of_a_batch_counts_neither_in_the_loss_nor_in_the_labels() -> None:
    head = fcn()
    logits = torch.randn(2, 3, 16, 24)
    sizes = ((16, 24), (9, 13))
    targets = (torch.randint(0, 3, (16, 24)), torch.randint(0, 3, (9, 13)))
    outputs = SemanticOutputs(logits, sizes)
    whole = head.loss(outputs, tuple(target_of(target) for target in targets))["pixel"]
    # a ground truth as large as the padded batch, with classes in the padding
    larger = torch.randint(0, 3, (16, 24))
    larger[:9, :13] = targets[1]
    assert head.loss(outputs, (target_of(targets[0]), target_of(larger)))["pixel"] == whole
    rows = torch.cat([logits[0].flatten(1), logits[1, :, :9, :13].flatten(1)], dim=1)
    torch.testing.assert_close(whole, F.cross_entropy(rows.T, torch.cat([target.flatten() for target in targets])))
    found = head.decode(outputs)
    assert [tuple(item.labels.shape) for item in found] == list(sizes)
    assert torch.equal(found[1].labels.long(), logits[1, :, :9, :13].argmax(0))


def test_broken_weights_of_a_network_are_told() -> None:
    logits = torch.zeros(3, 4, 4)
    logits[1, 2, 3] = math.nan
    with pytest.raises(DetkitError, match="logits are NaN"):
        labels_of(logits)
    assert labels_of(torch.full((2, 1, 1), math.inf)).item() == 0  # too large is no NaN


def test_weights_of_classes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"must be 3 non-negative numbers.*\[1\.0, 2\.0\]"):
        fcn(class_weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="must be 3 non-negative numbers"):
        fcn(class_weights=[1.0, 2.0, -1.0])
    with pytest.raises(ConfigError, match="1 to 255 classes, but the data has 300"):
        heads.build({"name": "fcn"}, "head", channels=(4,), strides=(8,), num_classes=300)
