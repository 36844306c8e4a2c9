"""Pasting of masks against torchvision's."""

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detkit.boxes.mask_paste import paste_masks


def theirs(patches: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5) -> torch.Tensor:
    return paste_masks_in_image(patches[:, None], boxes, size, padding=1)[:, 0] > threshold


def patches_of(count: int, cells: int, seed: int) -> torch.Tensor:
    """Probabilities; in every third patch only 0 and 1, so that exactly the threshold occurs between them."""
    patches = torch.rand(count, cells, cells, generator=torch.Generator().manual_seed(seed))
    return torch.where((torch.arange(count) % 3 == 0)[:, None, None], (patches > 0.5).float(), patches)


@pytest.mark.parametrize("cells", [1, 2, 14, 28])
@pytest.mark.parametrize("seed", range(15))
def test_equals_torchvision_bit_for_bit(seed: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (60 + 13 * seed, 200 - 11 * seed)
    sides = torch.tensor([size[1], size[0]])
    corner = (torch.rand(30, 2, generator=generator) * 1.2 - 0.2) * sides
    far = corner + torch.rand(30, 2, generator=generator) ** 2 * sides
    # All touch the image, on all sides over its border; torchvision fails on those that do not.
    boxes = torch.cat([corner, far.clamp(min=2.0)], dim=1)
    boxes[:5, 2:] = boxes[:5, :2].clamp(min=0) + torch.tensor([1.0, 0.3, 0.0, 5.0, 2.0])[:, None]
    boxes[5:8] = boxes[5:8].round()
    boxes[8] = torch.tensor([0.0, 0.0, size[1], size[0]])
    patches = patches_of(30, cells, seed)
    ours = paste_masks(patches, boxes, size)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, theirs(patches, boxes, size))
    assert ours[10:].any()
    assert torch.equal(paste_masks(patches, boxes, size, 0.3), theirs(patches, boxes, size, 0.3))


@pytest.mark.parametrize("seed", range(10))
def test_boxes_far_larger_than_the_image(seed: int) -> None:
    """Only the part that is seen is computed; it may differ where the probability is the threshold but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    size = (40, 50)
    corner = -torch.rand(10, 2, generator=generator) * 1000
    boxes = torch.cat([corner, torch.rand(10, 2, generator=generator) * 1000 + 50], dim=1)
    patches = torch.rand(10, 14, 14, generator=generator)
    ours = paste_masks(patches, boxes, size)
    certain = (paste_masks_in_image(patches[:, None], boxes, size, padding=1)[:, 0] - 0.5).abs() > 1e-4
    assert certain.float().mean() > 0.99
    assert torch.equal(ours & certain, theirs(patches, boxes, size) & certain)


def test_a_box_of_any_size_fits_into_memory() -> None:
    boxes = torch.tensor([[-1e6, -1e6, 1e6, 1e6], [10.0, -1e9, 20.0, 1e9], [-3e38, -3e38, 3e38, 3e38]])
    masks = paste_masks(torch.ones(3, 28, 28), boxes, (30, 40))
    assert masks[0].all()
    assert masks[1, :, 10:20].all()
    assert not masks[1, :, 22:].any()


def test_outside_of_the_image_inside_out_or_not_finite_is_empty() -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [
            *([-50.0, 5, -10, 20], [5.0, -50, 20, -10], [45.0, 5, 60, 20], [5.0, 35, 20, 60]),
            *([20.0, 5, 10, 20], [5.0, 20, 20, 10], [nan, 0, 10, 10], [0.0, 0, inf, inf], [-inf, 0, inf, 10]),
        ]
    )
    assert not paste_masks(torch.ones(len(boxes), 28, 28), boxes, (30, 40)).any()


def test_a_certain_patch_fills_its_box() -> None:
    masks = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 5.0, 30.0, 25.0]]), (30, 40))
    rows, columns = torch.nonzero(masks[0], as_tuple=True)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert all(abs(int(a) - b) <= 1 for a, b in zip(found, (10, 5, 30, 25)))


def test_no_patches_give_no_masks() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 40)).shape == (0, 30, 40)


@pytest.mark.parametrize("shape", [(2, 28, 28), (3, 28, 27), (3, 1, 28, 28)])
def test_patches_that_do_not_fit_the_boxes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"patches must be \(3, m, m\) for 3 boxes"):
        paste_masks(torch.zeros(shape), torch.zeros(3, 4), (30, 40))
