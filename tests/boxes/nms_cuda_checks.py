"""Checks of NMS on a GPU. test_nms_cuda.py runs them: in Numba's simulator, and on a GPU where there is one.

The simulator starts a Python thread for each thread of the GPU, so there sizes are small and rounds smaller.
"""

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from test_nms import THRESHOLDS, by_group, crowded_boxes, random_scores
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

from detkit.boxes.kernels import nms_cuda_kernels
from detkit.boxes.kernels.nms_cuda import nms_on_gpu, nms_padded

SIMULATED = nms_cuda_kernels.simulated
DEVICE = "cpu" if SIMULATED else "cuda"
SMALL = {"ROUND": 24, "WORD": 8, "WORDS": 3, "SLICE": 12, "THREADS": 8, "RESOLVE_THREADS": 6, "RESOLVE_BLOCKS": 2}
if SIMULATED:  # its threads wait for one another without rest
    sys.setswitchinterval(2e-4)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the simulator's NumPy
only_on_gpu = pytest.mark.skipif(SIMULATED, reason="needs a GPU")


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """Several rounds, words and threads to a row even with few boxes; compiled kernels have their sizes built in."""
    if SIMULATED:
        for name, value in {**SMALL, "LEAST_BLOCKS": 1}.items():
            monkeypatch.setattr(nms_cuda_kernels, name, value)


def size(small, full):
    return small if SIMULATED else full


def to_device(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def gpu_nms(boxes, scores, threshold, labels=None, images=None, **limits):
    kept = nms_on_gpu(*to_device(boxes, scores), threshold, *to_device(labels, images), **limits)
    assert kept.dtype == torch.int64
    assert kept.device.type == DEVICE
    return kept.tolist()


def random_keys(count, seed, labels=4, images=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(labels, (count,), generator=generator), torch.randint(images, (count,), generator=generator)


MAKERS = {
    "crowded": crowded_boxes,
    "random": random_boxes,
    "whole": lambda count, seed: random_boxes(count, seed, whole=True),
    "subnormal areas": lambda count, seed: random_boxes(count, seed) * 1e-23,
    "infinite areas": lambda count, seed: random_boxes(count, seed) * 1e18,
    "degenerate": lambda count, seed: (
        DEGENERATE[torch.arange(count) % len(DEGENERATE)] + torch.arange(count)[:, None] % 5
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_equals_torchvision(kind):
    for seed, threshold in enumerate(size([0.0, 1 / 3, 0.5], THRESHOLDS)):
        count = size([50, 49, 8], [1, 63, 64, 65, 127, 4095, 4096, 4097, 10_000])[seed]
        boxes, scores = MAKERS[kind](count, seed), random_scores(count, seed, (None, 5)[seed % 2])
        assert gpu_nms(boxes, scores, threshold) == ops.nms(boxes, scores, threshold).tolist()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds(threshold):
    boxes, scores = torch.cat((random_boxes(14, 3, whole=True), DEGENERATE)), random_scores(20, 3)
    assert gpu_nms(boxes, scores, threshold) == ops.nms(boxes, scores, threshold).tolist()


@pytest.mark.skipif(not SIMULATED, reason="the other checks are of the real sizes")
def test_words_of_64(monkeypatch):
    for name, value in {"ROUND": 128, "WORD": 64, "WORDS": 2, "SLICE": 64}.items():
        monkeypatch.setattr(nms_cuda_kernels, name, value)
    # Pairs 64 apart: each word of a mask has its last bit set, or its first.
    boxes = random_boxes(66, 0, extent=1.0) + torch.arange(66)[:, None] * 100
    boxes = torch.cat((boxes, boxes[:63], boxes[:21]))
    scores = torch.linspace(1, 0, 150)
    assert gpu_nms(boxes, scores, 0.5) == list(range(66)) == ops.nms(boxes, scores, 0.5).tolist()
    twins = boxes[:63].clone()
    twins = torch.cat((twins, twins[:1], boxes[63:66], boxes[63:66]))  # rank 63 goes by rank 0
    assert gpu_nms(twins, scores[: len(twins)], 0.5) == [*range(63), 64, 65, 66]


@pytest.mark.parametrize("steps", [None, 6])
def test_images_and_classes_equal_torchvision_on_each(steps):
    for seed in range(size(1, 5)):
        count = size(50, 20_000)
        boxes, scores = crowded_boxes(count, seed), random_scores(count, seed, steps)
        labels, images = random_keys(count, seed, labels=2 + 3 * seed)
        labels = labels.to(torch.int64 if steps else torch.int8)
        nowhere = torch.zeros_like(images)
        assert gpu_nms(boxes, scores, 0.4, labels, images) == by_group(boxes, scores, 0.4, labels, images)
        assert gpu_nms(boxes, scores, 0.4, labels - 1) == by_group(boxes, scores, 0.4, labels, nowhere)
        assert gpu_nms(boxes, scores, 0.4, None, images * 2**40) == by_group(boxes, scores, 0.4, nowhere, images)


@only_on_gpu
def test_a_full_batch():
    count = 80_000
    boxes, scores = crowded_boxes(count, 0), random_scores(count, 0, 10_000)
    labels, images = random_keys(count, 0, labels=80, images=8)
    assert gpu_nms(boxes, scores, 0.5, labels, images) == by_group(boxes, scores, 0.5, labels, images)
    assert gpu_nms(boxes, scores, 0.5) == ops.nms(boxes, scores, 0.5).tolist()


def test_score_threshold_is_exclusive():
    boxes = random_boxes(4, 1) + torch.arange(4)[:, None] * 1000
    scores = torch.tensor([0.25, 0.5, 0.75, 0.1])
    assert gpu_nms(boxes, scores, 0.5, score_threshold=0.25) == [2, 1]
    assert gpu_nms(boxes, scores, 0.5, score_threshold=0.75) == []


def test_score_threshold_is_as_if_the_others_were_not_there():
    count = size(50, 20_000)
    boxes, scores = crowded_boxes(count, 3), random_scores(count, 3)
    labels, images = random_keys(count, 3, labels=2, images=2)
    above = (scores > 0.4).nonzero().flatten()
    expected = above[by_group(boxes[above], scores[above], 0.5, labels[above], images[above])].tolist()
    assert gpu_nms(boxes, scores, 0.5, labels, images, score_threshold=0.4) == expected
    expected = above[ops.nms(boxes[above], scores[above], 0.5)].tolist()
    assert gpu_nms(boxes, scores, 0.5, score_threshold=0.4) == expected


def test_max_detections_is_for_each_image():
    count = size(40, 10_000)
    boxes, scores = crowded_boxes(count, 4), random_scores(count, 4, steps=20)
    labels, images = random_keys(count, 4)
    images[images == 1] = 7  # images without boxes between
    everything = by_group(boxes, scores, 0.5, labels, images)
    for limit in (0, 4, 10**6):
        seen: dict[int, int] = {}
        expected = []
        for index in everything:
            image = int(images[index])
            seen[image] = seen.get(image, 0) + 1
            if seen[image] <= limit:
                expected.append(index)
        assert gpu_nms(boxes, scores, 0.5, labels, images, max_detections=limit) == expected
    of_one_image = ops.nms(boxes, scores, 0.5)
    assert len(of_one_image) > 2
    assert gpu_nms(boxes, scores, 0.5, max_detections=2) == of_one_image[:2].tolist()


def test_status_places_what_is_not_finite():
    boxes, scores = to_device(random_boxes(6, 1), random_scores(6, 1))
    scores[4] = scores[5] = math.nan
    assert nms_padded(boxes, scores, 0.5)[1][1] == 24 + 4
    boxes[3, 2] = boxes[4, 0] = -math.inf
    assert nms_padded(boxes, scores, 0.5)[1][1] == 14


def test_padded_result_is_a_permutation():
    boxes, scores = crowded_boxes(30, 5), random_scores(30, 5)
    indices, status = nms_padded(*to_device(boxes, scores), 0.5)
    expected = ops.nms(boxes, scores, 0.5).tolist()
    assert status.tolist() == [len(expected), -1]
    assert indices.tolist()[: len(expected)] == expected
    others = [i for i in scores.argsort(descending=True, stable=True).tolist() if i not in expected]
    assert indices.tolist()[len(expected) :] == others


def test_no_boxes():
    indices, status = nms_padded(*to_device(torch.empty(0, 4), torch.empty(0)), 0.5)
    assert indices.shape == (0,)
    assert status.tolist() == [0, -1]
    none = torch.empty(0, dtype=torch.int64)
    assert gpu_nms(torch.empty(0, 4), torch.empty(0), 0.5, none, none, score_threshold=0.1, max_detections=3) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    boxes, scores = crowded_boxes(30, 5).to(dtype), random_scores(30, 5).to(dtype)
    assert gpu_nms(boxes, scores, 0.5) == ops.nms(boxes.float(), scores.float(), 0.5).tolist()


def test_double_scores_are_not_rounded():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    assert gpu_nms(boxes, torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64), 0.5) == [1]


def test_layout_gradient_and_arguments():
    table = torch.cat((crowded_boxes(30, 6), random_scores(30, 6)[:, None]), dim=1).to(DEVICE).requires_grad_()
    before = table.detach().clone()
    kept = nms_on_gpu(table[:, :4], table[:, 4], 0.5)  # neither is contiguous
    assert kept.tolist() == ops.nms(before[:, :4].cpu().contiguous(), before[:, 4].cpu().contiguous(), 0.5).tolist()
    assert not kept.requires_grad
    assert torch.equal(table.detach(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    boxes, scores = to_device(random_boxes(20, 1), random_scores(20, 1))
    scores[17] = scores[19] = value
    with pytest.raises(ValueError, match=rf"^scores\[17\] is {value}"):
        nms_on_gpu(boxes, scores, 0.5, score_threshold=0.9)
    boxes[3, 2] = boxes[4, 0] = value
    with pytest.raises(ValueError, match=rf"^boxes\[3, 2\] is {value}"):
        nms_on_gpu(boxes, scores, 0.5)


def test_boxes_beyond_float32_are_refused():
    boxes = torch.tensor([[0, 0, 1e300, 1]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"boxes\[0, 2\] is inf"):
        nms_on_gpu(*to_device(boxes, torch.ones(1)), 0.5)


def test_other_devices_are_refused():
    elsewhere = torch.zeros(3, 4, device="meta")
    with pytest.raises(ValueError, match=f"boxes must be on a device of type {DEVICE}, but are on meta"):
        nms_padded(elsewhere, elsewhere[:, 0], 0.5)


class NoWaiting(TorchDispatchMode):
    """Refuses the operators whose result, or whose result's size, the host must wait for."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name.startswith(self.WAIT) or name.startswith("_unique"):
            raise AssertionError(f"the host waits for {name}")
        if name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), "the host waits for a mask"
        return function(*args, **(kwargs or {}))


def refuse_copy(tensor):
    raise AssertionError("the host waits for a copy")


@contextmanager
def nothing_waits():
    """Fails where the host would wait for the device; on a GPU torch itself watches too."""
    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for method in ("tolist", "cpu"):  # of tensors on the CPU, these are no operators
            patch.setattr(torch.Tensor, method, refuse_copy)
        if not SIMULATED:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if not SIMULATED:
                torch.cuda.set_sync_debug_mode("default")


WAITING = [
    lambda x: x.sum().item(),
    lambda x: bool(x[0] > 0),
    lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: (x > 0).nonzero(),
    lambda x: x.unique(),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: x.__setitem__(x > 0, x + 1),
    lambda x: torch.repeat_interleave(x, (x > 0).long()),
]


@pytest.mark.parametrize("waiting", WAITING)
def test_the_guard_finds_waiting(waiting):
    values = torch.arange(3.0)
    with pytest.raises(AssertionError, match="the host waits"), nothing_waits():
        waiting(values)


def test_nothing_waits_for_the_device():
    count = size(20, 10_000)
    boxes, scores, labels, images = to_device(crowded_boxes(count, 7), random_scores(count, 7), *random_keys(count, 7))
    nms_padded(boxes, scores, 0.5)  # compiles
    with nothing_waits():
        nms_padded(boxes, scores, 0.5)
        nms_padded(boxes[:0], scores[:0], 0.5)
        nms_padded(boxes, scores, 0.5, max_detections=5)
        indices, status = nms_padded(boxes, scores, 0.5, labels, images, score_threshold=0.1, max_detections=5)
    kept = nms_on_gpu(boxes, scores, 0.5, labels, images, score_threshold=0.1, max_detections=5)
    assert indices[: int(status[0])].tolist() == kept.tolist()


@only_on_gpu
def test_cuda_graph():
    boxes, scores, labels, images = to_device(
        crowded_boxes(10_000, 8), random_scores(10_000, 8), *random_keys(10_000, 8)
    )
    arguments = {"labels": labels, "image_index": images, "score_threshold": 0.1, "max_detections": 100}
    nms_padded(boxes, scores, 0.5, **arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, status = nms_padded(boxes, scores, 0.5, **arguments)
    for seed in range(3):
        boxes.copy_(crowded_boxes(10_000, seed))
        scores.copy_(random_scores(10_000, seed))
        graph.replay()
        assert indices[: int(status[0])].tolist() == nms_on_gpu(boxes, scores, 0.5, **arguments).tolist()


@only_on_gpu
def test_current_stream():
    boxes, scores = crowded_boxes(10_000, 9), random_scores(10_000, 9)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert gpu_nms(boxes, scores, 0.5) == ops.nms(boxes, scores, 0.5).tolist()
