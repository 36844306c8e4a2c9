"""What the second stage sees of each region, against torchvision's poolers, plain loops and resized crops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops
from torchvision.ops.poolers import LevelMapper

from detkit.errors import ConfigError
from detkit.heads.parts.region_features import RegionFeatures, region_features, with_image_index

STRIDES = (4, 8, 16, 32)
SIZE = (128, 192)


def build(name: str, channels: tuple[int, ...] = (3,), strides: tuple[int, ...] = (8,), **options: Any) -> Any:
    return region_features.build({"name": name, **options}, "head.features", channels=channels, strides=strides)


def random_maps(seed: int, images: int = 3, strides: tuple[int, ...] = STRIDES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, SIZE[0] // s, SIZE[1] // s, generator=generator) for s in strides]


def random_regions(seed: int, counts: tuple[int, ...] = (12, 0, 7)) -> list[Tensor]:
    """Of every size from 1 pixel to more than the image; some reach over its border, some lie outside."""
    generator = torch.Generator().manual_seed(seed)
    regions = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([260.0, 190]) - 40
        sides = torch.exp(torch.rand(count, 2, generator=generator) * math.log(300.0))
        regions.append(torch.cat((corners, corners + sides), 1))
    return regions


def levels_of(features: RegionFeatures, boxes: Tensor) -> Tensor:
    return features.assign(boxes)  # type: ignore[operator]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (2, 4, 8, 16, 32), (16, 32)])
@pytest.mark.parametrize("canonical_size", [224.0, 112.0, 100.0])
def test_levels_equal_torchvisions(strides: tuple[int, ...], canonical_size: float) -> None:
    features = build("roi_align", (3,) * len(strides), strides, canonical_size=canonical_size)
    exponents = [int(math.log2(stride)) for stride in strides]
    mapper = LevelMapper(exponents[0], exponents[-1], canonical_scale=canonical_size)  # type: ignore[arg-type]
    boxes = torch.cat([random_regions(seed, (200,))[0] * scale for seed, scale in enumerate((0.1, 1.0, 8.0))])
    sides = canonical_size * 2.0 ** torch.arange(-6, 6)
    exact = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), 1)
    boxes = torch.cat((boxes, exact, exact + 13.0, torch.tensor([[5.0, 5, 5, 40], [7, 7, 7, 7]])))
    found = levels_of(features, boxes)
    assert torch.equal(found, mapper([boxes]))
    assert found.unique().tolist() == list(range(len(strides)))


def test_a_level_that_is_left_out_hands_its_regions_to_the_finer_one() -> None:
    features = build("roi_align", (3, 3), (4, 16))
    boxes = torch.tensor([[0.0, 0, 56, 56], [0, 0, 112, 112], [0, 0, 223, 223], [0, 0, 224, 224], [0, 0, 900, 900]])
    assert levels_of(features, boxes).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("sampling", [2, 0, 3])
def test_roi_align_equals_torchvisions_multi_scale_pooler(sampling: int) -> None:
    names = [str(level) for level in range(len(STRIDES))]
    reference = ops.MultiScaleRoIAlign(names, 5, sampling or -1)
    features = build("roi_align", (3,) * 4, STRIDES, size=5, sampling=sampling)
    for seed in range(8):
        regions = random_regions(seed)
        mine, theirs = ([m.requires_grad_() for m in random_maps(seed)] for _ in range(2))
        found, expected = features(mine, regions), reference(dict(zip(names, theirs)), regions, [SIZE] * 3)
        assert found.shape == (19, *features.shape) == (19, 3, 5, 5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        for one, other in zip(mine, theirs):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_levels_of_large_strides_are_left_out() -> None:
    """Faster R-CNN's fifth map, of stride 64, is for proposals; so are maps pooled from the whole image."""
    maps, regions = random_maps(1), random_regions(1)
    expected = build("roi_align", (3,) * 4, STRIDES)(maps, regions)
    coarse = [torch.full((3, 9, 2, 3), torch.nan), torch.full((3, 9, 1, 1), torch.nan)]
    found = build("roi_align", (3, 3, 3, 3, 9, 9), (*STRIDES, 64, 0))([*maps, *coarse], regions)
    assert torch.equal(found, expected)


def test_aligned_shifts_by_half_a_place() -> None:
    (feature,), regions = random_maps(2, strides=(8,)), random_regions(2)
    expected = ops.roi_align(feature, regions, 7, 1 / 8, 2, aligned=True)
    torch.testing.assert_close(build("roi_align", aligned=True)([feature], regions), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(build("roi_align")([feature], regions), expected, rtol=0, atol=1e-2)


def pooled_by_loops(feature: np.ndarray, box: np.ndarray, scale: float, size: int) -> np.ndarray:
    """Maxima of (C, H, W) over the grid that Fast R-CNN lays over the part of a region that lies in the map."""
    left, top, right, bottom = (
        min(max(math.floor(value * scale + 0.5), 0), places - 1)
        for value, places in zip(box.tolist(), (*feature.shape[:0:-1],) * 2)
    )
    height, width = max(bottom - top + 1, 1), max(right - left + 1, 1)
    result = np.full((len(feature), size, size), np.nan, dtype=np.float32)
    for row in range(size):
        for column in range(size):
            # the edges of cells in whole numbers: floor(i * h / n) and ceil((i + 1) * h / n)
            rows = slice(top + row * height // size, top - (-(row + 1) * height // size))
            columns = slice(left + column * width // size, left - (-(column + 1) * width // size))
            result[:, row, column] = feature[:, rows, columns].max((1, 2))
    return result


@pytest.mark.parametrize("size", [1, 2, 4])  # powers of two: others round the edges of a cell in float32
def test_roi_pool_equals_plain_loops(size: int) -> None:
    features = build("roi_pool", size=size)
    for seed in range(10):
        (feature,), regions = random_maps(seed, strides=(8,)), random_regions(seed)
        found = features([feature], regions)
        expected = [
            pooled_by_loops(feature[image].numpy(), box.numpy(), 1 / 8, size)
            for image, boxes in enumerate(regions)
            for box in boxes
        ]
        assert found.shape == (19, *features.shape)
        np.testing.assert_array_equal(found.numpy(), np.stack(expected))


def test_spatial_pyramid_equals_plain_loops() -> None:
    features = build("spp", grids=(4, 2, 1))
    assert features.shape == (3 * 21,)
    for seed in range(5):
        (feature,), regions = random_maps(seed, strides=(8,)), random_regions(seed)
        found = features([feature], regions)
        expected = [
            np.concatenate([pooled_by_loops(feature[i].numpy(), box.numpy(), 1 / 8, n).ravel() for n in (4, 2, 1)])
            for i, boxes in enumerate(regions)
            for box in boxes
        ]
        np.testing.assert_array_equal(found.numpy(), np.stack(expected))


def test_spatial_pyramid_of_one_grid_is_roi_pool() -> None:
    for strides in ((8,), STRIDES):
        maps, regions = random_maps(3, strides=strides), random_regions(3)
        one_grid = build("spp", (3,) * len(strides), strides, grids=(6,))(maps, regions)
        pooled = build("roi_pool", (3,) * len(strides), strides, size=6)(maps, regions)
        assert torch.equal(one_grid, pooled.flatten(1))


@pytest.mark.parametrize(("name", "options"), [("roi_pool", {"size": 3}), ("spp", {"grids": (3,)})])
def test_regions_at_or_beyond_the_border_have_the_features_of_the_map(name: str, options: dict[str, Any]) -> None:
    """At stride 8 x = 188.5 and y = 125 round to places 24 and 16, but the last of the map are 23 and 15."""
    (feature,) = random_maps(9, strides=(8,))
    regions = torch.tensor([[188.5, 40, 192, 56], [40, 125, 64, 128], [189, 126, 191, 127], [500, -90, 600, -20]])
    found = build(name, **options)([feature], [regions, regions[:0], regions[:0]])
    rows = [slice(5, 8), slice(15, 16), slice(15, 16), slice(0, 1)]
    columns = [slice(23, 24), slice(5, 9), slice(23, 24), slice(23, 24)]
    for values, row, column in zip(found.view(4, 3, -1), rows, columns):
        places = feature[0, :, row, column]
        assert torch.equal(values.amax(-1), places.amax((1, 2)))
        for channel, of_map in zip(values, places):
            assert set(channel.tolist()) <= set(of_map.flatten().tolist())


CASES: list[tuple[str, dict[str, Any]]] = [("roi_align", {}), ("roi_pool", {}), ("spp", {})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_no_regions_at_all_still_reach_every_map(name: str, options: dict[str, Any]) -> None:
    """In data-parallel training a parameter without a gradient stops the run."""
    features = build(name, (3,) * 4, STRIDES, **options)
    maps = [m.requires_grad_() for m in random_maps(0)]
    found = features(maps, [torch.zeros(0, 4)] * 3)
    assert found.shape == (0, *features.shape)
    found.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_channels_last_and_huge_regions_change_nothing(name: str, options: dict[str, Any]) -> None:
    features = build(name, (3,) * 4, STRIDES, **options)
    maps, regions = random_maps(4), random_regions(4)
    regions[1] = torch.tensor([[-1e6, -1e6, 1e6, 1e6], [3e5, 3e5, 4e5, 4e5], [50, 50, 50, 50]])
    found = features(maps, regions)
    assert found.isfinite().all()
    far_outside = torch.zeros(3) if name == "roi_align" else maps[3][1, :, -1, -1]
    assert set(found[13].flatten().tolist()) == set(far_outside.tolist())
    last = features([m.contiguous(memory_format=torch.channels_last) for m in maps], regions)
    torch.testing.assert_close(last, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_half_precision_maps_under_autocast(name: str, options: dict[str, Any]) -> None:
    features = build(name, (3,) * 4, STRIDES, **options)
    maps, regions = random_maps(5), random_regions(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = features([m.bfloat16() for m in maps], regions)
    assert found.shape == (19, *features.shape)
    torch.testing.assert_close(found.float(), features(maps, regions), rtol=0.02, atol=0.05)


def test_regions_know_their_image() -> None:
    boxes = [torch.tensor([[1.0, 2, 3, 4]]), torch.zeros(0, 4), torch.tensor([[5.0, 6, 7, 8], [0, 0, 1, 1]])]
    expected = [[0.0, 1, 2, 3, 4], [2, 5, 6, 7, 8], [2, 0, 0, 1, 1]]
    assert with_image_index(boxes).tolist() == expected


def picture(seed: int, images: int = 2, size: tuple[int, int] = (40, 60)) -> Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed))


def warped_by_resizing(image: Tensor, box: list[float], size: int) -> Tensor:
    """(3, size, size): the mean over as many bilinear samples as a cell has pixels, in an image padded with 0."""
    pad = 50
    padded = F.pad(image, (pad,) * 4)[None]
    left, top, right, bottom = (value + pad for value in box)
    rows, columns = (max(math.ceil(side / size), 1) for side in (bottom - top, right - left))
    y = top + (torch.arange(size * rows) + 0.5) * (bottom - top) / (size * rows)
    x = left + (torch.arange(size * columns) + 0.5) * (right - left) / (size * columns)
    grid = torch.stack(torch.meshgrid(2 * y / padded.shape[2] - 1, 2 * x / padded.shape[3] - 1, indexing="ij"), -1)
    samples = F.grid_sample(padded, grid.flip(-1)[None], align_corners=False)
    return F.avg_pool2d(samples, (rows, columns))[0]


def test_warp_equals_resized_crops() -> None:
    features = build("warp", strides=(1,), backbone={"name": "pixels"}, size=16, context=0)
    assert features.shape == (3, 16, 16)
    image = picture(0)
    boxes = [[5.0, 3, 21, 19], [2, 4, 50, 36], [10.3, 7.7, 18.9, 30.1], [20, 10, 24, 14], [1, 1, 59, 39]]
    found = features([image], [torch.tensor(boxes[:3]), torch.tensor(boxes[3:])])
    for pixels, box, index in zip(found, boxes, (0, 0, 0, 1, 1)):
        torch.testing.assert_close(pixels, warped_by_resizing(image[index], box, 16), rtol=0, atol=1e-4)
    # at its own size a crop is the image itself
    torch.testing.assert_close(found[0], image[0, :, 3:19, 5:21], rtol=0, atol=1e-5)


def test_warp_shows_what_is_around_the_region() -> None:
    """Of 16 pixels on each side 3 are context: the region fills the 10 in the middle."""
    image = picture(1)
    region = torch.tensor([[20.0, 12, 40, 22]])  # each context pixel is 2 wide and 1 high
    features = build("warp", strides=(1,), backbone={"name": "pixels"}, size=16, context=3)
    found = features([image], [region, torch.zeros(0, 4)])[0]
    torch.testing.assert_close(found, warped_by_resizing(image[0], [14, 9, 46, 25], 16), rtol=0, atol=1e-4)
    inner = build("warp", strides=(1,), backbone={"name": "pixels"}, size=10, context=0)
    torch.testing.assert_close(found[:, 3:13, 3:13], inner([image], [region, region[:0]])[0], rtol=0, atol=1e-5)


def test_outside_of_the_image_is_the_mean_colour() -> None:
    features = build("warp", strides=(1,), backbone={"name": "pixels"}, size=20, context=0)
    image = 5 + picture(2, 1).abs()
    regions = torch.tensor([[-10.0, -10, 10, 10], [50, 30, 70, 50], [200, 200, 220, 220]])
    found = features([image], [regions])
    assert not found[0, :, :9].any()
    assert not found[0, :, :, :9].any()
    torch.testing.assert_close(found[0, :, 10:, 10:], image[0, :, :10, :10], rtol=0, atol=1e-5)
    assert not found[1, :, 11:].any()
    assert not found[1, :, :, 11:].any()
    torch.testing.assert_close(found[1, :, :10, :10], image[0, :, 30:, 50:], rtol=0, atol=1e-5)
    assert not found[2].any()


def test_warp_freezes_the_first_stages_of_its_network() -> None:
    features = build("warp", strides=(1,), backbone={"name": "small_ssd"}, size=64, context=4, freeze=2)
    features.train()
    frozen = [name for name, parameter in features.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert {name.split(".")[2] for name in frozen} == {"0", "1"}
    features([picture(3)], [torch.tensor([[3.0, 3, 30, 30]])] * 2).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in features.parameters())
    with pytest.raises(ConfigError, match="0 to 6 can be frozen, not 7"):
        build("warp", strides=(1,), backbone={"name": "small_ssd"}, size=64, context=4, freeze=7)


@pytest.mark.parametrize("size", [64, 112, 100, 75])
@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "resnet18", "levels": [3]},
        {"name": "small_ssd", "widths": [4, 8]},
        {"name": "vgg11", "levels": [3]},
        {"name": "timm", "network": "tf_efficientnet_lite0", "levels": [3]},
    ],
    ids=lambda backbone: backbone["name"],
)
def test_warp_publishes_the_shape_that_comes_out(backbone: dict[str, Any], size: int) -> None:
    """VGG rounds the sizes of its maps down, residual networks up."""
    features = build("warp", strides=(1,), backbone=backbone, size=size, context=0).eval()
    with torch.no_grad():
        found = features([picture(4, 1)], [torch.tensor([[3.0, 3, 30, 30]])])
    assert found.shape == (1, *features.shape)


@pytest.mark.parametrize(
    ("name", "options", "channels", "strides", "message"),
    [
        ("roi_align", {}, (8,), (64,), r"a stride up to 32, but the strides are \[64\]\. Select other 'levels'"),
        ("spp", {}, (8,), (0,), r"a stride up to 32, but the strides are \[0\]"),
        (
            "roi_pool",
            {},
            (8, 4),
            (8, 16),
            r"same number of channels, but they have \[8, 4\]\. Add a neck.*\{name: fpn\}",
        ),
        ("warp", {"backbone": {"name": "pixels"}}, (3,), (8,), r"strides \[8\]\. Use backbone: \{name: pixels\}"),
        ("warp", {"backbone": {"name": "pixels"}}, (3, 3), (1, 2), r"strides \[1, 2\]\. Use backbone"),
        ("warp", {"backbone": {"name": "pixels"}, "size": 20, "context": 10}, (3,), (1,), r"in 0\.\.9, but is 10"),
        ("warp", {"backbone": {"name": "pixels"}, "context": -1}, (3,), (1,), r"in 0\.\.55, but is -1"),
        ("warp", {"backbone": {"name": "pixles"}}, (3,), (1,), "no backbone named 'pixles'.*'pixels'"),
        ("warp", {}, (3,), (1,), r"needs 'head\.features\.backbone'"),
        ("roi_aling", {}, (8,), (8,), "no kind of region features named 'roi_aling'.*'roi_align'"),
        ("roi_align", {"sizes": 7}, (8,), (8,), r"'head\.features\.sizes' is not an option.*'size'"),
    ],
)
def test_refusals(
    name: str, options: dict[str, Any], channels: tuple[int, ...], strides: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, channels, strides, **options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("roi_align", "size", 0),
        ("roi_align", "sampling", -3),
        ("roi_align", "canonical_size", 0.0),
        ("roi_align", "canonical_size", -5.0),
        ("roi_pool", "size", -1),
        ("spp", "grids", ()),
        ("spp", "grids", (2, 0)),
    ],
)
def test_values_out_of_range_are_refused_when_built(name: str, option: str, value: Any) -> None:
    """Else a region has no features, is read from the wrong map, or the first step fails in a kernel."""
    with pytest.raises(ConfigError, match=option):
        build(name, (3, 3), (8, 16), **{option: value})
