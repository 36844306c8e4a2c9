import pytest
import torch
from box_samples import random_boxes
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_area, box_convert, clip_boxes_to_image

from detkit.boxes import area, clip, cxcywh_to_xyxy, xywh_to_xyxy, xyxy_to_cxcywh, xyxy_to_xywh

CONVERSIONS = [
    (xyxy_to_xywh, "xyxy", "xywh"),
    (xywh_to_xyxy, "xywh", "xyxy"),
    (xyxy_to_cxcywh, "xyxy", "cxcywh"),
    (cxcywh_to_xyxy, "cxcywh", "xyxy"),
]


@pytest.mark.parametrize(("convert", "source", "destination"), CONVERSIONS)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_conversions_equal_torchvision(convert, source, destination, count):
    boxes = random_boxes(count, seed=count)
    before = boxes.clone()
    torch.testing.assert_close(convert(boxes), box_convert(boxes, source, destination))
    assert torch.equal(boxes, before), "the argument was changed"


def test_leading_dimensions():
    boxes = random_boxes(24, seed=1).reshape(2, 3, 4, 4)
    for convert, _, _ in CONVERSIONS:
        assert torch.equal(convert(boxes).reshape(-1, 4), convert(boxes.reshape(-1, 4)))
    assert area(boxes).shape == (2, 3, 4)
    assert clip(boxes, (40, 60)).shape == boxes.shape


@given(st.lists(st.integers(-1000, 1000), min_size=4, max_size=4))
def test_there_and_back_is_exact_for_whole_pixels(corners):
    boxes = torch.tensor([corners], dtype=torch.float32)
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)
    assert torch.equal(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)


def test_clip_equals_torchvision_and_keeps_its_argument():
    boxes = random_boxes(200, seed=2) * 1.5 - 30
    before = boxes.clone()
    assert torch.equal(clip(boxes, (60, 90)), clip_boxes_to_image(boxes, (60, 90)))
    assert torch.equal(boxes, before)


def test_size_is_height_then_width():
    assert clip(torch.tensor([[-5.0, -5.0, 500.0, 500.0]]), (30, 70)).tolist() == [[0, 0, 70, 30]]


def test_area():
    boxes = random_boxes(100, seed=3)
    torch.testing.assert_close(area(boxes), box_area(boxes))
    # no width; swapped in one axis; swapped in both, where a plain product would be positive
    degenerate = torch.tensor([[5.0, 5, 5, 9], [9, 5, 5, 9], [9, 9, 5, 5]])
    assert area(degenerate).tolist() == [0, 0, 0]
