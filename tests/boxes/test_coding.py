import math

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from torchvision.models.detection._utils import BoxCoder

from detkit.boxes import decode, encode

TORCHVISION = BoxCoder((10.0, 10.0, 5.0, 5.0))


@pytest.mark.parametrize("count", [0, 1, 200])
@pytest.mark.parametrize("seed", range(3))
def test_encode_equals_torchvision(count, seed):
    boxes, anchors = random_boxes(count, seed), random_boxes(count, seed + 100)
    expected = TORCHVISION.encode_single(boxes, anchors)
    torch.testing.assert_close(encode(boxes, anchors), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 200])
@pytest.mark.parametrize("scale", [1, 30])  # at 30 the limit on log ratios is in force
def test_decode_equals_torchvision(count, scale):
    offsets = torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) * scale
    anchors = random_boxes(count, 7)
    assert count < 200 or scale < 30 or (offsets[:, 2:] / 5 > math.log(1000 / 16)).any()
    expected = TORCHVISION.decode_single(offsets, anchors)
    torch.testing.assert_close(decode(offsets, anchors), expected, rtol=1e-4, atol=1e-3)


def test_decode_is_the_inverse_of_encode():
    boxes, anchors = random_boxes(300, 1), random_boxes(300, 2)
    kwargs = {"means": (0.1, -0.2, 0.3, 0.05), "deviations": (0.3, 0.1, 0.7, 1.5)}
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(decode(encode(boxes, anchors, **kwargs), anchors, **kwargs), boxes, rtol=1e-5, atol=1e-3)


def test_by_hand_with_means():
    anchor, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 20]])
    # centres (5, 10) and (15, 10), sides (10, 20) and (20, 20)
    expected = torch.tensor([[(10 / 10 - 0.5) / 0.1, -0.25 / 0.1, (math.log(2) - 0.1) / 0.2, -0.3 / 0.2]])
    torch.testing.assert_close(encode(box, anchor, means=(0.5, 0.25, 0.1, 0.3)), expected)


def test_leading_dimensions_broadcast_with_the_anchors():
    offsets = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    anchors = random_boxes(50, 3)
    together = decode(offsets, anchors)
    assert together.shape == offsets.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], decode(offsets[i, j], anchors))


def test_limit_on_log_ratios():
    offsets, anchor = torch.tensor([[0.0, 0, 100, 0]]), torch.tensor([[0.0, 0, 16, 16]])
    limited = decode(offsets, anchor)
    assert (limited[0, 2] - limited[0, 0]).item() == pytest.approx(1000)
    free = decode(offsets, anchor, max_log_ratio=None)
    assert (free[0, 2] - free[0, 0]).item() == pytest.approx(16 * math.exp(20), rel=1e-4)


def test_boxes_and_anchors_without_area_give_finite_offsets():
    boxes, anchors = DEGENERATE.repeat_interleave(6, 0), DEGENERATE.repeat(6, 1)
    boxes.requires_grad_()
    offsets = encode(boxes, anchors)
    assert offsets.isfinite().all()
    offsets.sum().backward()
    assert boxes.grad.isfinite().all()


def test_nan_is_not_hidden():
    assert encode(torch.tensor([[0.0, 0, math.nan, 5]]), random_boxes(1, 0))[0, 0].isnan()


def test_half_precision_offsets_keep_the_anchors_precision():
    anchors = random_boxes(20, 4, extent=2000)
    decoded = decode(torch.zeros(20, 4, dtype=torch.float16), anchors)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, anchors, rtol=0, atol=1e-3)


def test_gradcheck():
    boxes, anchors = random_boxes(8, 5).double().requires_grad_(), random_boxes(8, 6).double()
    assert torch.autograd.gradcheck(lambda b: encode(b, anchors), boxes)
    offsets = torch.randn(2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: decode(o, anchors), offsets)
