import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import box_area, box_iou

from detkit.boxes import (
    kmeans_priors,
    linear_scales,
    per_pixel_anchors,
    region_proposal_anchors,
    ssd_default_boxes,
)


def images_and_features(image_size, map_sizes):
    """A batch of one image for torchvision's generators."""
    images = SimpleNamespace(tensors=torch.empty(1, 3, *image_size), image_sizes=[image_size])
    return images, [torch.empty(1, 1, *map_size) for map_size in map_sizes]


def test_per_pixel_anchors_equal_a_plain_loop():
    map_size, image_size, sizes, ratios = (3, 5), (120, 200), [0.75, 0.5, 0.25], [1, 2, 0.5]
    expected = []
    for row in range(3):
        for column in range(5):
            x, y = (column + 0.5) * 200 / 5, (row + 0.5) * 120 / 3
            for size, ratio in [(0.75, 1), (0.5, 1), (0.25, 1), (0.75, 2), (0.75, 0.5)]:
                w, h = size * math.sqrt(ratio) * 200, size / math.sqrt(ratio) * 120
                expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    anchors = per_pixel_anchors(map_size, image_size, sizes, ratios)
    assert anchors.shape == (3 * 5 * (3 + 3 - 1), 4)
    torch.testing.assert_close(anchors, torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_per_pixel_anchors_one_of_each_and_none():
    assert per_pixel_anchors((1, 1), (10, 20), [1], [1]).tolist() == [[0, 0, 20, 10]]
    assert per_pixel_anchors((0, 4), (10, 20), [1], [1]).shape == (0, 4)
    with pytest.raises(ValueError, match="at least one value each"):
        per_pixel_anchors((1, 1), (10, 20), [], [1])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [None, [8, 16, 32, 64, 100, 300]])
@pytest.mark.parametrize("image_size", [(300, 300), (240, 317)])
def test_ssd_default_boxes_equal_torchvision(clip, steps, image_size):
    map_sizes = [(38, 38), (19, 17), (10, 10), (5, 5), (3, 2), (1, 1)]
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    scales = linear_scales(0.15, 0.9, 6)
    generator = DefaultBoxGenerator(ratios, 0.15, 0.9, steps=steps, clip=clip)
    assert scales == pytest.approx(generator.scales, abs=1e-12)
    ours = ssd_default_boxes(map_sizes, image_size, scales, ratios, steps, clip)
    assert [len(boxes) for boxes in ours] == [
        h * w * n for (h, w), n in zip(map_sizes, generator.num_anchors_per_location())
    ]
    torch.testing.assert_close(
        torch.cat(ours), generator(*images_and_features(image_size, map_sizes))[0], rtol=1e-6, atol=1e-4
    )


def test_ssd300_has_8732_default_boxes():
    scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]  # torchvision's ssd300_vgg16
    maps, ratios = [38, 19, 10, 5, 3, 1], [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    boxes = ssd_default_boxes([(n, n) for n in maps], (300, 300), scales, ratios, [8, 16, 32, 64, 100, 300])
    assert sum(map(len, boxes)) == 8732
    widths = boxes[-1][:, 2] - boxes[-1][:, 0]
    assert widths.max() <= 300  # 0.87 * sqrt(2) of the image, clipped


def test_one_level_takes_the_scales_that_torchvision_takes():
    assert linear_scales(0.2, 0.8, 1) == DefaultBoxGenerator([[2]], 0.2, 0.8).scales
    with pytest.raises(ValueError, match="levels must be 1 or more"):
        linear_scales(0.2, 0.8, 0)


@pytest.mark.parametrize(("scales", "ratios", "steps"), [(1, 2, 2), (3, 1, 2), (3, 2, 1)])
def test_ssd_default_boxes_refuse_lists_that_do_not_fit(scales, ratios, steps):
    with pytest.raises(ValueError, match="2 feature maps need 3 scales, 2 lists of ratios and 2 steps"):
        ssd_default_boxes([(2, 2), (1, 1)], (10, 10), [0.5] * scales, [[2]] * ratios, [5] * steps)


@pytest.mark.parametrize(
    ("image_size", "map_size"), [((800, 1344), (50, 84)), ((800, 832), (13, 13)), ((64, 64), (1, 1))]
)
def test_region_proposal_anchors_equal_torchvision(image_size, map_size):
    generator = AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),))
    stride = (image_size[0] // map_size[0], image_size[1] // map_size[1])
    ours = region_proposal_anchors(map_size, stride)
    assert ours.shape == (map_size[0] * map_size[1] * 9, 4)
    assert torch.equal(ours, generator(*images_and_features(image_size, [map_size]))[0])
    if stride[0] == stride[1]:
        assert torch.equal(ours, region_proposal_anchors(map_size, stride[0]))


def test_region_proposal_anchors_have_the_papers_areas():
    areas = box_area(region_proposal_anchors((1, 1), 16)).reshape(3, 3)
    torch.testing.assert_close(areas, torch.tensor([128.0, 256, 512]).square().expand(3, 3), rtol=0.01, atol=0)


def shapes_around(centres, count, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(centres), (count,), generator=generator)
    return centres[chosen] * torch.exp(0.05 * torch.randn(count, 2, generator=generator))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_well_separated_shapes(seed):
    centres = torch.tensor([[10.0, 20], [60, 30], [90, 250], [300, 300]])
    priors, mean_iou = kmeans_priors(shapes_around(centres, 400, seed), 4, seed=seed)
    torch.testing.assert_close(priors, centres, rtol=0.05, atol=0)
    assert mean_iou > 0.9


def test_kmeans_returns_the_iou_of_the_priors_it_returns():
    shapes = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 90 + 10
    priors, mean_iou = kmeans_priors(shapes, 5)
    iou = box_iou(*(torch.cat((-s / 2, s / 2), dim=1) for s in (shapes, priors)))
    assert mean_iou == pytest.approx(iou.max(1).values.mean().item(), abs=1e-5)
    assert priors.prod(1).diff().ge(0).all(), "not sorted by area"
    again, _ = kmeans_priors(shapes, 5)
    assert torch.equal(again, priors)
    mean_ious = [kmeans_priors(shapes, count)[1] for count in (1, 3, 9)]
    assert mean_ious == sorted(mean_ious)


def test_kmeans_with_as_many_priors_as_distinct_boxes():
    shapes = torch.tensor([[5.0, 5], [5, 5], [5, 5], [5, 5], [20, 10], [7, 90]])
    for seed in range(10):
        priors, mean_iou = kmeans_priors(shapes, 3, seed=seed)
        assert priors.tolist() == [[5, 5], [20, 10], [7, 90]]
        assert mean_iou == pytest.approx(1)


def test_kmeans_moves_a_centre_without_boxes():
    from detkit.boxes.anchors import _cluster_means

    shapes = torch.tensor([[2.0, 2], [4, 4], [50, 10]])
    means = _cluster_means(shapes, torch.tensor([0, 0, 0]), torch.tensor([0.9, 0.8, 0.1]), 2)
    torch.testing.assert_close(means, torch.tensor([[56 / 3, 16 / 3], [50, 10]]))


def test_kmeans_refusals():
    same = torch.tensor([[5.0, 5]] * 10)
    with pytest.raises(ValueError, match="2 priors cannot be clustered from 1 distinct boxes"):
        kmeans_priors(same, 2)
    with pytest.raises(ValueError, match="1 priors cannot be clustered from 0 distinct boxes"):
        kmeans_priors(torch.zeros(0, 2), 1)
    with pytest.raises(ValueError, match="0 priors"):
        kmeans_priors(same, 0)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"widths_heights\[1\].*positive and finite"):
            kmeans_priors(torch.tensor([[1.0, 1], [2, wrong]]), 1)
    with pytest.raises(ValueError, match=r"must be \(N, 2\)"):
        kmeans_priors(torch.zeros(3, 4), 1)
