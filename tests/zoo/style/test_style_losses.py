"""The losses of style transfer: values worked out by hand, plain loops, and their gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from detkit.heads.parts.losses import gram_matrix, style_loss, total_variation


def test_gram_matrix_of_two_channels_by_hand() -> None:
    """Channels (1, 2) and (3, 4) of a 1x2 map: products 5, 11 and 25, over c·h·w = 4."""
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    torch.testing.assert_close(gram_matrix(features), torch.tensor([[[1.25, 2.75], [2.75, 6.25]]]))


def test_style_loss_by_hand() -> None:
    """Against zero the mean square of the four values above: (1.5625 + 2 · 7.5625 + 39.0625) / 4."""
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    torch.testing.assert_close(style_loss(features, torch.zeros(1, 2, 2)), torch.tensor(13.9375))
    assert style_loss(features, gram_matrix(features)) == 0


def test_total_variation_by_hand() -> None:
    """Down differ 2 and 3 (mean 2.5), to the right 1 and 2 (mean 1.5)."""
    image = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    torch.testing.assert_close(total_variation(image), torch.tensor((2.5 + 1.5) / 2))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 1, 4), (2, 3, 4, 1)])
def test_total_variation_along_a_side_of_one_pixel_is_0(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    expected = sum(
        float((images.diff(dim=side).abs()).mean()) / 2 for side in (2, 3) if shape[side] > 1
    )  # fmt: skip
    assert float(total_variation(images)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    gram = gram_matrix(features)
    for image in range(2):
        for a in range(3):
            for b in range(3):
                products = [
                    float(features[image, a, y, x] * features[image, b, y, x]) for y in range(4) for x in range(5)
                ]
                assert float(gram[image, a, b]) == pytest.approx(sum(products) / (3 * 4 * 5))
    other = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    assert float(style_loss(features, other)) == pytest.approx(float(((gram - other) ** 2).sum()) / 18)
    down = [
        abs(float(features[i, c, y, x] - features[i, c, y + 1, x]))
        for i in range(2) for c in range(3) for y in range(3) for x in range(5)
    ]  # fmt: skip
    right = [
        abs(float(features[i, c, y, x] - features[i, c, y, x + 1]))
        for i in range(2) for c in range(3) for y in range(4) for x in range(4)
    ]  # fmt: skip
    expected = (sum(down) / len(down) + sum(right) / len(right)) / 2
    assert float(total_variation(features)) == pytest.approx(expected)


def test_gradients_are_right() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gram = torch.randn(1, 3, 3, dtype=torch.float64)
    assert gradcheck(gram_matrix, features)
    assert gradcheck(lambda maps: style_loss(maps, gram), features)
    assert gradcheck(total_variation, features)


def test_style_says_nothing_of_where() -> None:
    """Pixels in another order have the same Gram matrix, an image twice as large of the same pixels too."""
    features = torch.randn(1, 4, 6, 6)
    shuffled = features.flatten(2)[:, :, torch.randperm(36)].view_as(features)
    torch.testing.assert_close(gram_matrix(shuffled), gram_matrix(features))
    torch.testing.assert_close(gram_matrix(features.repeat(1, 1, 2, 1)), gram_matrix(features))
