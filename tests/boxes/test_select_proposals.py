"""The choice of proposals against torchvision's region-proposal network."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork

from detkit.boxes.coding import decode
from detkit.boxes.proposals import select_proposals

LEVELS = (240, 60, 15)
SIZES = ((100, 140), (64, 30), (7, 140))


def random_outputs(seed: int, levels: tuple[int, ...] = LEVELS, images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A) logits, (B, A, 4) offsets and (A, 4) anchors, some of them outside of every image."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(levels)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([180.0, 130]) - 25
    anchors = torch.cat((corners, corners + 2 + 60 * torch.rand(count, 2, generator=generator)), 1)
    offsets = 0.4 * torch.randn(images, count, 4, generator=generator)
    return torch.randn(images, count, generator=generator), offsets, anchors


def torchvision_proposals(
    objectness: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    levels: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...],
    *,
    candidates: int,
    proposals: int,
    iou_threshold: float,
) -> list[Tensor]:
    network = RegionProposalNetwork(
        None,
        None,
        0.7,
        0.3,
        256,
        0.5,
        pre_nms_top_n={"training": 1, "testing": candidates},
        post_nms_top_n={"training": 1, "testing": proposals},
        nms_thresh=iou_threshold,
    ).eval()
    decoded = network.box_coder.decode(offsets.flatten(0, 1), [anchors] * len(offsets)).view(len(offsets), -1, 4)
    return network.filter_proposals(decoded, objectness, list(sizes), list(levels))[0]


@pytest.mark.parametrize(
    ("candidates", "proposals", "iou_threshold"), [(50, 40, 0.7), (20, 1000, 0.5), (1000, 300, 0.3), (1, 2, 0.7)]
)
def test_equal_to_torchvision(candidates: int, proposals: int, iou_threshold: float) -> None:
    limits = {"candidates": candidates, "proposals": proposals, "iou_threshold": iou_threshold}
    for seed in range(15):
        objectness, offsets, anchors = random_outputs(seed)
        found = select_proposals(objectness, offsets, anchors, LEVELS, SIZES, **limits)
        expected = torchvision_proposals(objectness, offsets, anchors, LEVELS, SIZES, **limits)
        assert len(found) == 3
        for boxes, others, (height, width) in zip(found, expected, SIZES):
            assert boxes.dtype == torch.float32
            torch.testing.assert_close(boxes, others, rtol=1e-5, atol=1e-4)
            assert len(boxes) <= proposals
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_levels_are_suppressed_one_apart_from_the_other() -> None:
    """The same four boxes on both levels: each level keeps its best."""
    anchors = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50]]).repeat(2, 1)
    objectness = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    zero = torch.zeros(1, 4, 4)
    limits = {"candidates": 9, "proposals": 9, "iou_threshold": 0.7}
    (found,) = select_proposals(objectness, zero, anchors, (2, 2), ((100, 100),), **limits)
    assert torch.equal(found, anchors[[1, 2]])
    (together,) = select_proposals(objectness, zero, anchors, (4,), ((100, 100),), **limits)
    assert torch.equal(together, anchors[[1]])


def test_levels_with_few_anchors_or_none() -> None:
    levels = (0, 3, 0, 40)
    for seed in range(5):
        objectness, offsets, anchors = random_outputs(seed, levels)
        limits = {"candidates": 10, "proposals": 100, "iou_threshold": 0.7}
        found = select_proposals(objectness, offsets, anchors, levels, SIZES, **limits)
        expected = torchvision_proposals(objectness, offsets, anchors, levels, SIZES, **limits)
        assert sum(len(boxes) for boxes in found) > 0
        for boxes, others in zip(found, expected):
            torch.testing.assert_close(boxes, others, rtol=1e-5, atol=1e-4)


def test_no_anchors_no_images() -> None:
    limits = {"candidates": 10, "proposals": 10, "iou_threshold": 0.7}
    none = torch.zeros(2, 0), torch.zeros(2, 0, 4), torch.zeros(0, 4)
    assert [tuple(boxes.shape) for boxes in select_proposals(*none, (0, 0), SIZES[:2], **limits)] == [(0, 4), (0, 4)]
    objectness, offsets, anchors = random_outputs(0)
    assert select_proposals(objectness[:0], offsets[:0], anchors, LEVELS, (), **limits) == []


def test_what_lies_outside_or_has_no_area_is_dropped() -> None:
    anchors = torch.tensor(
        [
            [-50.0, -50, -10, -10],  # outside
            [200, 10, 240, 40],
            [99.9995, 10, 140, 40],  # half a thousandth of a pixel remains of it
            [30, 30, 30, 50],  # no width
            [10, 10, 10, 10],
            [60, 60, 50, 50],  # sides swapped
            [90, 90, 140, 140],  # a corner of it remains
        ]
    )
    objectness = torch.arange(7.0)[None]
    limits = {"candidates": 10, "proposals": 10, "iou_threshold": 0.7}
    (found,) = select_proposals(objectness, torch.zeros(1, 7, 4), anchors, (7,), ((100, 100),), **limits)
    assert torch.equal(found, torch.tensor([[90.0, 90, 100, 100]]))
    (none,) = select_proposals(objectness[:, :6], torch.zeros(1, 6, 4), anchors[:6], (6,), ((100, 100),), **limits)
    assert none.shape == (0, 4)


def test_scores_beyond_the_reach_of_a_sigmoid_keep_their_order() -> None:
    """From 17 on a sigmoid of float32 is 1, and torchvision's order of them that of the levels."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    objectness = torch.tensor([[30.0, 40.0, 60.0, 50.0]])
    limits = {"candidates": 10, "proposals": 2, "iou_threshold": 0.7}
    (found,) = select_proposals(objectness, torch.zeros(1, 4, 4), anchors, (2, 2), ((100, 100),), **limits)
    assert torch.equal(found, anchors[[2, 3]])


def test_huge_offsets_stay_finite_and_inside() -> None:
    objectness, offsets, anchors = random_outputs(3)
    found = select_proposals(
        objectness, 1e6 * offsets, anchors, LEVELS, SIZES, candidates=100, proposals=100, iou_threshold=0.7
    )
    for boxes, (height, width) in zip(found, SIZES):
        assert boxes.isfinite().all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_arguments_stay_as_they_are_and_no_gradient_flows() -> None:
    arguments = random_outputs(4)
    arguments[0].requires_grad_()
    before = [tensor.detach().clone() for tensor in arguments]
    found = select_proposals(*arguments, LEVELS, SIZES, candidates=100, proposals=100, iou_threshold=0.7)
    assert not any(boxes.requires_grad for boxes in found)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments))


def test_each_box_is_a_decoded_candidate_in_order_of_its_score() -> None:
    objectness, offsets, anchors = random_outputs(5, images=1)
    size = (10_000, 10_000)
    moved = anchors + 1000  # nothing is cut
    (found,) = select_proposals(
        objectness, offsets, moved, LEVELS, (size,), candidates=30, proposals=1000, iou_threshold=1.0
    )
    boxes = decode(offsets[0], moved, deviations=(1.0,) * 4)
    origin = (found[:, None] - boxes[None]).abs().amax(-1).argmin(1)
    torch.testing.assert_close(boxes[origin], found)
    assert len(found) == 30 + 30 + 15
    assert (objectness[0, origin].diff() <= 0).all()


def test_levels_that_do_not_add_up() -> None:
    objectness, offsets, anchors = random_outputs(0)
    with pytest.raises(ValueError, match="the levels have 314 anchors in total, but there are 315"):
        select_proposals(objectness, offsets, anchors, (300, 14), SIZES, candidates=9, proposals=9, iou_threshold=0.7)
