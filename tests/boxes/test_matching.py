import math
import sys
import time

import pytest
import torch
from box_samples import DEGENERATE, random_boxes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from detkit.boxes import (
    best_overlap,
    elementwise_iou,
    intersection_over_area,
    match_bipartite,
    match_ssd,
    match_two_thresholds,
    matching,
    pairwise_iou,
)
from detkit.boxes.best_overlap import CompiledOverlaps, TiledOverlaps, find_overlaps

MATCHERS = [match_bipartite, match_ssd, match_two_thresholds]


@pytest.fixture(params=["compiled", "torch"])
def small_tiles(request, monkeypatch):
    """Both ways to find the best overlaps, with tiles so small that a few boxes fill many."""
    monkeypatch.setattr(best_overlap, "TILE_ANCHORS", 16)
    monkeypatch.setattr(best_overlap, "TILE_PAIRS", 150)
    if request.param == "torch":
        monkeypatch.setattr(matching, "find_overlaps", TiledOverlaps)


def matrix_of_iou(anchors, targets):
    """(A, N), by torch operations alone, which compiled code has no part in."""
    count = len(anchors), len(targets)
    pairs = anchors.repeat_interleave(count[1], 0), targets.repeat(count[0], 1)
    return elementwise_iou(*pairs).reshape(count)


def plain_ssd(iou, threshold):
    result = torch.where(iou.max(1).values >= threshold, iou.max(1).indices, -1)
    for target, anchor in enumerate(iou.max(0).indices.tolist()):
        result[anchor] = target
    return result


def plain_two_thresholds(iou, low, high, force_best=True):
    best = iou.max(1)
    result = torch.where(best.values >= high, best.indices, torch.where(best.values >= low, -2, -1))
    if force_best:
        forced = ((iou == iou.max(0).values) & (iou > 0)).any(1)
        result[forced] = best.indices[forced]
    return result


def plain_with_ignored(anchors, targets, ignored, low, plain):
    """`plain`, of the matrix of IoUs, on the targets that count, then the rule of the ignored on what is negative."""
    kept = (~ignored).nonzero().flatten()
    result = plain(matrix_of_iou(anchors, targets[kept]))
    alike = matrix_of_iou(anchors, targets[ignored]) >= low
    covered = intersection_over_area(anchors, targets[ignored]) >= 0.5
    result[(result == -1) & (alike | covered).any(1)] = -2
    return torch.where(result >= 0, kept[result.clamp(min=0)], result)


def plain_bipartite(iou, threshold):
    """The assignment as the book tells it, the whole matrix searched for every ground truth; -1 is background."""
    anchors, targets = iou.shape
    result = [-1] * anchors
    for anchor in range(anchors):
        best = max(range(targets), key=lambda n: (iou[anchor, n].item(), -n))
        if iou[anchor, best] >= threshold:
            result[anchor] = best
    matrix = iou.clone()
    for _ in range(min(anchors, targets)):
        anchor, target = divmod(int(torch.argmax(matrix.flatten())), targets)
        result[anchor] = target
        matrix[anchor] = -1
        matrix[:, target] = -1
    return torch.tensor(result)


def with_sentinel(match):
    return torch.where(match.positive, match.target_index, torch.where(match.ignored, -2, -1))


PLAIN = [
    (match_bipartite, {"threshold": 0.3}, 0.3, lambda iou: plain_bipartite(iou, 0.3)),
    (match_ssd, {"threshold": 0.4}, 0.4, lambda iou: plain_ssd(iou, 0.4)),
    (match_two_thresholds, {"low": 0.2, "high": 0.6}, 0.2, lambda iou: plain_two_thresholds(iou, 0.2, 0.6)),
    (
        match_two_thresholds,
        {"low": 0.2, "high": 0.6, "force_best": False},
        0.2,
        lambda iou: plain_two_thresholds(iou, 0.2, 0.6, force_best=False),
    ),
]
PLAIN_NAMES = ["bipartite", "ssd", "two_thresholds", "two_thresholds_unforced"]


def awkward_boxes(count, seed):
    """Among them boxes without area or with swapped sides, equal, distant, infinite, huge and tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(count, seed, whole=seed % 2 == 0)
    kind = torch.randint(0, 9, (count,), generator=generator)
    boxes[kind == 1] = boxes[kind == 1][:, [0, 1, 0, 3]]
    boxes[kind == 2] = boxes[kind == 2][:, [2, 1, 0, 3]]
    boxes[kind == 3] = boxes[0].clone()
    boxes[kind == 4] += 60
    boxes[kind == 5] *= 1e18 if seed % 3 == 0 else 1
    boxes[kind == 6, 2] = math.inf if seed % 3 == 1 else 90
    boxes[kind == 7] *= 1e-23 if seed % 3 == 2 else 1
    return boxes


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("matcher", "options", "low", "plain"), PLAIN, ids=PLAIN_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_rule_on_the_matrix(matcher, options, low, plain, dtype):
    for seed in range(18):
        anchors = awkward_boxes((1, 16, 77)[seed % 3], seed).to(dtype)
        targets = awkward_boxes(1 + seed % 7, seed + 500).to(dtype)
        match = matcher(anchors, targets, **options)
        assert with_sentinel(match).tolist() == plain(matrix_of_iou(anchors, targets)).tolist()
        # what an anchor that is not positive points to is its best ground truth all the same
        if matcher is not match_bipartite:
            unsure = ~match.positive
            assert torch.equal(match.target_index[unsure], matrix_of_iou(anchors, targets).max(1).indices[unsure])

        ignored = torch.arange(len(targets)) % 3 == 1
        match = matcher(anchors, targets, ignored, **options)
        assert with_sentinel(match).tolist() == plain_with_ignored(anchors, targets, ignored, low, plain).tolist()


@pytest.mark.parametrize(("matcher", "options", "low", "plain"), PLAIN, ids=PLAIN_NAMES)
def test_many_anchors_equal_the_rule_on_the_matrix(matcher, options, low, plain):
    # tiles of the usual size, several of them
    for whole in (False, True):
        anchors, targets = random_boxes(3000, 1, extent=400, whole=whole), random_boxes(40, 2, extent=400, whole=whole)
        ignored = torch.arange(40) % 4 == 3
        match = matcher(anchors, targets, ignored, **options)
        assert with_sentinel(match).tolist() == plain_with_ignored(anchors, targets, ignored, low, plain).tolist()


def test_many_targets_equal_the_matrix():
    # more than TILE_PAIRS in all, so that torch has tiles of its own size too
    anchors, targets = random_boxes(3000, 3, whole=True), random_boxes(800, 4, whole=True)
    iou = matrix_of_iou(anchors, targets)
    for overlaps in (TiledOverlaps(anchors, targets), CompiledOverlaps(anchors, targets)):
        assert torch.equal(overlaps.anchor_iou, iou.max(1).values)
        assert torch.equal(overlaps.anchor_target, iou.max(1).indices)
        assert torch.equal(overlaps.target_iou, iou.max(0).values)
        assert torch.equal(overlaps.target_anchor, iou.max(0).indices)
        assert torch.equal(overlaps.attain_best(), (iou == iou.max(0).values).any(1))
        assert torch.equal(overlaps.covered(0.3), (intersection_over_area(anchors, targets) >= 0.3).any(1))
        free = torch.arange(3000) > 1500
        for target in (0, 799):
            assert overlaps.best_free(target, free) == (
                iou[1501:, target].max().item(),
                1501 + int(iou[1501:, target].argmax()),
            )
            assert overlaps.best_free(target, torch.zeros(3000, dtype=torch.bool)) == (-1, 0)


@pytest.mark.usefixtures("small_tiles")
def test_all_that_tie_are_forced():
    anchors = torch.tensor([[0.0, 0, 10, 5]]).repeat(100, 1)
    anchors[50:60] += 500
    anchors[30] = torch.tensor([0.0, 0, 10, 2])
    match = match_two_thresholds(anchors, torch.tensor([[0.0, 0, 10, 10]]))
    expected = torch.ones(100, dtype=torch.bool)
    expected[30] = expected[50:60] = False
    assert torch.equal(match.positive, expected)


def test_who_finds_the_overlaps():
    anchors, targets = random_boxes(20, 1), random_boxes(3, 2)
    assert isinstance(find_overlaps(anchors, targets), CompiledOverlaps)
    assert isinstance(find_overlaps(anchors.half(), targets.bfloat16()), CompiledOverlaps)  # both become float32
    assert isinstance(find_overlaps(anchors.double(), targets.double()), CompiledOverlaps)
    assert isinstance(find_overlaps(anchors.double(), targets), TiledOverlaps)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_dtypes_layouts_and_gradients(matcher):
    anchors, targets = random_boxes(300, 5), random_boxes(6, 6)
    expected = matcher(anchors, targets)
    for a, b in (
        (anchors.T.contiguous().T, targets.repeat(1, 2)[:, 4:]),
        (anchors.clone().requires_grad_(), targets.clone().requires_grad_()),
        (anchors.double(), targets),
        (anchors, targets.double()),
    ):
        match = matcher(a, b)
        assert match.target_index.dtype == torch.int64
        assert with_sentinel(match).tolist() == with_sentinel(expected).tolist()
    halves = anchors.half(), targets.half()
    assert with_sentinel(matcher(*halves)).tolist() == with_sentinel(matcher(*(h.float() for h in halves))).tolist()
    whole = (anchors.long(), targets.long())
    assert with_sentinel(matcher(*whole)).tolist() == with_sentinel(matcher(*(w.float() for w in whole))).tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
@pytest.mark.parametrize("matcher", MATCHERS)
def test_compiled_code_makes_no_matrix(matcher):
    import resource  # not on Windows

    anchors, targets = random_boxes(200_000, 1, extent=5000), random_boxes(1000, 2, extent=5000)
    ignored = torch.arange(1000) % 2 == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matcher(anchors, targets, ignored)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # KB; the matrix would have 400 MB for either half of the ground truths


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("matcher", MATCHERS)
def test_torch_makes_no_matrix(matcher, monkeypatch):
    monkeypatch.setattr(matching, "find_overlaps", TiledOverlaps)
    monkeypatch.setattr(best_overlap, "TILE_PAIRS", 4000)
    anchors, targets = random_boxes(2000, 1), random_boxes(60, 2)
    with LargestTensor() as largest:
        matcher(anchors, targets, torch.arange(60) % 2 == 0)
    assert 4 * 2000 <= largest.elements < 3 * 4000  # the anchors themselves, or a tile; the matrix has 60,000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("matcher", MATCHERS)
def test_gpu_tensors(matcher):
    for seed in range(10):
        anchors, targets = awkward_boxes(500, seed), awkward_boxes(9, seed + 500)
        ignored = torch.arange(9) % 3 == 1
        match = matcher(anchors.cuda(), targets.cuda(), ignored.cuda())
        assert match.positive.device.type == "cuda"
        assert with_sentinel(match).tolist() == with_sentinel(matcher(anchors, targets, ignored)).tolist()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("anchor_count", "target_count"), [(1, 1), (60, 1), (60, 7), (5, 5), (4, 9)])
def test_bipartite_equals_a_plain_loop(anchor_count, target_count, whole):
    for seed in range(25):
        anchors, targets = (
            random_boxes(anchor_count, seed, whole=whole),
            random_boxes(target_count, seed + 50, whole=whole),
        )
        match = match_bipartite(anchors, targets, threshold=0.4)
        assert with_sentinel(match).tolist() == plain_bipartite(pairwise_iou(anchors, targets), 0.4).tolist()
        assert not match.ignored.any()


def test_bipartite_with_equal_and_disjoint_boxes():
    # every IoU is 1 or 0, so that ties alone decide
    for seed in range(10):
        corners = torch.randint(0, 3, (8, 2), generator=torch.Generator().manual_seed(seed)) * 20.0
        boxes = torch.cat((corners, corners + 20), dim=1)
        match = match_bipartite(boxes[:5], boxes[5:])
        assert with_sentinel(match).tolist() == plain_bipartite(pairwise_iou(boxes[:5], boxes[5:]), 0.5).tolist()


def test_bipartite_gives_every_target_an_anchor():
    anchors, targets = random_boxes(30, 1), random_boxes(12, 2)
    match = match_bipartite(anchors, targets, threshold=1.1)  # only the bound ones
    assert sorted(match.target_index[match.positive].tolist()) == list(range(12))


def test_bipartite_example_of_the_book():
    # D2L 14.4: two ground truths, five anchors; the book's result is background, dog, cat, background, cat
    targets = torch.tensor([[0.1, 0.08, 0.52, 0.92], [0.55, 0.2, 0.9, 0.88]])
    anchors = torch.tensor(
        [
            [0, 0.1, 0.2, 0.3],
            [0.15, 0.2, 0.4, 0.4],
            [0.63, 0.05, 0.88, 0.98],
            [0.66, 0.45, 0.8, 0.8],
            [0.57, 0.3, 0.92, 0.9],
        ]
    )
    assert with_sentinel(match_bipartite(anchors, targets)).tolist() == [-1, 0, 1, -1, 1]


def test_bipartite_is_fast_where_targets_compete():
    anchors, targets = random_boxes(10_000, 3), random_boxes(50, 4)
    started = time.perf_counter()
    match_bipartite(anchors, targets)
    match_bipartite(anchors, targets[:1].repeat(50, 1))  # all want the same anchor, again and again
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine


@pytest.mark.parametrize("whole", [False, True])
def test_ssd_equals_torchvision(whole):
    for seed in range(40):
        anchors, targets = random_boxes(80, seed, whole=whole), random_boxes(1 + seed % 9, seed + 60, whole=whole)
        match = match_ssd(anchors, targets, threshold=0.5)
        assert with_sentinel(match).tolist() == SSDMatcher(0.5)(box_iou(targets, anchors)).tolist()


def test_ssd_gives_a_shared_best_anchor_to_the_later_target():
    targets = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    match = match_ssd(torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), targets)
    assert with_sentinel(match).tolist() == [1, -1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("force_best", [True, False])
def test_two_thresholds_equal_torchvision(whole, force_best):
    for seed in range(40):
        anchors, targets = random_boxes(150, seed, whole=whole), random_boxes(1 + seed % 9, seed + 60, whole=whole)
        iou = box_iou(targets, anchors)
        assert (iou.max(1).values > 0).all()
        match = match_two_thresholds(anchors, targets, force_best=force_best)
        assert with_sentinel(match).tolist() == Matcher(0.7, 0.3, force_best)(iou).tolist()


def test_two_thresholds_at_the_thresholds():
    target = torch.tensor([[0.0, 0, 10, 100]])
    anchors = torch.tensor([[0.0, 0, 10, h] for h in (24, 25, 74, 75, 100)])
    match = match_two_thresholds(anchors, target, low=0.25, high=0.75)
    assert with_sentinel(match).tolist() == [-1, -2, -2, 0, 0]


def test_a_target_that_overlaps_nothing_forces_no_anchor_in_two_thresholds():
    anchors = random_boxes(50, 1)
    far = torch.tensor([[500.0, 500, 600, 600], [20, 20, 20, 20]])
    assert not match_two_thresholds(anchors, far).positive.any()
    # torchvision: all of them
    assert (Matcher(0.7, 0.3, True)(box_iou(far[:1], anchors)) == 0).all()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_no_targets_or_no_anchors(matcher):
    match = matcher(random_boxes(6, 1), torch.zeros(0, 4))
    assert match.negative.tolist() == [True] * 6
    assert match.target_index.shape == (6,)
    match = matcher(torch.zeros(0, 4), random_boxes(3, 1))
    assert match.positive.shape == match.target_index.shape == (0,)
    assert matcher(torch.zeros(0, 4), torch.zeros(0, 4)).ignored.shape == (0,)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_ignored_targets_take_no_part_in_what_is_positive(matcher):
    for seed in range(10):
        anchors, targets = random_boxes(80, seed), random_boxes(8, seed + 30)
        skip = torch.arange(8) % 3 == 1
        match, plain = matcher(anchors, targets, skip), matcher(anchors, targets[~skip])
        assert torch.equal(match.positive, plain.positive)
        kept = (~skip).nonzero().flatten()
        assert torch.equal(match.target_index[match.positive], kept[plain.target_index[plain.positive]])
        assert not (match.positive & match.ignored).any()
        assert (match.ignored | ~plain.ignored).all()
        assert match.ignored.sum() > plain.ignored.sum()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_only_ignored_targets(matcher):
    anchors = torch.tensor([[10.0, 10, 20, 20], [90, 90, 120, 120], [95, 0, 105, 10], [96, 0, 106, 10]])
    match = matcher(anchors, torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([True]))
    # inside the region; a ninth of it inside; half inside; less than half
    assert match.ignored.tolist() == [True, False, True, False]
    assert not match.positive.any()


def test_iou_with_an_ignored_target_reaches_the_lower_threshold():
    # the anchor is twice and a half the ground truth: 0.4 of its area is covered, and the IoU is 0.4
    anchor, target, ignored = torch.tensor([[0.0, 0, 25, 10]]), torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([True])
    assert match_two_thresholds(anchor, target, ignored).ignored.item()
    assert match_ssd(anchor, target, ignored).negative.item()
    assert match_ssd(anchor, target, ignored, threshold=0.4).ignored.item()
    assert match_bipartite(anchor, target, ignored, threshold=0.4).ignored.item()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_degenerate_targets(matcher):
    anchors = random_boxes(40, 2)
    match = matcher(anchors, DEGENERATE)
    assert 5 in match.target_index[match.positive]  # the one that has an area


@pytest.mark.parametrize("matcher", MATCHERS)
def test_nan_and_wrong_masks_are_refused(matcher):
    boxes, broken = random_boxes(4, 1), random_boxes(4, 1)
    broken[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"targets\[2\] contains NaN"):
        matcher(boxes, broken)
    with pytest.raises(ValueError, match=r"anchors\[2\] contains NaN"):
        matcher(broken, boxes)
    with pytest.raises(ValueError, match=r"ignored_targets must be \(4,\) bool"):
        matcher(boxes, boxes, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ignored_targets must be \(4,\) bool"):
        matcher(boxes, boxes, torch.zeros(4))
    with pytest.raises(ValueError, match=r"anchors must be \(N, 4\), but got \(4, 3\)"):
        matcher(boxes[:, :3], boxes)
    with pytest.raises(ValueError, match=r"targets must be \(N, 4\), but got \(4,\)"):
        matcher(boxes, boxes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e200, math.inf])
def test_overlaps_that_are_not_known_match_nothing(size, dtype):
    """The IoU of two boxes whose areas are infinite is NaN; to both kinds of code it is no overlap."""
    huge = torch.tensor([[0.0, 0, size, size], [-size, -size, size, size]], dtype=torch.float64)
    anchors = torch.cat((random_boxes(40, 2).double(), huge)).to(dtype)
    targets = anchors[[3, 40, 7, 41]]
    assert pairwise_iou(anchors, targets)[40, 1].isnan()
    for overlaps in (TiledOverlaps(anchors, targets), CompiledOverlaps(anchors, targets)):
        assert overlaps.target_iou.tolist() == [1, 0, 1, 0]
        assert overlaps.target_anchor.tolist()[::2] == [3, 7]
        assert overlaps.anchor_iou[40:].tolist() == [0, 0]
        assert overlaps.attain_best().nonzero().flatten().tolist() == [3, 7]
        assert overlaps.best_free(1, torch.arange(42) >= 40) == (0, 40)


def test_swapped_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"low must not be above high, but they are 0.7 and 0.3"):
        match_two_thresholds(random_boxes(2, 1), random_boxes(2, 2), low=0.7, high=0.3)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_arguments_are_not_changed(matcher):
    anchors, targets = random_boxes(30, 1), random_boxes(5, 2)
    before = anchors.clone(), targets.clone()
    matcher(anchors, targets)
    assert torch.equal(anchors, before[0])
    assert torch.equal(targets, before[1])


def test_bipartite_with_negative_zero():
    # a width of -0.0 is no overlap: as bits it would be the least number, below "taken"
    anchors = torch.tensor([[0.0, 0, 5, 5], [0, 1, 4, 4]])
    targets = torch.tensor([[0.0, 0, 5, 5], [-3, 0, -0.0, 5]])
    match = match_bipartite(anchors, targets)
    assert match.target_index.tolist() == [0, 1]
    assert match.positive.tolist() == [True, True]
