import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops

from detkit.boxes import elementwise_iou, intersection_over_area, pairwise_iou

TORCHVISION = {
    "iou": ops.box_iou,
    "giou": ops.generalized_box_iou,
    "diou": ops.distance_box_iou,
    "ciou": ops.complete_box_iou,
}
KINDS = sorted(TORCHVISION)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (1, 1), (40, 25)])
@pytest.mark.parametrize("whole", [False, True])
def test_pairwise_equals_torchvision(kind, counts, whole):
    for seed in range(5):
        a, b = (random_boxes(n, seed * 10 + i, whole=whole) for i, n in enumerate(counts))
        ours = pairwise_iou(a, b, kind)
        assert ours.shape == counts
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, TORCHVISION[kind](a, b), rtol=1e-5, atol=1e-6)


def test_plain_iou_is_torchvisions_to_the_bit():
    for seed in range(20):
        a, b = random_boxes(60, seed), random_boxes(30, seed + 1000)
        assert torch.equal(pairwise_iou(a, b), ops.box_iou(a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_elementwise_is_the_diagonal_of_pairwise(kind):
    a, b = random_boxes(50, 1), random_boxes(50, 2)
    assert torch.equal(elementwise_iou(a, b, kind), pairwise_iou(a, b, kind).diagonal())


def test_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10]])
    b = torch.tensor([[5.0, 0, 15, 10], [10, 0, 20, 10], [20, 0, 30, 10]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[50 / 150, 0, 0]]))
    # the hull of the first and third is 30 x 10, of which 20 x 10 is the union
    torch.testing.assert_close(pairwise_iou(a, b, "giou"), torch.tensor([[1 / 3, 0, -1 / 3]]))
    torch.testing.assert_close(pairwise_iou(a, b[2:], "diou"), torch.tensor([[-400 / (30**2 + 10**2)]]))


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_give_numbers_and_gradients(kind):
    a = DEGENERATE.repeat_interleave(len(DEGENERATE), 0).requires_grad_()
    b = DEGENERATE.repeat(len(DEGENERATE), 1).requires_grad_()
    result = elementwise_iou(a, b, kind)
    assert result.isfinite().all()
    assert (result <= 1).all()
    result.sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_boxes_without_area_overlap_nothing():
    expected = torch.zeros(6, 6)
    expected[5, 5] = 1
    assert torch.equal(pairwise_iou(DEGENERATE, DEGENERATE), expected)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradcheck(kind):
    a, b = random_boxes(12, 3).double().requires_grad_(), random_boxes(12, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: elementwise_iou(x, y, kind), (a, b))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("giou", ops.generalized_box_iou_loss),
        ("diou", ops.distance_box_iou_loss),
        ("ciou", ops.complete_box_iou_loss),
    ],
)
def test_gradient_equals_torchvisions_loss(kind, loss):
    # gradcheck does not apply to ciou: its weight alpha is held constant in the gradient.
    b = random_boxes(40, 6).double()
    ours, theirs = (random_boxes(40, 5).double().requires_grad_() for _ in range(2))
    (1 - elementwise_iou(ours, b, kind)).sum().backward()
    loss(theirs, b, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_intersection_over_area():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 100, 100], [5, 5, 5, 9]])
    crowds = torch.tensor([[5.0, 0, 100, 100], [200, 200, 300, 300]])
    torch.testing.assert_close(intersection_over_area(boxes, crowds), torch.tensor([[0.5, 0], [0.95, 0], [0, 0]]))


def test_intersection_over_area_equals_coco_crowd_iou():
    mask = pytest.importorskip("pycocotools.mask")
    boxes, crowds = random_boxes(30, 7), random_boxes(9, 8)
    as_xywh = [ops.box_convert(b, "xyxy", "xywh").double().numpy() for b in (boxes, crowds)]
    expected = torch.from_numpy(mask.iou(as_xywh[0], as_xywh[1], [1] * 9))
    torch.testing.assert_close(intersection_over_area(boxes, crowds).double(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision_does_not_overflow():
    box = torch.tensor([[0.0, 0, 1000, 1000]], dtype=torch.float16)
    assert pairwise_iou(box, box).item() == 1


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 4), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_symmetric_and_bounded(corners, kind):
    boxes = torch.tensor(corners, dtype=torch.float32)
    result = pairwise_iou(boxes, boxes, kind)
    assert result.isfinite().all()
    assert (result <= 1 + 1e-6).all()
    assert (result >= {"iou": 0, "giou": -1, "diou": -1, "ciou": -2}[kind] - 1e-6).all()
    torch.testing.assert_close(result, result.T, rtol=1e-4, atol=1e-5)


def test_refusals():
    boxes = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"'iuo'.*Did you mean 'iou'"):
        pairwise_iou(boxes, boxes, "iuo")
    with pytest.raises(ValueError, match=r"boxes_b must be \(N, 4\), but got \(3, 5\)"):
        pairwise_iou(boxes, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="equally many, but are 3 and 1"):
        elementwise_iou(boxes, boxes[:1])
