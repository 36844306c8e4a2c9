import math
import subprocess
import sys

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torchvision import ops

from detkit.boxes import elementwise_iou, intersection_over_area, iou, pairwise_iou

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


def pair_by_pair(a, b):
    """(N, M) IoUs by torch operations alone, which compiled code has no part in."""
    return elementwise_iou(a.repeat_interleave(len(b), 0), b.repeat(len(a), 1)).reshape(len(a), len(b))


def strange_boxes(count, seed, dtype):
    """Coordinates of a few values, equal, swapped, subnormal, huge, infinite and NaN."""
    values = torch.tensor([-math.inf, -1e30, -3, -1e-30, 0, 1e-42, 1e-20, 1, 2, 3, 7, 1e19, 1e30, math.inf, math.nan])
    weights = torch.ones(15)
    weights[4:11] = 6
    choice = torch.multinomial(weights, count * 4, True, generator=torch.Generator().manual_seed(seed))
    return values[choice].reshape(count, 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [(4097, 1), (1, 4097), (500, 9), (70, 70), (33, 300)])
def test_compiled_iou_is_torchs_to_the_bit(counts, dtype):
    assert counts[0] * counts[1] > iou.SMALL
    for seed in range(3):
        a, b = (random_boxes(n, seed + i * 100, whole=seed == 2).to(dtype) for i, n in enumerate(counts))
        result = pairwise_iou(a, b)
        assert result.is_contiguous()
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        assert torch.equal(result.view(bits), pair_by_pair(a, b).view(bits))
        a, b = (strange_boxes(n, seed + i * 100, dtype) for i, n in enumerate(counts))
        assert torch.equal(pairwise_iou(a, b).view(bits), pair_by_pair(a, b).view(bits))
        known = [boxes[boxes.abs().amax(1) <= 1e19] for boxes in (a, b)]  # no NaN, and areas that are finite
        assert torch.equal(pairwise_iou(*known).view(bits), pair_by_pair(*known).view(bits))


@pytest.mark.parametrize("count", [20, 90])  # in torch, and where finite boxes go to compiled code
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_gives_nan(kind, dtype, count):
    a, b = (random_boxes(count, seed).to(dtype) for seed in (1, 2))
    a[3, 2] = b[5, 0] = b[7] = math.nan
    result = pairwise_iou(a, b, kind)
    expected = torch.zeros(count, count, dtype=torch.bool)
    expected[3] = expected[:, 5] = expected[:, 7] = True
    assert torch.equal(result.isnan(), expected)
    assert torch.equal(elementwise_iou(a, b, kind).isnan(), expected.diagonal())


@pytest.mark.parametrize("count", [40, 200])
def test_nan_and_infinite_boxes_as_torchvision(count):
    """But for two boxes without area, whose 0 / 0 is 0 here."""
    for seed in range(5):
        a, b = (strange_boxes(count, seed + i * 100, torch.float32) for i in range(2))
        a, b = (boxes[~(boxes[:, 2:] < boxes[:, :2]).any(1)] for boxes in (a, b))  # torchvision's inverted differ
        some = ops.box_area(a)[:, None] + ops.box_area(b) != 0
        result, expected = pairwise_iou(a, b)[some], ops.box_iou(a, b)[some]
        assert result.isnan().any()
        assert (result > 0).any()
        torch.testing.assert_close(result, expected, equal_nan=True)
    infinite = torch.tensor([[0.0, 0, math.inf, math.inf], [0, 0, 10, 10]])
    assert pairwise_iou(infinite, infinite).isnan().tolist() == [[True, False], [False, False]]


def test_part_of_a_box_that_is_nan_is_not_known():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, math.nan, 10, 10], [3, 3, 3, 3]])
    assert intersection_over_area(boxes, boxes).isnan().tolist() == [[False, True, False], [True] * 3, [False] * 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_large_integers_are_not_rounded(kind, count, dtype):
    """Of 2^24 + 1 float32 makes 2^24: boxes beside each other became one, and narrow ones lost their area."""
    corner = 2**24 + 1
    a = torch.tensor([[corner, 0, corner + 1, 2]], dtype=dtype).repeat(count, 1)
    b = torch.tensor([[corner, 0, corner + 1, 1], [corner + 1, 0, corner + 2, 2]], dtype=dtype).repeat(count, 1)
    near = torch.tensor([corner, 0, corner, 0], dtype=dtype)
    expected = pairwise_iou((a - near).double(), (b - near).double(), kind)
    result = pairwise_iou(a, b, kind)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected.float())
    assert {round(float(value), 3) for value in result.unique()} == {
        "iou": {0.0, 0.5}, "giou": {0.0, 0.5}, "diou": {-0.125, 0.45}, "ciou": {-0.125, 0.447}
    }[kind]  # fmt: skip
    torch.testing.assert_close(elementwise_iou(a[:1], b[:1], kind), expected[0, :1].float())
    assert pairwise_iou(a.double(), b, kind).dtype == torch.float64
    torch.testing.assert_close(pairwise_iou(a, b.double(), kind), expected)


def test_integers_beside_halves_and_none_at_all():
    whole = torch.tensor([[0, 0, 300, 300]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        result = pairwise_iou(whole, torch.tensor([[0.0, 0, 150, 300]], dtype=dtype))
        assert (result.dtype, result.item()) == (torch.float32, 0.5)
    assert pairwise_iou(whole[:0], whole).shape == (0, 1)
    assert pairwise_iou(whole[:0], whole).dtype == torch.float32
    corner = 2**24 + 1
    inside = intersection_over_area(
        torch.tensor([[corner, 0, corner + 2, 1]]), torch.tensor([[corner, 0, corner + 1, 1]])
    )
    assert (inside.dtype, inside.item()) == (torch.float32, 0.5)


def test_any_layout_and_dtype_of_many_boxes():
    a, b = random_boxes(90, 1), random_boxes(80, 2)
    expected = pair_by_pair(a, b)
    assert torch.equal(pairwise_iou(a.T.contiguous().T, b.repeat(1, 2)[:, 4:]), expected)
    assert torch.equal(pairwise_iou(a.double(), b), pair_by_pair(a.double(), b))
    assert torch.equal(pairwise_iou(a.half(), b.bfloat16()), pair_by_pair(a.half(), b.bfloat16()))
    assert torch.equal(pairwise_iou(a.long(), b.long()), pair_by_pair(a.long(), b.long()))


def test_many_boxes_are_differentiable_too():
    a, b = random_boxes(90, 1).requires_grad_(), random_boxes(80, 2)
    result = pairwise_iou(a, b)
    (gradient,) = torch.autograd.grad(result.sum(), a)
    (expected,) = torch.autograd.grad(pair_by_pair(a, b).sum(), a)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(pairwise_iou(a, b), result)
    with forward_ad.dual_level():
        moved = pairwise_iou(forward_ad.make_dual(a.detach(), torch.ones_like(a)), b)
        torch.testing.assert_close(forward_ad.unpack_dual(moved).tangent.sum(), gradient.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_many_boxes_under_transformations():
    a, b = torch.stack([random_boxes(90, seed) for seed in (1, 2)]), random_boxes(80, 3)
    expected = torch.stack([pairwise_iou(one, b) for one in a])
    assert torch.equal(torch.vmap(pairwise_iou, in_dims=(0, None))(a, b), expected)
    compiled = torch.compile(pairwise_iou, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a[0], b), expected[0])
    traced = torch.jit.trace(pairwise_iou, (b, b), check_trace=False)
    assert torch.equal(traced(a[0], b), expected[0])
    assert pairwise_iou(a[0].to("meta"), b.to("meta")).shape == (90, 80)


def test_few_boxes_do_not_wait_for_numba():
    code = "import sys, torch, detkit.boxes as b; b.pairwise_iou(torch.ones(64, 4), torch.ones(64, 4))\n"
    code += "sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
    with pytest.raises(ValueError, match="same length, but have 3 and 1"):
        elementwise_iou(boxes, boxes[:1])
