"""Selective search against plain references, on odd images, and on real ones."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.segmentation import felzenszwalb
from torchvision import ops

from detkit.boxes import pairwise_iou
from detkit.data.formats.coco import Coco
from detkit.errors import ConfigError, DataError
from detkit.registry import proposal_sources
from detkit.zoo.rcnn.kernels.grouping_numba import ONE, feature_bins, group
from detkit.zoo.rcnn.kernels.segmentation_numba import LEVELS, STEPS, segment, sorted_edges
from detkit.zoo.rcnn.selective_search import SelectiveSearch, _ranks, in_space, selective_search, shrink

SHARED = Path(__file__).parents[4] / "shared" / "data"
ALL_SIMILARITIES = [(1, 1, 1, 1), (0, 1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0), (1, 0, 0, 0)]


def noise(seed, height, width, channels=3, levels=256):
    """(H, W, C) uint8: blocks of random colours with noise, so that there are regions of many sizes."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, levels, (height // 5 + 1, width // 5 + 1, channels))
    image = blocks.repeat(5, 0).repeat(5, 1)[:height, :width] + rng.integers(-6, 7, (height, width, channels))
    return image.clip(0, 255).astype(np.uint8)


def planes_of(image):
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def regions_of(image, k, min_size):
    """Labels and their number by the kernels, without smoothing."""
    planes = planes_of(image).astype(np.float32)
    edges, starts = sorted_edges(planes)
    return segment(edges, starts, *image.shape[:2], k * STEPS, min_size)


def all_edges(planes):
    """[(weight, first pixel, second pixel)] sorted, by a loop over the pixels."""
    _, height, width = planes.shape
    edges = []
    for y in range(height):
        for x in range(width):
            for direction, (dy, dx) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)]):
                if y + dy < height and 0 <= x + dx < width:
                    square = np.float32(0)
                    for difference in planes[:, y, x] - planes[:, y + dy, x + dx]:
                        square += difference * difference
                    weight = int(np.sqrt(square) * np.float32(STEPS) + np.float32(0.5))
                    pixel = y * width + x
                    edges.append((weight, pixel, direction, pixel + dy * width + dx))
    return [(weight, first, second) for weight, first, _, second in sorted(edges)]


def reference_regions(planes, tolerance, min_size):
    """Felzenszwalb and Huttenlocher with sets of pixels."""
    pixels = planes[0].size
    region = list(range(pixels))
    members = {pixel: [pixel] for pixel in range(pixels)}
    heaviest = dict.fromkeys(range(pixels), 0)

    def join(a, b, weight):
        for pixel in members[b]:
            region[pixel] = a
        members[a] += members.pop(b)
        heaviest[a] = weight

    edges = all_edges(planes)
    for weight, first, second in edges:
        a, b = region[first], region[second]
        if a != b and all(weight <= heaviest[r] + tolerance / len(members[r]) for r in (a, b)):
            join(a, b, weight)
    for _, first, second in edges:
        a, b = region[first], region[second]
        if a != b and min(len(members[a]), len(members[b])) < min_size:
            join(a, b, 0)
    numbers = {}
    labels = [numbers.setdefault(r, len(numbers)) for r in region]
    return np.array(labels).reshape(planes.shape[1:])


@pytest.mark.parametrize("seed", range(8))
def test_regions_equal_a_plain_reference(seed):
    rng = np.random.default_rng(seed)
    image = noise(seed, *rng.integers(1, 30, 2), channels=1 + 2 * (seed % 2), levels=[256, 40][seed // 4])
    planes = planes_of(image).astype(np.float32)
    if seed % 3 == 0:
        planes += rng.random(planes.shape, dtype=np.float32) - np.float32(0.5)
        planes = planes.clip(0, 255)
    k, min_size = int(rng.integers(1, 60)), int(rng.integers(1, 25))
    edges, starts = sorted_edges(planes)
    labels, count = segment(edges, starts, *planes.shape[1:], k * STEPS, min_size)
    expected = reference_regions(planes, k * STEPS, min_size)
    assert np.array_equal(labels, expected)
    assert count == expected.max() + 1


def test_edges_are_those_of_a_plain_loop():
    planes = planes_of(noise(3, 9, 12)).astype(np.float32)
    edges, starts = sorted_edges(planes)
    steps = [1, 12, 13, 11]
    weights = np.repeat(np.arange(LEVELS), np.diff(starts))
    found = [(w, e >> 2, (e >> 2) + steps[e & 3]) for w, e in zip(weights.tolist(), edges.tolist())]
    assert found == all_edges(planes)


@pytest.mark.parametrize("values", [(0, 255), (255, 0)])
def test_the_heaviest_edge_has_a_level(values):
    planes = np.array(values, dtype=np.float32).reshape(1, 1, 2).repeat(3, axis=0)
    edges, starts = sorted_edges(planes)
    assert edges.tolist() == [0]
    assert starts[-1] == 1


@pytest.mark.parametrize("seed", range(4))
def test_as_many_regions_as_scikit_image_finds(seed):
    # It takes equal weights in another order, so the numbers are near, not equal.
    image = noise(seed, 120, 160)
    expected = felzenszwalb(image, scale=60, sigma=0, min_size=20).max() + 1
    assert regions_of(image, 60, 20)[1] == pytest.approx(expected, rel=0.05)


def reference_bins(colours, planes, scale):
    """The features of each pixel by NumPy."""
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    diagonal = np.float32(np.sqrt(0.5))
    axes = np.stack([dx, dy, (dx + dy) * diagonal, (dx - dy) * diagonal], axis=1)
    sizes = np.minimum((np.abs(axes) * np.float32(scale)).astype(int), 9) + 10 * (axes < 0)
    return np.concatenate([colours.astype(int) * 25 >> 8, sizes.reshape(-1, *planes.shape[1:])])


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (1, 9, 1), (8, 1, 3), (13, 17, 3)])
def test_features_equal_numpy(height, width, channels):
    colours = planes_of(noise(height, height, width, channels))
    planes = colours + np.random.default_rng(0).random(colours.shape, dtype=np.float32)
    found = feature_bins(colours, planes, 0.25)
    assert np.array_equal(found, reference_bins(colours, planes, 0.25).reshape(5 * channels, -1))


class Regions:
    """Grouping as the paper has it, with masks of pixels and all pairs looked at each time."""

    def __init__(self, labels, bins, use):
        self.pixels = labels.size
        self.use = use
        self.masks = {region: labels == region for region in range(labels.max() + 1)}
        self.channels = len(bins) // 5
        self.bins = bins.reshape(len(bins), *labels.shape).astype(int)
        self.boxes = [self.box(mask) for mask in self.masks.values()]
        self.merges = []
        self.neighbours = {
            (a, b) for a in self.masks for b in self.masks if a < b and self.touch(self.masks[a], self.masks[b])
        }

    def box(self, mask):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)

    def touch(self, a, b):
        return (
            (a[:, 1:] & b[:, :-1]).any()
            or (a[:, :-1] & b[:, 1:]).any()
            or (a[1:] & b[:-1]).any()
            or (a[:-1] & b[1:]).any()
        )

    def histograms(self, mask):
        colours = [np.bincount(self.bins[c][mask], minlength=25) for c in range(self.channels)]
        textures = []
        for feature in self.bins[self.channels :]:
            values = feature[mask]
            textures.append(np.bincount(np.where(values < 10, values, 0), minlength=10))
            textures.append(np.bincount(np.where(values >= 10, values - 10, 0), minlength=10))
        return np.concatenate(colours), np.concatenate(textures)

    def similarity(self, a, b):
        masks = self.masks[a], self.masks[b]
        sizes = [int(mask.sum()) for mask in masks]
        total = 0
        for part, groups in ((0, self.channels), (1, self.channels * 8)):
            if self.use[part]:
                scaled = [
                    self.histograms(mask)[part].astype(np.float32)
                    * (np.float32(ONE / size / groups) if part == 0 else np.float32(ONE / size / self.channels / 8))
                    for mask, size in zip(masks, sizes)
                ]
                total += int(np.minimum(*scaled).astype(np.int64).sum())
        if self.use[2]:
            total += (self.pixels - sum(sizes)) * ONE // self.pixels
        if self.use[3]:
            left, top, right, bottom = self.box(masks[0] | masks[1])
            total += int((self.pixels - (right - left) * (bottom - top) + sum(sizes)) * ONE // self.pixels)
        return min(total, 4 * ONE - 1)

    def run(self):
        scores = {pair: self.similarity(*pair) for pair in self.neighbours}
        while scores:
            a, b = min(scores, key=lambda pair: (-scores[pair], pair))
            c = len(self.boxes)
            self.merges.append((a, b))
            self.masks[c] = self.masks[a] | self.masks[b]
            self.boxes.append(self.box(self.masks[c]))
            others = {other for pair in scores if a in pair or b in pair for other in pair} - {a, b}
            scores = {pair: score for pair, score in scores.items() if a not in pair and b not in pair}
            scores |= {(other, c): self.similarity(other, c) for other in others}
        return self


@pytest.mark.parametrize("use", ALL_SIMILARITIES)
@pytest.mark.parametrize("seed", range(3))
def test_grouping_equals_a_plain_reference(seed, use):
    channels = [3, 1, 3][seed]
    image = noise(seed, 31, 26, channels)
    labels, count = regions_of(image, 2, [8, 6, 12][seed])
    assert 15 < count < 60
    colours = planes_of(image)
    bins = feature_bins(colours, colours.astype(np.float32), 0.25)
    boxes, merges = group(labels, count, bins, np.array([use], dtype=np.bool_))
    expected = Regions(labels, bins, use).run()
    assert merges[0].tolist() == [list(map(int, pair)) for pair in expected.merges]
    assert np.array_equal(boxes[0], np.array(expected.boxes))
    assert boxes[0, -1].tolist() == [0, 0, 26, 31]


def test_equal_similarities_are_taken_in_the_order_of_the_regions():
    # stripes of one size and colour, whose similarity by size is the same for all pairs
    labels = np.arange(6, dtype=np.int32).repeat(4).reshape(6, 4)
    colours = np.zeros((1, 6, 4), dtype=np.uint8)
    bins = feature_bins(colours, colours.astype(np.float32), 0.25)
    _, merges = group(labels, 6, bins, np.array([[0, 0, 1, 0]], dtype=np.bool_))
    assert merges[0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_strategies_do_not_depend_on_one_another():
    image = noise(5, 60, 50)
    labels, count = regions_of(image, 5, 4)
    colours = planes_of(image)
    bins = feature_bins(colours, colours.astype(np.float32), 0.25)
    strategies = np.array(ALL_SIMILARITIES, dtype=np.bool_)
    boxes, merges = group(labels, count, bins, strategies)
    for index in range(len(strategies)):
        alone = group(labels, count, bins, strategies[index : index + 1])
        assert np.array_equal(alone[0][0], boxes[index])
        assert np.array_equal(alone[1][0], merges[index])


def test_a_region_with_many_neighbours():
    """The heap of keys is swept when it is full, and the long list of the ground is shortened again and again."""
    labels = np.zeros((81, 81), dtype=np.int32)
    labels[1::2, 1::2] = np.arange(1, 1601).reshape(40, 40)
    colours = np.random.default_rng(0).integers(0, 256, (1, 81, 81)).astype(np.uint8)
    bins = feature_bins(colours, colours.astype(np.float32), 0.25)
    boxes, merges = group(labels, 1601, bins, np.ones((1, 4), dtype=np.bool_))
    assert sorted(merges[0].flatten().tolist()) == list(range(3200))
    assert (merges[0].max(axis=1) == np.concatenate([merges[0, :1].max(axis=1), np.arange(1601, 3200)])).all()
    assert (boxes[0, 1601:] == [0, 0, 81, 81]).all()


def check_proposals(proposals, height, width):
    assert proposals.dtype == torch.float32
    assert proposals.shape[1:] == (4,)
    assert (proposals[:, 2:] > proposals[:, :2]).all()
    assert (proposals >= 0).all()
    assert (proposals[:, 2:] <= torch.tensor([width, height])).all()
    assert len(proposals.unique(dim=0)) == len(proposals)


@pytest.mark.parametrize("mode", ["fast", "quality"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 40), (40, 1), (2, 2), (3, 50), (33, 47)])
def test_images_of_any_size(mode, size):
    proposals = selective_search(noise(1, *size), mode, min_side=1)
    check_proposals(proposals, *size)
    assert [0, 0, size[1], size[0]] in proposals.tolist()


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_of_one_colour_has_one_region(value):
    image = np.full((50, 60, 3), value, dtype=np.uint8)
    assert selective_search(image).tolist() == [[0, 0, 60, 50]]


def test_an_image_below_the_least_side_has_no_proposals():
    assert selective_search(noise(0, 4, 50)).shape == (0, 4)


def test_a_grey_image():
    grey = noise(2, 80, 90, 1).repeat(3, axis=2)
    proposals = selective_search(grey)
    check_proposals(proposals, 80, 90)
    assert len(proposals) > 20


@pytest.mark.parametrize("mode", ["fast", "quality"])
@pytest.mark.parametrize(
    ("box", "colours"),
    [
        ((20, 30, 70, 90), ((200, 30, 30), (40, 90, 40))),
        ((0, 0, 30, 25), ((90, 90, 90), (160, 160, 160))),
        ((100, 50, 160, 120), ((20, 40, 200), (20, 90, 200))),
    ],
)
def test_a_rectangle_is_found(mode, box, colours):
    image = np.empty((120, 160, 3), dtype=np.uint8)
    image[:] = colours[0]
    image[box[1] : box[3], box[0] : box[2]] = colours[1]
    proposals = selective_search(image, mode)
    assert pairwise_iou(torch.tensor([box], dtype=torch.float32), proposals[:10]).max() > 0.95


def test_the_same_image_gives_the_same_proposals_in_any_thread_and_memory():
    source = SelectiveSearch()
    images = [noise(seed, 90 + seed, 120) for seed in range(4)]
    expected = [source(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(source, images * 3))
    assert all(torch.equal(a, b) for a, b in zip(expected * 3, found))
    flipped = np.ascontiguousarray(images[0][:, ::-1])
    assert torch.equal(source(flipped[:, ::-1]), expected[0])


def test_a_huge_image_is_shrunk():
    image = np.kron(noise(4, 300, 400), np.ones((10, 10, 1), dtype=np.uint8))
    assert image.shape == (3000, 4000, 3)
    proposals = SelectiveSearch(longest_side=320, min_side=1)(image)
    check_proposals(proposals, 3000, 4000)
    small = SelectiveSearch(longest_side=None, min_side=1)(shrink(image, 320))
    assert torch.allclose(proposals, small * 12.5)
    sides = SelectiveSearch(longest_side=320, min_side=100)(image)
    assert ((sides[:, 2:] - sides[:, :2]) >= 100).all()


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (40, 20)), ((3, 1000), (1, 40)), ((30, 40), (30, 40))])
def test_shrink(size, expected):
    assert shrink(noise(0, *size), 40).shape == (*expected, 3)


def test_near_duplicates_go_to_the_end():
    image = noise(7, 150, 200)
    every = SelectiveSearch(duplicate_iou=1, count=10**6)(image)
    found = SelectiveSearch(duplicate_iou=0.6, count=10**6)(image)
    check_proposals(every, 150, 200)
    # greedily, as torchvision suppresses
    kept = ops.nms(every, torch.arange(len(every), 0, -1).float(), 0.6)
    behind = [index for index in range(len(every)) if index not in set(kept.tolist())]
    assert len(behind) > 10
    assert torch.equal(found, every[torch.tensor([*kept.tolist(), *behind])])


@pytest.mark.parametrize("duplicate_iou", [0.75, 1])
def test_count(duplicate_iou):
    image = noise(7, 100, 120)
    every = SelectiveSearch(duplicate_iou=duplicate_iou)(image)
    assert 30 < len(every) < 2000
    assert torch.equal(SelectiveSearch(duplicate_iou=duplicate_iou, count=30)(image), every[:30])


def test_ranks():
    """Regions 0, 1, 2; then 3 of 0 and 2; then 4, the whole. Places 5 to 1, times those of 3, 4, 3, 4 and nothing."""
    assert _ranks(np.array([[0, 2], [1, 3]])).tolist() == [5 * 2, 4 * 1, 3 * 2, 2 * 1, 1]
    assert _ranks(np.empty((0, 2), dtype=np.int32)).tolist() == [1]


def test_quality_proposes_more():
    image = noise(8, 100, 140)
    assert len(selective_search(image, "quality")) > 1.5 * len(selective_search(image))


def test_in_space():
    image = np.array([[[255, 0, 0], [0, 0, 0], [100, 100, 100]]], dtype=np.uint8)
    assert in_space(image, "rgi").tolist() == [[[255, 0, 76], [0, 0, 0], [85, 85, 100]]]
    assert in_space(image, "hue").shape == (1, 3, 1)
    assert in_space(image, "grey")[0, :, 0].tolist() == [76, 0, 100]


def test_built_by_name():
    source = proposal_sources.build({"name": "selective_search", "mode": "quality", "count": 7}, "proposals")
    assert (source.mode, source.count) == ("quality", 7)
    assert len(source(noise(0, 60, 60), "a")) == 7
    with pytest.raises(ConfigError, match=r"'proposals.min_sid'.*Did you mean 'min_side'"):
        proposal_sources.build({"name": "selective_search", "min_sid": 3}, "proposals")


def test_the_key_holds_all_options():
    options = [{}, {"mode": "quality"}, {"count": 5}, {"min_side": 6}, {"duplicate_iou": 0.5}, {"longest_side": None}]
    assert len({SelectiveSearch(**given).key for given in options}) == len(options)
    assert SelectiveSearch().key == SelectiveSearch(mode="fast").key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fsat"}, "Did you mean 'fast'"),
        ({"count": 0}, "'proposals.count' must be at least 1"),
        ({"min_side": -1}, "'proposals.min_side'"),
        ({"longest_side": 0}, "'proposals.longest_side'"),
        ({"duplicate_iou": 1.2}, "'proposals.duplicate_iou'"),
        ({"duplicate_iou": float("nan")}, "'proposals.duplicate_iou'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SelectiveSearch(**options)


@pytest.mark.parametrize(
    "image", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8), np.zeros((3, 5, 5))]
)
def test_images_of_another_kind(image):
    with pytest.raises(DataError, match=r"image 'x\.jpg' must be"):
        SelectiveSearch()(image, "x.jpg")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_pedestrians_are_found():
    data = Coco(str(SHARED / "pennfudan"), "val", images="images/{split}")
    best = []
    for index in range(0, 30, 4):
        sample, target = data[index], data.target(index)
        proposals = selective_search(sample.image)
        check_proposals(proposals, *sample.image.shape[:2])
        best.append(pairwise_iou(target.boxes, proposals).amax(1))
    assert (torch.cat(best) >= 0.5).float().mean() > 0.85
