import math

import pytest
import torch

from detkit.boxes import hard_negatives, sample_balanced
from detkit.structures import Match


def make_match(positives, negatives, ignored=0):
    kinds = torch.tensor([0] * positives + [1] * negatives + [2] * ignored, dtype=torch.int64)
    kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(9))]
    return Match(torch.zeros_like(kinds), kinds == 0, kinds == 2)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((500, 5000, 50), (128, 128)),
        ((10, 5000, 50), (10, 246)),  # empty places of positives go to negatives
        ((0, 5000, 0), (0, 256)),
        ((500, 20, 50), (128, 20)),  # those of negatives stay empty
        ((0, 0, 9), (0, 0)),
        ((0, 0, 0), (0, 0)),
    ],
)
def test_sample_counts_and_kinds(counts, expected):
    match = make_match(*counts)
    positives, negatives = sample_balanced(match, generator=torch.Generator().manual_seed(1))
    assert (len(positives), len(negatives)) == expected
    assert match.positive[positives].all()
    assert match.negative[negatives].all()
    assert len(positives.unique()) == len(positives)
    assert len(negatives.unique()) == len(negatives)


def test_sample_fraction_is_rounded_down_as_in_torchvision():
    positives, negatives = sample_balanced(make_match(50, 50), count=10, positive_fraction=0.25)
    assert (len(positives), len(negatives)) == (2, 8)


def test_sample_is_uniform_and_repeatable():
    match = make_match(40, 60)
    hits = torch.zeros(100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        for chosen in sample_balanced(match, 20, 0.5, generator):
            hits[chosen] += 1
    # each positive is expected 250 times, each negative 167 times; 6 standard deviations are 80
    assert (hits[match.positive] - 250).abs().max() < 80
    assert (hits[match.negative] - 1000 / 6).abs().max() < 80
    first, again = (sample_balanced(match, 20, 0.5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(again))
    torch.manual_seed(4)
    first = torch.cat(sample_balanced(match, 20))
    torch.manual_seed(4)
    assert torch.equal(first, torch.cat(sample_balanced(match, 20)))


def test_sample_refusals():
    with pytest.raises(ValueError, match="count must be >= 0"):
        sample_balanced(make_match(1, 1), count=-1)
    with pytest.raises(ValueError, match=r"positive_fraction in 0..1"):
        sample_balanced(make_match(1, 1), positive_fraction=1.5)


def random_batch(seed, batch=4, anchors=100):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(batch, anchors, generator=generator)
    kinds = torch.rand(batch, anchors, generator=generator)
    return losses, kinds < 0.1, (kinds > 0.1) & (kinds < 0.2)


def torchvision_negatives(losses, positive, ratio):
    """The lines of torchvision.models.detection.SSD.compute_loss."""
    num_negative = ratio * positive.sum(1, keepdim=True)
    negative_loss = losses.clone()
    negative_loss[positive] = -float("inf")
    _, idx = negative_loss.sort(1, descending=True)
    return idx.sort(1)[1] < num_negative


@pytest.mark.parametrize("ratio", [1.0, 2.5, 3.0])
def test_hard_negatives_equal_torchvision(ratio):
    for seed in range(20):
        losses, positive, _ = random_batch(seed)
        ours = hard_negatives(losses, positive, torch.zeros_like(positive), ratio)
        assert torch.equal(ours, torchvision_negatives(losses, positive, ratio))


def test_hard_negatives_equal_a_plain_loop():
    for seed in range(20):
        losses, positive, ignored = random_batch(seed)
        losses = (losses * 10).round()  # many ties
        positive[0] = False
        chosen = hard_negatives(losses, positive, ignored, ratio=2.0, minimum=7)
        for image in range(len(losses)):
            candidates = [a for a in range(100) if not positive[image, a] and not ignored[image, a]]
            candidates.sort(key=lambda a: -losses[image, a].item())
            wanted = max(2 * int(positive[image].sum()), 7)
            assert chosen[image].nonzero().flatten().tolist() == sorted(candidates[:wanted])


def test_hard_negatives_run_out():
    losses = torch.rand(1, 6)
    positive = torch.tensor([[True, True, True, True, False, False]])
    ignored = torch.tensor([[False, False, False, False, True, False]])
    assert hard_negatives(losses, positive, ignored).tolist() == [[False] * 5 + [True]]


def test_an_image_without_objects():
    losses = torch.tensor([[0.1, 0.9, 0.5]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert not hard_negatives(losses, none, none).any()
    assert hard_negatives(losses, none, none, minimum=2).tolist() == [[False, True, True]]
    assert hard_negatives(torch.zeros(2, 0), torch.zeros(2, 0) > 0, torch.zeros(2, 0) > 0).shape == (2, 0)


def test_nan_is_chosen_first_and_infinity_next():
    losses = torch.tensor([[5.0, math.nan, 7, math.inf, 1]])
    positive = torch.tensor([[False, False, False, False, True]])
    ignored = torch.zeros_like(positive)
    assert hard_negatives(losses, positive, ignored, ratio=1.0).tolist() == [[False, True, False, False, False]]
    assert hard_negatives(losses, positive, ignored, ratio=2.0).tolist() == [[False, True, False, True, False]]


def test_hard_negatives_carry_no_gradient_and_check_shapes():
    losses, positive, ignored = random_batch(1)
    losses.requires_grad_()
    assert not hard_negatives(losses, positive, ignored).requires_grad
    with pytest.raises(ValueError, match=r"one \(B, A\)"):
        hard_negatives(losses, positive[:1], ignored)
