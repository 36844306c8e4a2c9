"""The augmentations perspective and hsv, each against plain loops."""

import colorsys
from typing import Any

import numpy as np
import pytest
import torch

from detkit.data.augment.warping import RandomWarp, warp_boxes, warp_image, warp_mask
from detkit.data.transforms import Augment, Fit
from detkit.errors import ConfigError
from detkit.structures import Meta, Sample, Target

STRONG = {"name": "perspective", "rotation": 45, "shear": 15, "scale": [0.5, 1.5], "perspective": 0.3}


def sample_with_objects(height: int = 120, width: int = 160) -> Sample:
    """Red, green and blue rectangles on black, with masks."""
    boxes = torch.tensor([[40.0, 30.0, 70.0, 60.0], [90.0, 20.0, 130.0, 50.0], [60.0, 70.0, 110.0, 100.0]])
    image = np.zeros((height, width, 3), dtype=np.uint8)
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    for index, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[top:bottom, left:right, index] = 255
        masks[index, top:bottom, left:right] = True
    target = Target(boxes, torch.tensor([0, 1, 2]), crowd=torch.tensor([False, True, False]), masks=masks)
    return Sample(image, target, Meta("id", "image", (height, width)))


def tight(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize(
    "options", [STRONG, {"name": "perspective"}, {"name": "perspective", "rotation": 90, "perspective": 0}]
)
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_turned_boxes_enclose_their_objects(options: dict[str, Any], resize: Any) -> None:
    augment = Augment([{**options, "fill": 0}], Fit((120, 160), resize))
    inside = 0
    for seed in range(30):
        result = augment(sample_with_objects(), seed)
        assert result.target.masks is not None
        for box, label, crowd, mask in zip(
            result.target.boxes, result.target.labels, result.target.crowd, result.target.masks
        ):
            assert bool(crowd) == (label == 1)
            # The image's own pixels agree with the warped mask, but for the blended edge.
            pixels = torch.from_numpy(result.image[..., int(label)] > 127)
            assert (pixels ^ mask).sum() <= 0.02 * mask.sum() + 12
            found = tight(mask)
            assert (box[:2] < found[:2] + 1).all()
            assert (box[2:] > found[2:] - 1).all()
            if box[:2].min() > 0 and box[2] < result.size[1] and box[3] < result.size[0]:
                inside += 1
                # At a sharp corner the last pixels have their centre outside of the object.
                assert (box - found).abs().max() < 3
    assert inside > 30


def test_warps_follow_their_matrix_pixel_by_pixel() -> None:
    warp = RandomWarp("test", rotation=180, translation=0.3, scale=(0.3, 2), shear=30, perspective=0.4)
    size, result_size = (40, 50), (30, 60)
    for seed in range(20):
        random = np.random.default_rng(seed)
        matrix = warp.draw(random, size, result_size)
        mask = random.integers(0, 2, size).astype(np.uint8).repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
        moved = warp_mask(np.ascontiguousarray(mask), matrix, result_size)
        inverse = np.linalg.inv(matrix)
        wrong = 0
        for row in range(result_size[0]):
            for column in range(result_size[1]):
                x, y, w = inverse @ [column + 0.5, row + 0.5, 1]
                x, y = x / w, y / w
                inside = 0 <= x < size[1] and 0 <= y < size[0]
                wrong += moved[row, column] != (mask[int(y), int(x)] if inside else 0)
        # OpenCV rounds coordinates to fractions of a pixel: a few lie on an edge.
        assert wrong < 0.02 * moved.size


def test_no_warp_changes_nothing() -> None:
    warp = RandomWarp("test", 0, 0, (1, 1), 0, 0)
    matrix = warp.draw(np.random.default_rng(0), (17, 23), (17, 23))
    assert np.allclose(matrix, np.eye(3))
    image = np.random.default_rng(1).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    assert np.array_equal(warp_image(image, np.eye(3), (17, 23), 0), image)
    assert warp_boxes(np.zeros((0, 4)), matrix).shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (2500, 3000)])
def test_odd_images_can_be_warped_and_coloured(size: tuple[int, int]) -> None:
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    sample = Sample(np.full((*size, 3), 200, np.uint8), Target(boxes, torch.tensor([0])), Meta(0, "odd", size))
    for fit in (Fit((32, 48)), Fit((32, 48), "letterbox"), Fit((32, 48), "short_side")):
        augment = Augment([STRONG, {"name": "hsv"}], fit)
        for seed in range(2):
            result = augment(sample, seed)
            target = result.target
            assert ((target.boxes >= 0) & (target.boxes <= torch.tensor([*result.size[::-1]] * 2))).all()
            assert (target.boxes[:, 2:] - target.boxes[:, :2] > 0).all()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "perspective", "perspective": 0.5}, r"'perspective\.perspective' must be in 0\.\.0\.49, but is 0\.5"),
        ({"name": "perspective", "scale": [1.5, 0.5]}, r"'perspective\.scale' .* is \[1\.5, 0\.5\]"),
        ({"name": "perspective", "scale": [0, 1]}, r"greater than 0, but is \[0\.0, 1\.0\]"),
        ({"name": "perspective", "rotation": -1}, r"'perspective\.rotation' must be in 0\.\.180"),
        ({"name": "perspective", "probability": 2}, r"'perspective\.probability' must be in 0\.\.1"),
        ({"name": "hsv", "hue": 0.7}, r"'hsv\.hue' must be in 0\.\.0\.5"),
        ({"name": "hsv", "saturation": -0.1}, r"'hsv\.saturation'"),
        (
            {"name": "hsv", "saturatoin": 0.1},
            r"'augment\[0\]\.saturatoin' is not an option .*Did you mean 'saturation'",
        ),
    ],
)
def test_impossible_options_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment([part], Fit((32, 32)))


def coloured(colours: np.ndarray, seed: int, **strengths: float) -> np.ndarray:
    """(N, 3) colours after hsv with these strengths and no others."""
    part = {"name": "hsv", **{"hue": 0.0, "saturation": 0.0, "value": 0.0, **strengths}}
    size = (1, len(colours))
    sample = Sample(colours[None], Target.empty(), Meta(0, "palette", size))
    return Augment([part], Fit(size))(sample, seed).image[0].astype(int)


def hsv_of(colour: np.ndarray) -> tuple[float, float, float]:
    return colorsys.rgb_to_hsv(*(colour / 255).tolist())


def palette() -> np.ndarray:
    """Bright, strong colours, the first pure red."""
    random = np.random.default_rng(0)
    colours = [colorsys.hsv_to_rgb(h, s, v) for h, s, v in random.uniform([0, 0.5, 0.5], 1, (60, 3))]
    return (np.array([[1, 0, 0], *colours]) * 255).round().astype(np.uint8)


def test_hue_turns_all_colours_by_one_angle() -> None:
    shifts = []
    for seed in range(20):
        changed = coloured(palette(), seed, hue=0.2)
        shift = (hsv_of(changed[0])[0] + 0.5) % 1 - 0.5
        shifts.append(shift)
        for before, after in zip(palette(), changed):
            hue, saturation, value = hsv_of(before)
            expected = np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)) * 255
            # OpenCV's hue has 180 levels.
            assert np.abs(after - expected).max() < 14
    assert min(shifts) < -0.1
    assert max(shifts) > 0.1
    assert np.abs(shifts).max() <= 0.2 + 1 / 180


@pytest.mark.parametrize("channel", ["saturation", "value"])
def test_saturation_and_value_are_multiplied_and_clipped(channel: str) -> None:
    number = ["hue", "saturation", "value"].index(channel)
    weakest, strongest = 1.0, 1.0
    reference = np.array([[128, 64, 64]], dtype=np.uint8)
    for seed in range(20):
        changed = coloured(np.concatenate([reference, palette()]), seed, **{channel: 0.5})
        factor = hsv_of(changed[0])[number] / hsv_of(reference[0])[number]
        weakest, strongest = min(weakest, factor), max(strongest, factor)
        for before, after in zip(palette(), changed[1:]):
            expected = list(hsv_of(before))
            expected[number] = min(1, expected[number] * factor)
            assert np.abs(after - np.array(colorsys.hsv_to_rgb(*expected)) * 255).max() < 14
    assert 0.48 < weakest < 0.7
    assert 1.3 < strongest < 1.52


def test_the_same_seed_gives_the_same_image() -> None:
    parts = [{"name": "perspective", "probability": 0.5}, {"name": "hsv"}, {"name": "flip"}]
    augment, again = Augment(parts, Fit((64, 64))), Augment(parts, Fit((64, 64)))
    seen = set()
    for seed in [*range(10), *range(10)]:
        one, two = augment(sample_with_objects(), seed), again(sample_with_objects(), seed)
        assert np.array_equal(one.image, two.image)
        assert torch.equal(one.target.boxes, two.target.boxes)
        seen.add(one.image.tobytes())
    assert len(seen) == 10
