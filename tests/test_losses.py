"""Losses against torchvision's."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from detkit.losses import sigmoid_focal_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 1.0), (0.0, 5.0), (1.0, 1.5)])
@pytest.mark.parametrize("seed", range(5))
def test_focal_loss_and_its_gradient_equal_torchvisions(seed: int, alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 50, 7, dtype=torch.float64, generator=generator)
    truth = torch.rand(3, 50, 7, generator=generator) < 0.2
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = sigmoid_focal_loss(mine, truth, alpha, gamma)
    expected = torchvision_focal_loss(theirs, truth.double(), alpha, gamma)
    assert (expected > 0).sum() > 100
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, truth = 3 * torch.randn(200), torch.rand(200) < 0.5
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
    torch.testing.assert_close(sigmoid_focal_loss(logits, truth, alpha=0.5, gamma=0.0), expected)


def test_focal_loss_counts_the_easy_little() -> None:
    """The example of the docstring."""
    logits = torch.tensor([0.9, 0.5]).logit()
    truth = torch.tensor([True, True])
    share = sigmoid_focal_loss(logits, truth, 1.0, 2.0) / sigmoid_focal_loss(logits, truth, 1.0, 0.0)
    torch.testing.assert_close(share, torch.tensor([0.01, 0.25]))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_focal_loss_of_extreme_logits_is_finite_with_its_gradient(gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4] * 2, requires_grad=True)
    truth = torch.arange(10) < 5
    loss = sigmoid_focal_loss(logits, truth, gamma=gamma)
    loss.sum().backward()
    loss = loss.detach()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(loss[0]) == pytest.approx(0.25 * 1e4)  # wrong beyond doubt counts in full
    assert float(loss[-1]) == pytest.approx(0.75 * 1e4)
    assert loss[4] == loss[5] == 0
    assert sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


@pytest.mark.parametrize("truth", [torch.zeros(3, dtype=torch.bool), torch.zeros(4)])
def test_focal_loss_refuses_another_truth(truth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"truth must be \(4,\) bool, but got"):
        sigmoid_focal_loss(torch.zeros(4), truth)
