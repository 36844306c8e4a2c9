"""RoI align on the CPU against torchvision's, cells and gradients."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torchvision import ops

from detkit.boxes.roi_align import roi_align

CASES = list(product((0, 1, 2, 3), (False, True), (0.125, 1.0)))


def random_rows(generator: torch.Generator, images: int, count: int) -> Tensor:
    """Of sides from a fraction of a pixel to many times the map's; partly, or wholly, outside; some inverted."""
    corners = torch.rand(count, 2, generator=generator) * 160 - 40
    sides = torch.exp(torch.rand(count, 2, generator=generator) * math.log(1000.0)) / 5
    sides *= torch.where(torch.rand(count, 1, generator=generator) < 0.1, -0.1, 1.0)
    image = torch.randint(images, (count, 1), generator=generator).float()
    rows = torch.cat((image, corners, corners + sides), 1)
    edges = torch.tensor(
        [
            [0, 0, 0, 0, 0],
            [0, 8, 8, 8, 8],
            [0, 0, 0, 96, 72],
            [0, 96, 72, 120, 90],
            [0, -8, -8, 0, 0],
            [0, 88, 64, 96, 72],
        ]
    )
    return torch.cat((rows, edges.float()))


@pytest.mark.parametrize(("sampling", "aligned", "scale"), CASES)
def test_cells_and_gradients_equal_torchvisions(sampling: int, aligned: bool, scale: float) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        images, channels, size = 1 + seed % 3, (1, 3, 17, 64)[seed % 4], (1, 2, 7)[seed % 3]
        height, width = (9, 12) if scale < 1 else (72, 96)
        mine = torch.randn(images, channels, height, width, generator=generator)
        if seed % 2:
            mine = mine.contiguous(memory_format=torch.channels_last)
        theirs = mine.clone()
        rows = random_rows(generator, images, 40)
        found = roi_align(mine.requires_grad_(), rows, size, scale, sampling, aligned)
        expected = ops.roi_align(theirs.requires_grad_(), rows, size, scale, sampling or -1, aligned)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        gradient = torch.randn(expected.shape, generator=generator)
        found.backward(gradient)  # type: ignore[no-untyped-call]
        expected.backward(gradient)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-3)


def test_no_regions_give_no_cells_and_a_gradient_of_zeros() -> None:
    feature = torch.randn(2, 5, 4, 6, requires_grad=True)
    cells = roi_align(feature, torch.zeros(0, 5), 7, 0.25, 2, False)
    assert cells.shape == (0, 5, 7, 7)
    cells.sum().backward()  # type: ignore[no-untyped-call]
    assert feature.grad is not None
    assert not feature.grad.any()


def test_any_number_of_threads_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 200, 9, 12, generator=generator, requires_grad=True)
    rows = random_rows(generator, 2, 200)
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            cells = roi_align(feature, rows, 7, 0.125, 2, False)
            outcomes.append((cells, torch.autograd.grad(cells.square().sum(), feature)[0]))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*outcomes):
        assert torch.equal(one, three)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_a_region_without_a_place_has_zeros_and_no_gradient(value: float, sampling: int, column: int) -> None:
    feature = torch.ones(1, 2, 4, 4, requires_grad=True)
    rows = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    rows[0, column] = value
    cells = roi_align(feature, rows, 3, 1.0, sampling, True)
    cells.sum().backward()  # type: ignore[no-untyped-call]
    assert feature.grad is not None
    assert not cells.any()
    assert not feature.grad.any()


@pytest.mark.parametrize("image", [-1.0, 2.0, math.nan])
def test_a_region_of_no_image_is_refused(image: float) -> None:
    with pytest.raises(ValueError, match=r"must be an image index in 0\.\.1"):
        roi_align(torch.ones(2, 1, 4, 4), torch.tensor([[image, 0, 0, 1, 1]]), 7, 1.0, 2, False)
