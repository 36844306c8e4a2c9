import logging
import math

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from torchvision import ops

from detkit.boxes.fusion import weighted_box_fusion


def several_models(count, seed, models=3, steps=None):
    """Boxes that several models found around the same objects: boxes, scores, labels, image_index, source_index."""
    generator = torch.Generator().manual_seed(seed)
    objects = random_boxes(max(1, count // 8), seed, extent=200)
    boxes = objects[torch.randint(len(objects), (count,), generator=generator)]
    boxes = boxes + torch.randn(count, 4, generator=generator) * 4
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = torch.rand(count, generator=generator)
    if steps is not None:
        scores = (scores * steps).floor() / steps
    labels, images, sources = (torch.randint(n, (count,), generator=generator) for n in (2, 2, models))
    return boxes, scores, labels, images, sources


def plain_fusion(boxes, scores, iou_threshold=0.55, source_index=None, source_weights=(1,), score_threshold=-1):
    """The paper's loop for one image and class: fused boxes, scores, counts and first members, best score first."""
    sources = torch.zeros(len(boxes), dtype=torch.int64) if source_index is None else source_index
    confidences = scores.double() * torch.tensor(source_weights, dtype=torch.float64)[sources]
    clusters, fused = [], []
    for i in sorted(range(len(boxes)), key=lambda i: (-confidences[i].item(), i)):
        if not scores[i] > score_threshold:
            continue
        iou = ops.box_iou(boxes[i : i + 1].float(), torch.stack(fused))[0].nan_to_num(0) if fused else torch.zeros(0)
        if len(iou) and iou.max().item() > iou_threshold:
            best = int(iou.argmax())
            clusters[best].append(i)
            members = clusters[best]
            if confidences[i] > 0:
                mean = (confidences[members, None] * boxes[members].double()).sum(0) / confidences[members].sum()
                fused[best] = mean.float()
        else:
            clusters.append([i])
            fused.append(boxes[i].float())
    rows = []
    for box, members in zip(fused, clusters):
        mean = sum(confidences[members].tolist()) / len(members)
        score = torch.tensor(mean * min(len(members), len(source_weights)) / sum(source_weights), dtype=scores.dtype)
        rows.append((score.item(), members[0], box.tolist(), len(members)))
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def assert_equal(fused, rows, labels=None, images=None):
    """`rows` are those of `plain_fusion`, whose second column points into labels and images."""
    torch.testing.assert_close(fused.scores.double(), torch.tensor([row[0] for row in rows]).double())
    torch.testing.assert_close(fused.boxes, torch.tensor([row[2] for row in rows]).reshape(-1, 4))
    assert fused.counts.tolist() == [row[3] for row in rows]
    for got, given in ((fused.labels, labels), (fused.image_index, images)):
        assert got is None if given is None else got.tolist() == [given[row[1]].item() for row in rows]


@pytest.mark.parametrize("count", [0, 1, 2, 30, 150])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.55, 0.8, 1.0])
def test_equals_a_plain_loop(count, iou_threshold):
    for seed in range(4):
        boxes, scores, _, _, sources = several_models(count, seed)
        for weights in ((1, 1, 1), (2.0, 0.5, 1.25)):
            fused = weighted_box_fusion(boxes, scores, iou_threshold, source_index=sources, source_weights=weights)
            assert_equal(fused, plain_fusion(boxes, scores, iou_threshold, sources, weights))
        assert_equal(weighted_box_fusion(boxes, scores, iou_threshold), plain_fusion(boxes, scores, iou_threshold))


def test_more_clusters_than_a_block_of_the_kernel_holds():
    boxes, scores, _, _, sources = several_models(3000, 1)
    boxes += random_boxes(3000, 7, extent=20).round()[:, :1] * 100  # 20 places far from each other
    fused = weighted_box_fusion(boxes, scores, 0.7, source_index=sources, source_weights=(1, 1, 1))
    assert len(fused.boxes) > 1000
    assert (fused.counts > 1).sum() > 100
    assert_equal(fused, plain_fusion(boxes, scores, 0.7, sources, (1, 1, 1)))


def test_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14], [0, 0, 10, 11], [50, 50, 60, 60]])
    scores = torch.tensor([0.75, 0.25, 0.5, 0.5])
    sources = torch.tensor([0, 1, 1, 2])
    fused = weighted_box_fusion(boxes, scores, source_index=sources, source_weights=(1, 1, 1))
    # the IoUs with the first box, or what it has become, are 10/11 and 10.4/14
    bottom = (0.75 * 10 + 0.5 * 11 + 0.25 * 14) / 1.5
    torch.testing.assert_close(fused.boxes, torch.tensor([[0, 0, 10, bottom], [50, 50, 60, 60]]))
    torch.testing.assert_close(fused.scores, torch.tensor([1.5 / 3 * 3 / 3, 0.5 * 1 / 3]))
    assert fused.counts.tolist() == [3, 1]
    assert fused.labels is None
    assert fused.image_index is None
    # weights 2, 1, 1: confidences 1.5, 0.25, 0.5, 0.5
    fused = weighted_box_fusion(boxes, scores, source_index=sources, source_weights=torch.tensor([2, 1, 1]))
    bottom = (1.5 * 10 + 0.5 * 11 + 0.25 * 14) / 2.25
    torch.testing.assert_close(fused.boxes, torch.tensor([[0, 0, 10, bottom], [50, 50, 60, 60]]))
    torch.testing.assert_close(fused.scores, torch.tensor([2.25 / 3 * 3 / 4, 0.5 * 1 / 4]))


# left, top, right, bottom, score, label
THREE_MODELS = [
    [0.161, 0.023, 0.413, 0.483, 0.27, 0],
    [0.494, 0.139, 0.893, 0.574, 0.29, 0],
    [0.207, 0.589, 0.492, 0.93, 0.75, 1],
    [0.088, 0.114, 0.393, 0.529, 0.42, 0],
    [0.501, 0.246, 0.916, 0.585, 0.87, 0],
    [0.216, 0.658, 0.492, 0.943, 0.73, 0],
    [0.073, 0.091, 0.426, 0.517, 0.67, 0],
    [0.52, 0.115, 0.931, 0.571, 0.82, 0],
    [0.208, 0.621, 0.487, 0.918, 0.77, 1],
]
# recorded from weighted_boxes_fusion of ensemble_boxes 1.0.9 with iou_thr=0.55, weights=(2, 0.5, 1.25)
FUSED_BY_ENSEMBLE_BOXES = [
    [0.2073909, 0.6015076, 0.4900457, 0.9253096, 0.6566667, 1],
    [0.5085564, 0.1497574, 0.9169976, 0.5748382, 0.544, 0],
    [0.1049181, 0.0709118, 0.4172126, 0.507022, 0.4233333, 0],
    [0.216, 0.658, 0.492, 0.943, 0.0973333, 0],
]


def test_what_ensemble_boxes_computes():
    boxes = torch.tensor(THREE_MODELS)
    sources = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    fused = weighted_box_fusion(
        boxes[:, :4], boxes[:, 4], labels=boxes[:, 5].long(), source_index=sources, source_weights=(2, 0.5, 1.25)
    )
    expected = torch.tensor(FUSED_BY_ENSEMBLE_BOXES)
    torch.testing.assert_close(fused.boxes, expected[:, :4])
    torch.testing.assert_close(fused.scores, expected[:, 4])
    assert fused.labels.tolist() == expected[:, 5].tolist()


def test_images_and_classes_equal_each_alone():
    for seed in range(5):
        boxes, scores, labels, images, sources = several_models(120, seed, steps=(None, 10)[seed % 2])
        labels, images = labels * 2**40, images - 1
        for keys in ((labels, images), (labels, None), (None, images)):
            apart = [torch.zeros_like(labels) if key is None else key for key in keys]
            fused = weighted_box_fusion(boxes, scores, 0.5, *keys, sources, (1, 2, 1))
            assert (fused.scores[:-1] >= fused.scores[1:]).all()
            assert fused.counts.sum() == len(boxes)
            groups = 0
            for image in apart[1].unique():
                for label in apart[0].unique():
                    members = (apart[1] == image) & (apart[0] == label)
                    alone = weighted_box_fusion(
                        boxes[members], scores[members], 0.5, source_index=sources[members], source_weights=(1, 2, 1)
                    )
                    chosen = torch.ones(len(fused.boxes), dtype=torch.bool)
                    if keys[0] is not None:
                        chosen &= fused.labels == label
                    if keys[1] is not None:
                        chosen &= fused.image_index == image
                    assert torch.equal(fused.boxes[chosen], alone.boxes)
                    assert torch.equal(fused.scores[chosen], alone.scores)
                    assert torch.equal(fused.counts[chosen], alone.counts)
                    groups += 1
            assert groups > 1


def test_classes_far_out_are_exact():
    box = torch.tensor([[1e6, 1e6, 1e6 + 3, 1e6 + 3], [1e6 + 2, 1e6, 1e6 + 5, 1e6 + 3]])
    boxes, labels = box.repeat(2, 1), torch.tensor([0, 0, 2**40, 2**40])
    fused = weighted_box_fusion(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), labels=labels)
    assert torch.equal(fused.boxes, boxes)
    assert fused.labels.tolist() == labels.tolist()


def test_a_box_joins_the_cluster_it_overlaps_most():
    # the third overlaps both fused boxes by more than the threshold, and the second more
    boxes = torch.tensor([[0.0, 0, 10, 10], [6, 0, 16, 10], [4, 0, 14, 10]])
    fused = weighted_box_fusion(boxes, torch.tensor([0.75, 0.5, 0.5]), 0.3)
    torch.testing.assert_close(fused.boxes, torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10]]))
    # of equal overlaps the cluster founded first
    boxes[2] = torch.tensor([3.0, 0, 13, 10])
    assert weighted_box_fusion(boxes, torch.tensor([0.75, 0.5, 0.5]), 0.3).counts.tolist() == [2, 1]


def test_iou_of_exactly_the_threshold_does_not_join():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]), torch.tensor([0.9, 0.8])
    assert weighted_box_fusion(boxes, scores, 0.5).counts.tolist() == [1, 1]
    assert weighted_box_fusion(boxes, scores, 0.4999).counts.tolist() == [2]


def test_identical_boxes():
    boxes = torch.tensor([[1.1, 2.2, 33.3, 44.4]]).repeat(7, 1)
    sources = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    fused = weighted_box_fusion(boxes, torch.full((7,), 0.8), 0.99, source_index=sources, source_weights=(1, 1, 1))
    torch.testing.assert_close(fused.boxes, boxes[:1])
    torch.testing.assert_close(fused.scores, torch.tensor([0.8]))  # not more for more boxes than models
    assert fused.counts.tolist() == [7]


def test_one_box_of_one_model_is_unchanged():
    boxes, scores = torch.tensor([[0.1, 0.2, 0.7, 0.9]]), torch.tensor([0.3])
    fused = weighted_box_fusion(boxes, scores)
    assert torch.equal(fused.boxes, boxes)
    assert torch.equal(fused.scores, scores)
    fused = weighted_box_fusion(boxes, scores, source_index=torch.tensor([1]), source_weights=(1, 1))
    torch.testing.assert_close(fused.scores, torch.tensor([0.15]))


def test_equal_scores_go_by_first_member():
    boxes = random_boxes(6, 1) + torch.arange(6)[:, None] * 1000
    labels = torch.tensor([2, 0, 1, 2, 0, 1])
    fused = weighted_box_fusion(boxes, torch.full((6,), 0.5), labels=labels, image_index=labels.flip(0))
    assert torch.equal(fused.boxes, boxes)
    assert fused.labels.tolist() == labels.tolist()
    assert fused.image_index.tolist() == labels.flip(0).tolist()


def test_score_threshold_is_exclusive_and_before_the_weights():
    boxes = random_boxes(4, 1) + torch.arange(4)[:, None] * 1000
    scores = torch.tensor([0.25, 0.5, 0.75, 0.1])
    sources = torch.tensor([0, 1, 1, 0])
    fused = weighted_box_fusion(
        boxes, scores, source_index=sources, source_weights=(10, 0.1), score_threshold=torch.tensor(0.1).item()
    )
    assert torch.equal(fused.boxes, boxes[[0, 2, 1]])
    assert len(weighted_box_fusion(boxes, scores, score_threshold=0.75).boxes) == 0


def test_boxes_without_area_stay_by_themselves():
    for seed in range(5):
        boxes = torch.cat((DEGENERATE, DEGENERATE, random_boxes(10, seed), random_boxes(10, seed)[:, [2, 3, 0, 1]]))
        scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(seed))
        fused = weighted_box_fusion(boxes, scores, 0.0)
        assert_equal(fused, plain_fusion(boxes, scores, 0.0))
        width, height = (fused.boxes[:, 2:] - fused.boxes[:, :2]).unbind(1)
        assert ((width <= 0) | (height <= 0)).sum() == 20


def test_scores_of_zero():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60], [50, 50, 60, 61]])
    fused = weighted_box_fusion(boxes, torch.tensor([0.5, 0, 0, 0]))
    assert torch.equal(fused.boxes, boxes[[0, 2]])
    assert fused.scores.tolist() == [0.25, 0.0]
    assert fused.counts.tolist() == [2, 2]


@pytest.mark.parametrize("scale", [1e-23, 1e18])
def test_areas_that_underflow_or_overflow(scale):
    # subnormal areas lose digits, and infinite ones overlap nothing; nothing is NaN
    boxes, scores, *_ = several_models(60, 1)
    assert_equal(weighted_box_fusion(boxes * scale, scores), plain_fusion(boxes * scale, scores))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    boxes, scores, *_ = several_models(100, 5)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    fused = weighted_box_fusion(boxes, scores)
    promoted = scores if dtype == torch.float64 else scores.float()
    assert_equal(fused, plain_fusion(boxes.float(), promoted))
    assert fused.boxes.dtype == torch.float32
    assert fused.scores.dtype == promoted.dtype


def test_empty():
    none = torch.zeros(0, dtype=torch.int32)
    fused = weighted_box_fusion(torch.zeros(0, 4), torch.zeros(0), 0.5, none, none, none, (1, 1))
    assert fused.boxes.shape == (0, 4)
    assert fused.scores.shape == fused.labels.shape == fused.image_index.shape == fused.counts.shape == (0,)
    dtypes = [tensor.dtype for tensor in fused]
    assert dtypes == [torch.float32, torch.float32, torch.int32, torch.int32, torch.int64]
    assert weighted_box_fusion(torch.zeros(0, 4), torch.zeros(0)).boxes.shape == (0, 4)


def test_layout_gradient_and_arguments():
    boxes, scores, *_ = several_models(100, 6)
    table = torch.cat((boxes, scores[:, None]), dim=1).requires_grad_()
    fused = weighted_box_fusion(table[:, :4], table[:, 4])  # neither is contiguous
    expected = weighted_box_fusion(boxes, scores)
    assert torch.equal(fused.boxes, expected.boxes)
    assert torch.equal(fused.scores, expected.scores)
    assert not fused.boxes.requires_grad
    assert not fused.scores.requires_grad
    assert torch.equal(table.detach(), torch.cat((boxes, scores[:, None]), dim=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    boxes, scores, *_ = several_models(30, 1)
    broken = scores.clone()
    broken[17] = value
    with pytest.raises(ValueError, match=rf"scores\[17\] is {value}"):
        weighted_box_fusion(boxes, broken)
    broken = boxes.clone()
    broken[3, 2] = value
    with pytest.raises(ValueError, match=rf"boxes\[3, 2\] is {value}"):
        weighted_box_fusion(broken, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\)"),
        ({"scores": torch.zeros(2)}, r"scores must be \(3,\)"),
        ({"scores": torch.tensor([0.5, -0.25, 1])}, r"scores\[1\] is -0.25"),
        ({"labels": torch.zeros(3)}, r"labels must be \(3,\) integers"),
        ({"image_index": torch.zeros(2, dtype=torch.int64)}, r"image_index must be \(3,\) integers"),
        ({"source_index": torch.zeros(3)}, r"source_index must be \(3,\) integers"),
        ({"source_index": torch.tensor([0, 1, 2])}, r"source_index\[2\] is 2, but there are 2 source_weights"),
        ({"source_index": torch.tensor([0, -1, 2])}, r"source_index\[1\] is -1, .* must be in 0..1"),
        ({"source_index": None}, "source_weights need source_index"),
        ({"source_weights": None}, "source_index needs source_weights"),
        ({"source_weights": ()}, r"source_weights must be \(N,\), at least one"),
        ({"source_weights": torch.ones(2, 2)}, r"source_weights must be \(N,\)"),
        ({"source_weights": (1, math.nan)}, r"source_weights\[1\] is nan"),
        ({"source_weights": (1, 0)}, r"source_weights\[1\] is 0.0, but must be above 0"),
        ({"score_threshold": math.nan}, "score_threshold is nan"),
        ({"iou_threshold": 1.5}, "iou_threshold must be in 0..1, but is 1.5"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    sources = torch.tensor([0, 1, 0])
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "source_index": sources, **change}
    with pytest.raises(ValueError, match=message):
        weighted_box_fusion(**{"source_weights": (1, 1), **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors(caplog):
    boxes, scores, *keys = several_models(300, 1)
    with caplog.at_level(logging.DEBUG, "detkit.boxes.fusion"):
        on_gpu = [tensor.cuda() for tensor in (boxes, scores, *keys)]
        fused = weighted_box_fusion(*on_gpu[:2], 0.5, *on_gpu[2:], torch.ones(3).cuda())
    for got, expected in zip(fused, weighted_box_fusion(boxes, scores, 0.5, *keys, (1, 1, 1))):
        assert got.device.type == "cuda"
        assert torch.equal(got.cpu(), expected)
    assert "on the CPU" in caplog.text
