import math
import time

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from detkit.boxes import match_bipartite, match_ssd, match_two_thresholds, pairwise_iou

MATCHERS = [match_bipartite, match_ssd, match_two_thresholds]


def plain_bipartite(iou, threshold):
    """The assignment as the book tells it, the whole matrix searched for every truth; -1 is background."""
    anchors, truths = iou.shape
    result = [-1] * anchors
    for anchor in range(anchors):
        best = max(range(truths), key=lambda n: (iou[anchor, n].item(), -n))
        if iou[anchor, best] >= threshold:
            result[anchor] = best
    matrix = iou.clone()
    for _ in range(min(anchors, truths)):
        anchor, truth = divmod(int(torch.argmax(matrix.flatten())), truths)
        result[anchor] = truth
        matrix[anchor] = -1
        matrix[:, truth] = -1
    return torch.tensor(result)


def with_sentinel(match):
    return torch.where(match.positive, match.truth_index, torch.where(match.ignored, -2, -1))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("anchor_count", "truth_count"), [(1, 1), (60, 1), (60, 7), (5, 5), (4, 9)])
def test_bipartite_equals_a_plain_loop(anchor_count, truth_count, whole):
    for seed in range(25):
        anchors, truths = (
            random_boxes(anchor_count, seed, whole=whole),
            random_boxes(truth_count, seed + 50, whole=whole),
        )
        match = match_bipartite(anchors, truths, threshold=0.4)
        assert with_sentinel(match).tolist() == plain_bipartite(pairwise_iou(anchors, truths), 0.4).tolist()
        assert not match.ignored.any()


def test_bipartite_with_equal_and_disjoint_boxes():
    # every IoU is 1 or 0, so that ties alone decide
    for seed in range(10):
        corners = torch.randint(0, 3, (8, 2), generator=torch.Generator().manual_seed(seed)) * 20.0
        boxes = torch.cat((corners, corners + 20), dim=1)
        match = match_bipartite(boxes[:5], boxes[5:])
        assert with_sentinel(match).tolist() == plain_bipartite(pairwise_iou(boxes[:5], boxes[5:]), 0.5).tolist()


def test_bipartite_gives_every_truth_an_anchor():
    anchors, truths = random_boxes(30, 1), random_boxes(12, 2)
    match = match_bipartite(anchors, truths, threshold=1.1)  # only the bound ones
    assert sorted(match.truth_index[match.positive].tolist()) == list(range(12))


def test_bipartite_example_of_the_book():
    # D2L 14.4: two truths, five anchors; the book's result is background, dog, cat, background, cat
    truths = torch.tensor([[0.1, 0.08, 0.52, 0.92], [0.55, 0.2, 0.9, 0.88]])
    anchors = torch.tensor(
        [
            [0, 0.1, 0.2, 0.3],
            [0.15, 0.2, 0.4, 0.4],
            [0.63, 0.05, 0.88, 0.98],
            [0.66, 0.45, 0.8, 0.8],
            [0.57, 0.3, 0.92, 0.9],
        ]
    )
    assert with_sentinel(match_bipartite(anchors, truths)).tolist() == [-1, 0, 1, -1, 1]


def test_bipartite_is_fast_where_truths_compete():
    anchors, truths = random_boxes(10_000, 3), random_boxes(50, 4)
    started = time.perf_counter()
    match_bipartite(anchors, truths)
    match_bipartite(anchors, truths[:1].repeat(50, 1))  # all want the same anchor, again and again
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine


@pytest.mark.parametrize("whole", [False, True])
def test_ssd_equals_torchvision(whole):
    for seed in range(40):
        anchors, truths = random_boxes(80, seed, whole=whole), random_boxes(1 + seed % 9, seed + 60, whole=whole)
        match = match_ssd(anchors, truths, threshold=0.5)
        assert with_sentinel(match).tolist() == SSDMatcher(0.5)(box_iou(truths, anchors)).tolist()


def test_ssd_gives_a_shared_best_anchor_to_the_later_truth():
    truths = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    match = match_ssd(torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), truths)
    assert with_sentinel(match).tolist() == [1, -1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("force_best", [True, False])
def test_two_thresholds_equal_torchvision(whole, force_best):
    for seed in range(40):
        anchors, truths = random_boxes(150, seed, whole=whole), random_boxes(1 + seed % 9, seed + 60, whole=whole)
        iou = box_iou(truths, anchors)
        assert (iou.max(1).values > 0).all()
        match = match_two_thresholds(anchors, truths, force_best=force_best)
        assert with_sentinel(match).tolist() == Matcher(0.7, 0.3, force_best)(iou).tolist()


def test_two_thresholds_at_the_thresholds():
    truth = torch.tensor([[0.0, 0, 10, 100]])
    anchors = torch.tensor([[0.0, 0, 10, h] for h in (24, 25, 74, 75, 100)])
    match = match_two_thresholds(anchors, truth, low=0.25, high=0.75)
    assert with_sentinel(match).tolist() == [-1, -2, -2, 0, 0]


def test_a_truth_that_overlaps_nothing_forces_no_anchor_in_two_thresholds():
    anchors = random_boxes(50, 1)
    far = torch.tensor([[500.0, 500, 600, 600], [20, 20, 20, 20]])
    assert not match_two_thresholds(anchors, far).positive.any()
    # torchvision: all of them
    assert (Matcher(0.7, 0.3, True)(box_iou(far[:1], anchors)) == 0).all()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_no_truths_or_no_anchors(matcher):
    match = matcher(random_boxes(6, 1), torch.zeros(0, 4))
    assert match.negative.tolist() == [True] * 6
    assert match.truth_index.shape == (6,)
    match = matcher(torch.zeros(0, 4), random_boxes(3, 1))
    assert match.positive.shape == match.truth_index.shape == (0,)
    assert matcher(torch.zeros(0, 4), torch.zeros(0, 4)).ignored.shape == (0,)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_ignored_truths_take_no_part_in_what_is_positive(matcher):
    for seed in range(10):
        anchors, truths = random_boxes(80, seed), random_boxes(8, seed + 30)
        skip = torch.arange(8) % 3 == 1
        match, plain = matcher(anchors, truths, skip), matcher(anchors, truths[~skip])
        assert torch.equal(match.positive, plain.positive)
        kept = (~skip).nonzero().flatten()
        assert torch.equal(match.truth_index[match.positive], kept[plain.truth_index[plain.positive]])
        assert not (match.positive & match.ignored).any()
        assert (match.ignored | ~plain.ignored).all()
        assert match.ignored.sum() > plain.ignored.sum()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_only_ignored_truths(matcher):
    anchors = torch.tensor([[10.0, 10, 20, 20], [90, 90, 120, 120], [95, 0, 105, 10], [96, 0, 106, 10]])
    match = matcher(anchors, torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([True]))
    # inside the region; a ninth of it inside; half inside; less than half
    assert match.ignored.tolist() == [True, False, True, False]
    assert not match.positive.any()


def test_iou_with_an_ignored_truth_reaches_the_lower_threshold():
    # the anchor is twice and a half the truth: 0.4 of its area is covered, and the IoU is 0.4
    anchor, truth, ignored = torch.tensor([[0.0, 0, 25, 10]]), torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([True])
    assert match_two_thresholds(anchor, truth, ignored).ignored.item()
    assert match_ssd(anchor, truth, ignored).negative.item()
    assert match_ssd(anchor, truth, ignored, threshold=0.4).ignored.item()
    assert match_bipartite(anchor, truth, ignored, threshold=0.4).ignored.item()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_degenerate_truths(matcher):
    anchors = random_boxes(40, 2)
    match = matcher(anchors, DEGENERATE)
    assert 5 in match.truth_index[match.positive]  # the one that has an area


@pytest.mark.parametrize("matcher", MATCHERS)
def test_nan_and_wrong_masks_are_refused(matcher):
    boxes, broken = random_boxes(4, 1), random_boxes(4, 1)
    broken[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"truths\[2\] holds NaN"):
        matcher(boxes, broken)
    with pytest.raises(ValueError, match=r"anchors\[2\] holds NaN"):
        matcher(broken, boxes)
    with pytest.raises(ValueError, match=r"ignored_truths must be \(4,\) bool"):
        matcher(boxes, boxes, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ignored_truths must be \(4,\) bool"):
        matcher(boxes, boxes, torch.zeros(4))


def test_swapped_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"low must not be above high, but they are 0.7 and 0.3"):
        match_two_thresholds(random_boxes(2, 1), random_boxes(2, 2), low=0.7, high=0.3)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_arguments_are_not_changed(matcher):
    anchors, truths = random_boxes(30, 1), random_boxes(5, 2)
    before = anchors.clone(), truths.clone()
    matcher(anchors, truths)
    assert torch.equal(anchors, before[0])
    assert torch.equal(truths, before[1])
