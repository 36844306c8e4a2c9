"""Losses against torchvision's."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from detkit.heads.parts.losses import sigmoid_focal_loss, weigh_background, weigh_empty_images


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 1.0), (0.0, 5.0), (1.0, 1.5)])
@pytest.mark.parametrize("seed", range(5))
def test_focal_loss_and_its_gradient_equal_torchvisions(seed: int, alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 50, 7, dtype=torch.float64, generator=generator)
    target = torch.rand(3, 50, 7, generator=generator) < 0.2
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = sigmoid_focal_loss(mine, target, alpha, gamma)
    expected = torchvision_focal_loss(theirs, target.double(), alpha, gamma)
    assert (expected > 0).sum() > 100
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(200), torch.rand(200) < 0.5
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, alpha=0.5, gamma=0.0), expected)


def test_focal_loss_counts_the_easy_little() -> None:
    """The example of the docstring."""
    logits = torch.tensor([0.9, 0.5]).logit()
    target = torch.tensor([True, True])
    share = sigmoid_focal_loss(logits, target, 1.0, 2.0) / sigmoid_focal_loss(logits, target, 1.0, 0.0)
    torch.testing.assert_close(share, torch.tensor([0.01, 0.25]))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_focal_loss_of_extreme_logits_is_finite_with_its_gradient(gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4] * 2, requires_grad=True)
    target = torch.arange(10) < 5
    loss = sigmoid_focal_loss(logits, target, gamma=gamma)
    loss.sum().backward()
    loss = loss.detach()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(loss[0]) == pytest.approx(0.25 * 1e4)  # wrong beyond doubt counts in full
    assert float(loss[-1]) == pytest.approx(0.75 * 1e4)
    assert loss[4] == loss[5] == 0
    assert sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def of_images(*counts: int, width: int = 40) -> torch.Tensor:
    """(B, width) bool, so many true in each image."""
    return torch.arange(width) < torch.tensor(counts)[:, None]


def test_background_counts_as_much_as_that_of_images_with_objects() -> None:
    """The example of the docstring; positives and what is ignored stay as they are."""
    positive, negative = of_images(10, *[0] * 15), of_images(30, *[8] * 15).flip(1)
    losses = 1 + torch.rand(16, 40, generator=torch.Generator().manual_seed(0))
    losses.requires_grad_()
    weighed = weigh_background(losses, positive, negative)
    torch.testing.assert_close(weighed[negative], 0.2 * losses[negative])
    assert torch.equal(weighed[~negative], losses[~negative])
    weighed.sum().backward()
    torch.testing.assert_close(losses.grad, torch.where(negative, 0.2, 1.0))


@pytest.mark.parametrize("images", [1, 2, 16])
def test_background_beside_objects_is_the_same_to_the_bit(images: int) -> None:
    losses = torch.rand(images, 40, generator=torch.Generator().manual_seed(0))
    for negatives in (0, 1, 7, 39):
        positive, negative = of_images(*[1] * images), of_images(*range(negatives, negatives + images)) & ~of_images(1)
        assert torch.equal(weigh_background(losses, positive, negative), losses)


@pytest.mark.parametrize(
    ("images", "loss", "total"), [(1, 0.01, 0.08), (16, 0.01, 0.08), (16, 50.0, 1.0), (1, 9.0, 1.0)]
)
def test_background_alone_counts_as_one_image_and_one_at_most(images: int, loss: float, total: float) -> None:
    negative = of_images(*[8] * images)
    weighed = weigh_background(torch.full((images, 40), loss), of_images(*[0] * images), negative)
    assert float(weighed[negative].sum()) == pytest.approx(total)


def test_background_is_learned_where_all_anchors_of_the_objects_are_positive() -> None:
    positive, negative = of_images(40, 0, 0), of_images(0, 8, 8)
    weighed = weigh_background(torch.ones(3, 40), positive, negative)
    assert float(weighed[negative].sum()) == pytest.approx(1)
    assert torch.equal(weigh_background(torch.ones(3, 40), positive, of_images(0, 0, 0)), torch.ones(3, 40))


def test_background_that_is_nan_stays_so() -> None:
    """For training stops at it; NaN in what does not count changes nothing."""
    losses = torch.ones(2, 40)
    losses[1, 0] = float("nan")
    assert weigh_background(losses, of_images(0, 0), of_images(8, 8))[1, 0].isnan()
    assert weigh_background(losses, of_images(0, 0), of_images(8, 0))[0, :8].sum() == pytest.approx(1)


@pytest.mark.parametrize("target", [torch.zeros(3, dtype=torch.bool), torch.zeros(4)])
def test_focal_loss_refuses_another_target(target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"target must be \(4,\) bool, but got"):
        sigmoid_focal_loss(torch.zeros(4), target)


def test_images_without_a_positive_count_as_one_negative_in_all() -> None:
    losses = torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
    positive, negative = of_images(2, 0, 0, 0), of_images(30, 8, 8, 0)
    weighed = weigh_empty_images(losses, positive, negative)
    assert torch.equal(weighed[0], losses[0])
    expected = sum(losses[image][negative[image]].mean() for image in (1, 2)) / 4
    torch.testing.assert_close(weighed[1:][negative[1:]].sum(), expected)
    everywhere = of_images(1, 1, 1, 1)
    assert torch.equal(weigh_empty_images(losses, everywhere, negative), losses)
