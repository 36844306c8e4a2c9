import logging
import math

import cv2
import numpy as np
import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops

from detkit.boxes.soft_nms import soft_nms


def random_scores(count, seed, steps=None):
    """Scores in 0..1; `steps` rounds them, so that many are equal."""
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed + 77))
    return scores if steps is None else (scores * steps).floor() / steps


def plain_soft_nms(boxes, scores, method="gaussian", iou_threshold=0.3, sigma=0.5, score_threshold=0.001):
    """The paper's loop, word for word."""
    iou = ops.box_iou(boxes, boxes).nan_to_num(0)  # 0 / 0 of two points
    if method == "linear":
        weights = torch.where(iou.double() > iou_threshold, 1 - iou, 1)
    else:
        weights = torch.exp(-(iou * iou) / sigma)
    current, taken = scores.clone(), []
    remaining = (current > score_threshold).nonzero().flatten()
    while len(remaining):
        best = remaining[current[remaining].argmax()]  # of equal ones the first
        taken.append(int(best))
        remaining = remaining[remaining != best]
        current[remaining] *= weights[best, remaining]
        remaining = remaining[current[remaining] > score_threshold]
    return taken, current[taken]


def assert_equals_plain(boxes, scores, exact=False, **options):
    indices, decayed = soft_nms(boxes, scores, **options)
    expected_indices, expected = plain_soft_nms(boxes, scores, **options)
    assert indices.dtype == torch.int64
    assert indices.tolist() == expected_indices
    torch.testing.assert_close(decayed, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 30, 200])
@pytest.mark.parametrize("score_threshold", [0.0, 0.001, 0.4])
def test_gaussian_equals_a_plain_loop(count, score_threshold):
    for seed in range(4):
        for sigma in (0.1, 0.5, 3.0):
            boxes, scores = random_boxes(count, seed), random_scores(count, seed)
            if count == 200 and score_threshold == 0:
                scores = scores.double()  # hundreds of decays bring float32 scores so low that some are equal
            assert_equals_plain(boxes, scores, sigma=sigma, score_threshold=score_threshold)


@pytest.mark.parametrize("count", [0, 1, 2, 30, 200])
@pytest.mark.parametrize("score_threshold", [0.0, 0.001, 0.4])
def test_linear_equals_a_plain_loop_to_the_bit(count, score_threshold):
    for seed in range(2):
        for iou_threshold in (0.0, 0.3, 0.9, 1.0):
            for whole in (False, True):
                boxes = random_boxes(count, seed, whole=whole)
                scores = random_scores(count, seed, steps=5 if whole else None)
                options = {"method": "linear", "iou_threshold": iou_threshold, "score_threshold": score_threshold}
                assert_equals_plain(boxes, scores, exact=True, **options)


def test_more_boxes_than_a_block_of_the_kernel_holds():
    boxes, scores = random_boxes(700, 1, extent=1000), random_scores(700, 1)
    boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) / 4
    for options in ({}, {"method": "linear"}):
        assert len(soft_nms(boxes, scores, **options)[0]) > 512
        assert_equals_plain(boxes, scores, exact=bool(options), **options)


def test_equals_opencv():
    for seed in range(10):
        boxes, scores = random_boxes(60, seed).round(), random_scores(60, seed)
        rectangles = [(int(a), int(b), int(c - a), int(d - b)) for a, b, c, d in boxes.tolist()]
        for method, number in (
            ("gaussian", cv2.dnn.SOFT_NMSMETHOD_SOFTNMS_GAUSSIAN),
            ("linear", cv2.dnn.SOFT_NMSMETHOD_SOFTNMS_LINEAR),
        ):
            # no IoU of such boxes is 0.3137: at the threshold itself float32 and float64 differ
            indices, decayed = soft_nms(boxes, scores, method, 0.3137 if method == "linear" else None)
            expected, order = cv2.dnn.softNMSBoxes(rectangles, scores.numpy(), 0.001, 0.3137, sigma=0.5, method=number)
            assert indices.tolist() == np.ravel(order).tolist()
            np.testing.assert_allclose(decayed.numpy(), np.ravel(expected), rtol=1e-5, atol=1e-6)


def test_by_hand():
    # IoU of 0 and 1 is 1/2, of the third with either 0
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    indices, decayed = soft_nms(boxes, scores, sigma=0.25)
    assert indices.tolist() == [0, 2, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.8 * math.exp(-1)]))
    indices, decayed = soft_nms(boxes, scores, "linear")
    assert indices.tolist() == [0, 2, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.4]))


def test_defaults_are_those_documented():
    boxes, scores = random_boxes(40, 1), random_scores(40, 1)
    pairs = [
        (soft_nms(boxes, scores), soft_nms(boxes, scores, "gaussian", sigma=0.5, score_threshold=0.001)),
        (soft_nms(boxes, scores, "linear"), soft_nms(boxes, scores, "linear", iou_threshold=0.3)),
    ]
    for default, given_ in pairs:
        assert torch.equal(default[0], given_[0])
        assert torch.equal(default[1], given_[1])
    assert not torch.equal(pairs[0][0][1], soft_nms(boxes, scores, sigma=0.6)[1])
    assert not torch.equal(pairs[1][0][1], soft_nms(boxes, scores, "linear", iou_threshold=0.4)[1])


def test_iou_of_exactly_the_threshold_does_not_decay():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]), torch.tensor([0.9, 0.8])
    assert torch.equal(soft_nms(boxes, scores, "linear", iou_threshold=0.5)[1], scores)
    torch.testing.assert_close(soft_nms(boxes, scores, "linear", iou_threshold=0.4999)[1], torch.tensor([0.9, 0.4]))


def test_score_threshold_is_exclusive():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores = torch.tensor([1.0, 0.75, 0.375])  # the second decays to 0.375
    assert soft_nms(boxes, scores, "linear", score_threshold=0.375)[0].tolist() == [0]
    assert soft_nms(boxes, scores, "linear", score_threshold=0.374)[0].tolist() == [0, 1, 2]
    assert soft_nms(boxes, torch.full((3,), 0.1), score_threshold=0.1)[0].shape == (0,)
    assert soft_nms(boxes, torch.tensor([0.0, -1.0, 0.5]), score_threshold=0)[0].tolist() == [2]


def test_equal_scores_go_by_index():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    scores = torch.full((5,), 0.5)
    indices, decayed = soft_nms(boxes, scores, sigma=2.0)
    assert indices.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(decayed, 0.5 * torch.exp(-torch.arange(5) / 2))
    assert soft_nms(boxes, scores, "linear")[0].tolist() == [0]  # score 0 is out
    apart = boxes + torch.arange(5)[:, None] * 100
    assert soft_nms(apart, scores, labels=torch.tensor([1, 0, 1, 0, 1]))[0].tolist() == [0, 1, 2, 3, 4]
    # the last box falls to the score of the first, and the first goes first
    boxes = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 5]])
    assert soft_nms(boxes, torch.tensor([0.25, 0.75, 0.5]), "linear")[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_boxes_without_area_have_no_overlap(method):
    for seed in range(10):
        boxes = torch.cat((DEGENERATE, DEGENERATE, random_boxes(20, seed), random_boxes(20, seed)[:, [2, 3, 0, 1]]))
        scores = random_scores(len(boxes), seed)
        assert_equals_plain(boxes, scores, method=method)
        indices, decayed = soft_nms(boxes, scores, method, score_threshold=0)
        without = [0, 1, 2, 3, 4, *range(6, 11), *range(32, 52)]
        assert decayed[torch.isin(indices, torch.tensor(without))].tolist() == sorted(
            scores[without].tolist(), reverse=True
        )


@pytest.mark.parametrize("scale", [1e-23, 1e18])
def test_areas_that_underflow_or_overflow(scale):
    # subnormal areas lose digits, and infinite ones overlap nothing; no score is NaN
    boxes, scores = random_boxes(50, 1) * scale, random_scores(50, 1)
    for options in ({}, {"method": "linear"}):
        assert_equals_plain(boxes, scores, **options)


coordinate = st.one_of(st.integers(-3, 6).map(float), st.floats(-(2.0**100), 2.0**100, width=32))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate, st.integers(0, 4)), max_size=10),
    st.floats(0, 1),
)
def test_any_finite_boxes(rows, threshold):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    assert_equals_plain(table[:, :4], table[:, 4] / 4, exact=True, method="linear", iou_threshold=threshold)
    indices, decayed = soft_nms(table[:, :4], table[:, 4] / 4)
    assert decayed.isfinite().all()
    assert (decayed <= table[indices, 4] / 4).all()


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_images_and_classes_equal_each_alone(method):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        boxes, scores = random_boxes(200, seed), random_scores(200, seed, steps=20)
        labels = torch.randint(4, (200,), generator=generator) * 2**40
        images = torch.randint(3, (200,), generator=generator) - 1
        for keys in ((labels, images), (labels, None), (None, images)):
            apart = [torch.zeros_like(labels) if key is None else key for key in keys]
            expected = []
            for image in apart[1].unique():
                for label in apart[0].unique():
                    members = ((apart[1] == image) & (apart[0] == label)).nonzero().flatten()
                    indices, decayed = soft_nms(boxes[members], scores[members], method)
                    expected += zip(decayed.tolist(), members[indices].tolist())
            expected.sort(key=lambda pair: (-pair[0], pair[1]))
            indices, decayed = soft_nms(boxes, scores, method, labels=keys[0], image_index=keys[1])
            assert list(zip(decayed.tolist(), indices.tolist())) == expected


def test_classes_far_out_are_exact():
    box = torch.tensor([[1e6, 1e6, 1e6 + 3, 1e6 + 3], [1e6 + 1, 1e6, 1e6 + 4, 1e6 + 3]])
    boxes, labels = box.repeat(2, 1), torch.tensor([0, 0, 2**40, 2**40])
    indices, decayed = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), "linear", labels=labels)
    assert indices.tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.4, 0.3]))


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_max_detections_is_for_each_image(method):
    boxes, scores = random_boxes(200, 4), random_scores(200, 4, steps=20)
    images = torch.arange(200) % 5
    images[images == 3] = 7  # an image without boxes between
    labels = torch.arange(200) // 100
    for keys in ({"labels": labels, "image_index": images}, {"image_index": images}, {"labels": labels}, {}):
        everything, decayed = soft_nms(boxes, scores, method, **keys)
        of_image = images[everything] if "image_index" in keys else torch.zeros_like(everything)
        for limit in (0, 1, 6, 1000):
            rank = [int((of_image[:i] == of_image[i]).sum()) for i in range(len(everything))]
            first = torch.tensor(rank) < limit
            limited = soft_nms(boxes, scores, method, max_detections=limit, **keys)
            assert torch.equal(limited[0], everything[first])
            assert torch.equal(limited[1], decayed[first])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    boxes, scores = random_boxes(100, 5).to(dtype), random_scores(100, 5, steps=50).to(dtype)
    indices, decayed = soft_nms(boxes, scores, "linear")
    expected_indices, expected = plain_soft_nms(
        boxes.float(), scores if dtype == torch.float64 else scores.float(), "linear"
    )
    assert decayed.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.tolist() == expected_indices
    assert torch.equal(decayed, expected)


def test_double_scores_are_not_rounded():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    scores = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    indices, decayed = soft_nms(boxes, scores)
    assert indices.tolist() == [1, 0]
    assert decayed[0] == scores[1]


def test_layout_gradient_and_arguments():
    table = torch.cat((random_boxes(100, 6), random_scores(100, 6)[:, None]), dim=1).requires_grad_()
    boxes, scores = table[:, :4], table[:, 4]  # neither is contiguous
    before = table.detach().clone()
    indices, decayed = soft_nms(boxes, scores)
    expected = soft_nms(before[:, :4].contiguous(), before[:, 4].contiguous())
    assert torch.equal(indices, expected[0])
    assert torch.equal(decayed, expected[1])
    assert not decayed.requires_grad
    assert torch.equal(table.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_empty(dtype):
    indices, decayed = soft_nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), max_detections=3)
    assert (indices.shape, indices.dtype) == ((0,), torch.int64)
    assert (decayed.shape, decayed.dtype) == ((0,), torch.promote_types(dtype, torch.float32))
    images = torch.zeros(2, dtype=torch.int64)
    indices, decayed = soft_nms(random_boxes(2, 1), torch.zeros(2), image_index=images, max_detections=3)
    assert indices.shape == decayed.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    boxes, scores = random_boxes(30, 1), random_scores(30, 1)
    broken = scores.clone()
    broken[17] = value
    with pytest.raises(ValueError, match=rf"scores\[17\] is {value}"):
        soft_nms(boxes, broken, score_threshold=0.9)
    broken = boxes.clone()
    broken[3, 2] = value
    with pytest.raises(ValueError, match=rf"boxes\[3, 2\] is {value}"):
        soft_nms(broken, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\)"),
        ({"scores": torch.zeros(2)}, r"scores must be \(3,\)"),
        ({"labels": torch.zeros(3)}, r"labels must be \(3,\) integers"),
        ({"image_index": torch.zeros(2, dtype=torch.int64)}, r"image_index must be \(3,\) integers"),
        ({"method": "gauss"}, "unknown method 'gauss'. Did you mean 'gaussian'"),
        ({"iou_threshold": 0.3}, "iou_threshold applies only to method='linear'"),
        ({"method": "linear", "sigma": 0.5}, "sigma applies only to method='gaussian'"),
        ({"method": "linear", "iou_threshold": 1.5}, "iou_threshold must be in 0..1, but is 1.5"),
        ({"sigma": 0.0}, "sigma must be in 1e-30..1e30, but is 0.0"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"score_threshold": -0.1}, "score_threshold must be at least 0, but is -0.1"),
        ({"score_threshold": math.nan}, "score_threshold must be"),
        ({"max_detections": -1}, "max_detections must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=message):
        soft_nms(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors(caplog):
    boxes, scores, labels = random_boxes(300, 1), random_scores(300, 1), torch.arange(300) % 2
    keys = {"labels": labels, "image_index": labels}
    with caplog.at_level(logging.DEBUG, "detkit.boxes.soft_nms"):
        indices, decayed = soft_nms(
            boxes.cuda(), scores.cuda(), max_detections=20, **{name: key.cuda() for name, key in keys.items()}
        )
    assert indices.device.type == decayed.device.type == "cuda"
    expected = soft_nms(boxes, scores, max_detections=20, **keys)
    assert torch.equal(indices.cpu(), expected[0])
    assert torch.equal(decayed.cpu(), expected[1])
    assert "on the CPU" in caplog.text
