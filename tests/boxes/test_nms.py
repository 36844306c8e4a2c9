import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops, tv_tensors

from detkit.boxes import nms
from detkit.boxes.kernels.nms_numba import _grid, suppress, words_needed
from detkit.boxes.nms_torchvision import nms_by_torchvision

THRESHOLDS = [0.0, 1e-30, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.999999, 1.0]


def random_scores(count, seed, steps=None):
    """Scores in 0..1; `steps` rounds them, so that many are equal."""
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed + 77))
    return scores if steps is None else (scores * steps).floor() / steps


def crowded_boxes(count, seed):
    """What a detector puts out before suppression: clusters of boxes that nearly agree."""
    generator = torch.Generator().manual_seed(seed)
    objects = random_boxes(max(1, count // 12), seed, extent=1000)
    boxes = objects[torch.randint(len(objects), (count,), generator=generator)]
    return boxes + torch.randn(count, 4, generator=generator) * 12


def plain_nms(boxes, scores, threshold):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i].item())
    kept = []
    iou = ops.box_iou(boxes, boxes)
    for i in order:
        if not any(iou[k, i] > threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("count", [0, 1, 2, 30, 700])
def test_equals_torchvision(count, threshold):
    for seed in range(4):
        for boxes in (
            crowded_boxes(count, seed),
            random_boxes(count, seed),
            random_boxes(count, seed, whole=True),
            random_boxes(count, seed) * 1e-23,  # areas are subnormal numbers
            random_boxes(count, seed) * 1e18,  # areas overflow to infinity
        ):
            for steps in (None, 5):
                scores = random_scores(count, seed, steps)
                kept = nms(boxes, scores, threshold)
                assert kept.dtype == torch.int64
                assert kept.tolist() == ops.nms(boxes, scores, threshold).tolist()


def detector_boxes(count, seed, extent=1280.0, spread=0.5):
    """Sizes of a wide range, most boxes in clusters around objects, some anywhere."""
    generator = torch.Generator().manual_seed(seed)
    objects = max(1, count // 7)
    centres = torch.rand(objects, 2, generator=generator) * extent
    sides = torch.exp(torch.randn(objects, 2, generator=generator) * spread + 4)
    which = torch.randint(objects, (count,), generator=generator)
    sides = sides[which] * torch.exp(torch.randn(count, 2, generator=generator) * 0.15)
    centres = centres[which] + torch.randn(count, 2, generator=generator) * 0.15 * sides
    centres[::3] = torch.rand(len(centres[::3]), 2, generator=generator) * extent
    return torch.cat((centres - sides / 2, centres + sides / 2), dim=1)


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_many_boxes_equal_torchvision(threshold):
    # Sizes around those at which the kernel sorts and searches in another way, and grids of many cells.
    for count in (400, 401, 500, 501, 3000, 4001):
        for seed, boxes in enumerate(
            (
                detector_boxes(count, 1),
                detector_boxes(count, 2, spread=1.5),  # from a pixel to the whole image
                detector_boxes(count, 3, extent=20000),  # sparse
                detector_boxes(count, 4, extent=100),  # each overlaps most others
                detector_boxes(count, 5) * torch.tensor([1e-3, 1, 1e-3, 1]),  # tall lines
                detector_boxes(count, 6) * 1e-3 + 1e4,  # float32 can only tell some positions apart
                detector_boxes(count, 7) * 1e-12,
                torch.cat((detector_boxes(count - 12, 8), DEGENERATE, DEGENERATE * 1e9)),
            )
        ):
            scores = random_scores(count, seed, steps=None if seed % 2 else 300)
            assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold)), (count, seed)


def test_boxes_in_one_point_or_line():
    scores = random_scores(1000, 1)
    for move in ([0.0, 0.0], [1.0, 0.0], [0.0, 0.3]):
        boxes = torch.tensor([[0.0, 0, 20, 10]]) + torch.arange(1000)[:, None] * torch.tensor(move).repeat(2)
        for threshold in (0.0, 0.5, 0.9):
            assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


def test_order_of_scores_of_either_sign():
    boxes = random_boxes(5, 1) + torch.arange(5)[:, None] * 1000
    scores = torch.tensor([-0.0, -3.0, 0.0, 1e-45, -1e-45])
    assert nms(boxes, scores, 0.5).tolist() == [3, 0, 2, 4, 1]
    for count in (300, 5000):  # sorted in other ways than a few
        boxes = detector_boxes(count, 3)
        scores = random_scores(count, 3, steps=50) - 0.5
        assert torch.equal(nms(boxes, scores, 0.5), ops.nms(boxes, scores, 0.5))


def test_calls_from_several_threads():
    sizes = (2000, 30, 6000, 450, 1000, 100, 3000, 500)
    work = [(detector_boxes(size, seed), random_scores(size, seed)) for seed, size in enumerate(sizes)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: nms(*each, 0.5), work * 3))
    for kept, each in zip(found, work * 3, strict=True):
        assert torch.equal(kept, ops.nms(*each, 0.5))


def test_equals_a_plain_loop():
    for seed in range(20):
        boxes, scores = crowded_boxes(50, seed), random_scores(50, seed, steps=8)
        assert nms(boxes, scores, 0.4).tolist() == plain_nms(boxes, scores, 0.4)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_degenerate_boxes_equal_torchvision(threshold):
    for seed in range(20):
        mixed = torch.cat((DEGENERATE, DEGENERATE, random_boxes(20, seed), random_boxes(20, seed)[:, [2, 3, 0, 1]]))
        scores = random_scores(len(mixed), seed, steps=4)
        assert torch.equal(nms(mixed, scores, threshold), ops.nms(mixed, scores, threshold))


coordinate = st.one_of(st.integers(-3, 6).map(float), st.floats(-(2.0**100), 2.0**100, width=32))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate, st.integers(0, 3)), max_size=12),
    st.one_of(st.sampled_from(THRESHOLDS), st.floats(0, 1)),
)
def test_any_finite_boxes_equal_torchvision(rows, threshold):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    boxes, scores = table[:, :4], table[:, 4]
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


def test_iou_of_exactly_the_threshold_is_kept():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.4999).tolist() == [0]


def test_equal_scores_go_by_index():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    assert nms(boxes, torch.full((5,), 0.5), 0.5).tolist() == [0]
    apart = boxes + torch.arange(5)[:, None] * 100
    assert nms(apart, torch.full((5,), 0.5), 0.5).tolist() == [0, 1, 2, 3, 4]


def by_group(boxes, scores, threshold, labels, images):
    """torchvision on each image and class by itself, the results merged by score."""
    kept = []
    for image in images.unique():
        for label in labels.unique():
            members = ((images == image) & (labels == label)).nonzero().flatten()
            kept += members[ops.nms(boxes[members], scores[members], threshold)].tolist()
    return sorted(kept, key=lambda i: (-scores[i].item(), i))


@pytest.mark.parametrize("steps", [None, 6])
def test_images_and_classes_equal_torchvision_on_each(steps):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        boxes, scores = crowded_boxes(300, seed), random_scores(300, seed, steps)
        labels = torch.randint(4, (300,), generator=generator)
        images = torch.randint(3, (300,), generator=generator)
        nowhere = torch.zeros_like(images)
        assert nms(boxes, scores, 0.4, labels, images).tolist() == by_group(boxes, scores, 0.4, labels, images)
        assert nms(boxes, scores, 0.4, labels).tolist() == by_group(boxes, scores, 0.4, labels, nowhere)
        assert nms(boxes, scores, 0.4, image_index=images).tolist() == by_group(boxes, scores, 0.4, nowhere, images)


def test_classes_far_out_are_exact():
    # torchvision's batched_nms moves classes apart by adding to coordinates, and loses digits by it
    box = torch.tensor([[1e6, 1e6, 1e6 + 3, 1e6 + 3], [1e6 + 1, 1e6, 1e6 + 4, 1e6 + 3]])
    boxes, labels = box.repeat(2, 1), torch.tensor([0, 0, 2**40, 2**40])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.49, labels).tolist() == [0, 2]


@pytest.mark.parametrize("factor", [1, -7, 2**40, -(2**61)])
def test_labels_and_images_of_any_range(factor):
    boxes, scores = crowded_boxes(600, 7), random_scores(600, 7, steps=90)
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(4, (600,), generator=generator)
    images = torch.randint(-1, 2, (600,), generator=generator)
    expected = by_group(boxes, scores, 0.4, labels, images)
    assert nms(boxes, scores, 0.4, labels * factor, images).tolist() == expected
    assert nms(boxes, scores, 0.4, labels, images * factor).tolist() == expected
    assert nms(boxes, scores, 0.4, labels.to(torch.int8), images.int()).tolist() == expected
    few = nms(boxes, scores, 0.4, labels, images, 0.3, 5)
    assert torch.equal(nms(boxes, scores, 0.4, labels, images * factor, 0.3, 5), few)
    assert all((images[few] == image).sum() == 5 for image in (-1, 0, 1))


@pytest.mark.parametrize("count", [0, 1, 40, 700])
def test_fallback_for_gpus_is_the_same(count):
    for seed in range(3):
        boxes, scores = crowded_boxes(count, seed), random_scores(count, seed, steps=30)
        labels, images = torch.arange(count) % 3, torch.arange(count) // 7 % 4
        for arguments in ((), (labels,), (None, images), (labels, images), (labels, images, 0.4, 3), (None, None, 0.9)):
            expected = nms(boxes, scores, 0.4, *arguments)
            assert torch.equal(nms_by_torchvision(boxes, scores, 0.4, *arguments), expected)
    with pytest.raises(ValueError, match=r"boxes\[1, 2\] is inf"):
        nms_by_torchvision(torch.tensor([[0.0, 0, 1, 1], [0, 0, math.inf, 1]]), torch.ones(2), 0.5)


def test_score_threshold_is_exclusive():
    boxes = random_boxes(4, 1) + torch.arange(4)[:, None] * 1000
    scores = torch.tensor([0.25, 0.5, 0.75, 0.1])
    assert nms(boxes, scores, 0.5, score_threshold=0.25).tolist() == [2, 1]
    assert nms(boxes, scores, 0.5, score_threshold=0.0).tolist() == [2, 1, 0, 3]
    assert nms(boxes, scores, 0.5, score_threshold=0.75).shape == (0,)
    assert nms(boxes, scores, 0.5, score_threshold=0.1).tolist() == [2, 1, 0]  # though float32's 0.1 is above 0.1
    assert nms(boxes, scores.double(), 0.5, score_threshold=0.1).tolist() == [2, 1, 0, 3]


def test_score_threshold_is_as_if_the_others_were_not_there():
    boxes, scores = crowded_boxes(200, 3), random_scores(200, 3)
    labels = torch.arange(200) % 3
    above = (scores > 0.6).nonzero().flatten()
    expected = above[nms(boxes[above], scores[above], 0.5, labels[above])]
    assert torch.equal(nms(boxes, scores, 0.5, labels, score_threshold=0.6), expected)


def test_max_detections_is_for_each_image():
    boxes, scores = crowded_boxes(400, 4), random_scores(400, 4, steps=20)
    images = torch.arange(400) % 5
    images[images == 3] = 7  # an image without boxes between
    everything = nms(boxes, scores, 0.5, image_index=images)
    for limit in (0, 1, 6, 1000):
        seen: dict[int, int] = {}
        expected = []
        for index in everything.tolist():
            image = int(images[index])
            seen[image] = seen.get(image, 0) + 1
            if seen[image] <= limit:
                expected.append(index)
        assert nms(boxes, scores, 0.5, image_index=images, max_detections=limit).tolist() == expected
    assert torch.equal(nms(boxes, scores, 0.5, max_detections=9), nms(boxes, scores, 0.5)[:9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    boxes, scores = crowded_boxes(200, 5).to(dtype), random_scores(200, 5).to(dtype)
    assert torch.equal(nms(boxes, scores, 0.5), ops.nms(boxes.float(), scores.float(), 0.5))


def test_double_scores_are_not_rounded():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    scores = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert nms(boxes, scores, 0.5).tolist() == [1]


def test_parameters_subclasses_and_numbers_of_other_types():
    boxes, scores = crowded_boxes(60, 8), random_scores(60, 8)
    expected = ops.nms(boxes, scores, 0.5)
    assert torch.equal(nms(torch.nn.Parameter(boxes), torch.nn.Parameter(scores), 0.5), expected)
    kept = nms(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(9, 9)), scores, 0.5)
    assert type(kept) is torch.Tensor
    assert torch.equal(kept, expected)
    for threshold in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(nms(boxes, scores, threshold), expected)
    assert torch.equal(nms(boxes, scores, 1), ops.nms(boxes, scores, 1.0))
    assert len(nms(boxes, scores, 0.5, score_threshold=1e300)) == 0


@pytest.mark.parametrize("limit", [None, 0, 1, 5])
def test_a_large_group_beside_small_ones(limit):
    boxes, scores = detector_boxes(3000, 9), random_scores(3000, 9, steps=900)
    generator = torch.Generator().manual_seed(9)
    labels = torch.where(
        torch.rand(3000, generator=generator) < 0.9, 3, torch.randint(40, (3000,), generator=generator)
    )
    for images in (torch.zeros_like(labels), (torch.rand(3000, generator=generator) < 0.1).long()):
        expected = by_group(boxes, scores, 0.5, labels, images)
        if limit is not None:
            ranks = [sum(images[j] == images[i] for j in expected[:k]) for k, i in enumerate(expected)]
            expected = [i for i, rank in zip(expected, ranks, strict=True) if rank < limit]
        assert nms(boxes, scores, 0.5, labels, images, max_detections=limit).tolist() == expected
        above = [i for i in expected if scores[i] > 0.9]
        assert nms(boxes, scores, 0.5, labels, images, 0.9, limit).tolist() == above
    assert (
        nms(boxes, scores, 0.5, score_threshold=0.5, max_detections=limit).tolist()
        == [i for i in ops.nms(boxes, scores, 0.5).tolist() if scores[i] > 0.5][:limit]
    )
    assert len(nms(boxes, scores, 0.5, score_threshold=1.0, max_detections=limit)) == 0


def test_tiny_thresholds_of_thin_boxes():
    # the intersection is the smallest float32, a third above the true one, so that boxes beyond `reach` overlap
    pair = [
        [-348147831.46, -4.325142847e-36, 9651852168.54, 4.325142847e-36],
        [-5e-11, -6e-21, 5e-11, 6e-21],
    ]
    across = torch.linspace(-3e8, 9e9, 600)
    down = torch.full((600,), 1e-3)
    fillers = torch.stack((across - 1e3, down, across + 1e3, down * 2), dim=1)
    boxes, scores = torch.cat((torch.tensor(pair), fillers)), torch.linspace(1, 0, 602)
    for threshold in (1.38928172537854e-20, 1e-7, 1e-6, 1e-5):
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


def test_transforms_of_torch_func():
    boxes, scores = crowded_boxes(60, 8), random_scores(60, 8)
    kept = ops.nms(boxes, scores, 0.5)
    assert torch.equal(torch.func.functionalize(lambda b, s: nms(b, s, 0.5))(boxes, scores), kept)
    gradient = torch.func.grad(lambda b: b[nms(b, scores, 0.5)].sum())(boxes)
    assert gradient.sum() == 4 * len(kept)


def test_tensors_without_memory_are_refused():
    with pytest.raises(ValueError, match="boxes is a tensor without memory"):
        nms(torch._efficientzerotensor((20, 4)), torch.rand(20), 0.5)


def test_default_device_does_not_matter():
    boxes, scores = crowded_boxes(600, 8), random_scores(600, 8)
    expected = ops.nms(boxes, scores, 0.5)
    with torch.device("meta"):
        assert torch.equal(nms(boxes, scores, 0.5), expected)
        assert torch.equal(nms(boxes, scores.double(), 0.5), expected)


def test_negated_views():
    boxes, scores = crowded_boxes(60, 8), random_scores(60, 8)
    kept = nms(boxes, torch._neg_view(scores), 0.5, score_threshold=-2.0)
    assert torch.equal(kept, ops.nms(boxes, -scores, 0.5))


def test_few_kept_do_not_hold_the_memory_of_all():
    kept = nms(torch.tensor([[0.0, 0, 10, 10]]).repeat(5000, 1), torch.rand(5000), 0.5)
    assert kept.untyped_storage().nbytes() < 1000


def test_kernel_stays_within_its_memory():
    random = np.random.default_rng(1)
    for trial in range(300):
        count = int(random.choice([0, 1, 16, 17, 400, 401, 500, 501, 513, 1000]))
        centres = random.uniform(-1, 1, (count, 2)) * 10.0 ** random.uniform(-3, 6, 2)
        centres[:, 1] *= trial % 3 > 0
        sides = np.exp(random.normal(0, trial % 4, (count, 2))) * 10.0 ** random.uniform(-3, 4)
        boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)
        scores = random.normal(size=count).astype(np.float32)
        offset, words = int(random.integers(16)), words_needed(count)
        around = np.full(words + offset + 64, 123.25, dtype=np.float32)
        kept = np.empty(count, dtype=np.int64)
        memory = around[offset : offset + words]
        found = suppress(boxes.ctypes.data, scores.ctypes.data, 0, 0, 0.3, -np.inf, count, memory, kept)
        assert (around[:offset] == 123.25).all()
        assert (around[offset + words :] == 123.25).all()
        assert kept[:found].tolist() == ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3).tolist()


def test_memory_is_enough_for_the_most_cells():
    # boxes on a line or in two corners have the most cells; more memory than words_needed would be written over
    for count in (501, 1000, 5000):
        line = torch.linspace(0, 1e5, count)
        for across, down in (
            (line, line * 0),
            (line, line),
            (line.flip(0), line),
            (torch.randperm(count), line * 1e-3),
        ):
            boxes = torch.stack((across, down, across + 0.5, down + 0.5), dim=1).float()
            columns, rows = _grid(boxes.flatten().numpy(), np.float32(0.5))[:2]
            assert columns * rows <= count / 4 + 1
            assert torch.equal(nms(boxes, line, 0.5), ops.nms(boxes, line, 0.5))


def test_layout_gradient_and_arguments():
    table = torch.cat((crowded_boxes(100, 6), random_scores(100, 6)[:, None]), dim=1).requires_grad_()
    boxes, scores = table[:, :4], table[:, 4]  # neither is contiguous
    before = table.detach().clone()
    kept = nms(boxes, scores, 0.5)
    assert torch.equal(kept, ops.nms(boxes.detach().contiguous(), scores.detach().contiguous(), 0.5))
    assert not kept.requires_grad
    assert torch.equal(table.detach(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    boxes, scores = random_boxes(30, 1), random_scores(30, 1)
    broken = scores.clone()
    broken[17] = value
    with pytest.raises(ValueError, match=rf"scores\[17\] is {value}"):
        nms(boxes, broken, 0.5, score_threshold=0.9)
    with pytest.raises(ValueError, match=rf"scores\[17\] is {value}"):
        nms(boxes, broken.requires_grad_(), 0.5)
    broken = boxes.clone()
    broken[3, 2] = value
    with pytest.raises(ValueError, match=rf"boxes\[3, 2\] is {value}"):
        nms(broken, scores, 0.5)


def test_boxes_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r"boxes\[0, 2\] is inf"):
        nms(torch.tensor([[0, 0, 1e300, 1]], dtype=torch.float64), torch.ones(1), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((3, 4))}, "boxes must be a torch.Tensor, but is a ndarray"),
        ({"scores": [0.1, 0.2, 0.3]}, "scores must be a torch.Tensor, but is a list"),
        ({"labels": np.zeros(3, dtype=int)}, "labels must be a torch.Tensor"),
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\) of a float dtype, but got \(3, 5\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes must be .* torch.int64"),
        ({"scores": torch.zeros(2)}, r"scores must be \(3,\)"),
        ({"scores": torch.zeros(3, 1)}, r"scores must be \(3,\)"),
        ({"scores": torch.zeros(3, dtype=torch.int64)}, "scores must be .* torch.int64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be \(3,\) integers"),
        ({"labels": torch.zeros(3)}, r"labels must be \(3,\) integers"),
        ({"image_index": torch.zeros(3, dtype=torch.bool)}, r"image_index must be \(3,\) integers"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in 0..1, but is 1.5"),
        ({"iou_threshold": math.nan}, "iou_threshold must be in"),
        ({"score_threshold": math.nan}, "score_threshold is NaN"),
        ({"max_detections": -1}, "max_detections must be 0 or more"),
        ({"scores": torch.zeros(3, device="meta")}, "on the device of the boxes, cpu"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "iou_threshold": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        nms(**arguments)


def test_importing_boxes_does_not_import_numba():
    code = "import sys, detkit.boxes; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_the_kernel_is_logged():
    code = """
import logging, torch
logging.basicConfig(level=logging.DEBUG)
from detkit.boxes import nms
nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loading the NMS kernel" in result.stderr
    assert re.search(r"NMS kernel (compiled|loaded from Numba's cache) in \d+\.\d s", result.stderr)
