"""Objects smaller than a pixel of the input through augmentation: kept unless they are cut."""

from typing import Any

import numpy as np
import pytest
import torch

from detkit.data.augment.mixing import Mosaic
from detkit.data.transforms import Augment, Fit
from detkit.structures import Meta, Sample, Target

SIZE = (600, 800)


def sample(boxes: list[list[float]], size: tuple[int, int] = SIZE, proposals: bool = False) -> Sample:
    table = torch.tensor(boxes, dtype=torch.float32)
    target = Target(table, torch.arange(len(boxes)))
    image = np.zeros((*size, 3), np.uint8)
    return Sample(image, target, Meta("id", "a.jpg", size), table.clone() if proposals else None)


def scattered(count: int, side: float, size: tuple[int, int] = SIZE, margin: float = 10) -> list[list[float]]:
    random = np.random.default_rng(0)
    corners = random.uniform(margin, np.array(size[::-1]) - margin - side, (count, 2))
    return np.column_stack([corners, corners + side]).tolist()


@pytest.mark.parametrize("side", [0.01, 0.6, 4.0])
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
@pytest.mark.parametrize(
    "parts",
    [
        [],
        [{"name": "photometric"}],
        [{"name": "flip", "horizontal": 0.0}],
        [{"name": "expand", "probability": 1.0}],
        [{"name": "perspective", "rotation": 5, "translation": 0, "scale": [0.5, 0.6], "perspective": 0, "shear": 0}],
    ],
)
def test_all_objects_stay_where_nothing_is_cut(side: float, resize: Any, parts: list[dict[str, Any]]) -> None:
    fit = Fit((60, 60), resize)
    given = sample(scattered(20, side), proposals=True)
    result = fit(Augment(parts, fit)(given, 0))
    plain = fit(given)
    assert result.target.labels.tolist() == list(range(20))
    assert result.proposals is not None
    assert len(result.proposals) == 20
    if not parts or parts[0]["name"] in ("photometric", "flip"):
        torch.testing.assert_close(result.target.boxes, plain.target.boxes, atol=1e-3, rtol=0)


def test_their_masks_stay_with_them() -> None:
    given = sample(scattered(5, 3.0, (300, 400)), (300, 400))
    masks = torch.zeros(5, 300, 400, dtype=torch.bool)
    given = Sample(given.image, Target(given.target.boxes, given.target.labels, masks=masks), given.meta)
    result = Augment([{"name": "flip"}], Fit((30, 40)))(given, 0)
    assert result.target.masks is not None
    assert result.target.masks.shape == (5, 30, 40)
    assert result.target.labels.tolist() == list(range(5))


def crop(left: int, top: int, right: int, bottom: int) -> dict[str, Any]:
    options = {"x_min": left, "y_min": top, "x_max": right, "y_max": bottom}
    return {"name": "albumentations", "transform": "Crop", "options": options}


@pytest.mark.parametrize("margin", [0, 100])
def test_a_cut_drops_what_leaves_too_little(margin: int) -> None:
    boxes = [
        [40, 40, 60, 60],  # whole
        [10, 40, 60, 60],  # 60 % of it is left
        [28, 40, 31, 60],  # a third, but a strip of one pixel, half a pixel of the input
        [0, 40, 35, 60],  # a seventh
        [0, 0, 20, 20],  # gone
        [30.2, 40, 30.6, 40.4],  # small and whole
        [29.9, 40, 30.4, 40.4],  # small and cut
    ]
    given = sample(boxes, (200, 200))
    for resized, kept in ((140, [0, 1, 2, 5]), (70, [0, 1, 5])):
        result = Augment([crop(30, 30, 170, 170)], Fit((resized, resized)))(given, 0)
        assert result.target.labels.tolist() == kept
    # The cut counts, too, where the image grows again before it is resized.
    pad = {"name": "expand", "probability": 1.0, "max_ratio": 1.0 + margin / 140}
    result = Augment([crop(30, 30, 170, 170), pad], Fit((70, 70)))(given, 0)
    assert result.target.labels.tolist() == [0, 1, 5]


def test_the_whole_image_as_a_crop_drops_nothing() -> None:
    given = sample([[0, 0, 2, 2], [798, 598, 800, 600], [0, 0, 800, 1]])
    result = Augment([crop(0, 0, 800, 600), {"name": "iou_crop", "min_scale": 1.0}], Fit((60, 60)))(given, 0)
    assert result.target.labels.tolist() == [0, 1, 2]


def test_mixes_keep_small_objects_that_they_do_not_cut() -> None:
    samples = [sample(scattered(10, 4.0, margin=250)) for _ in range(4)]
    mosaic = Mosaic(scale=(0.5, 0.5), translation=0.0)  # all of the canvas
    result = mosaic(samples, (60, 60), 0.2, np.random.default_rng(0))
    assert len(result.target) == 40
    assert float((result.target.boxes[:, 2:] - result.target.boxes[:, :2]).max()) < 1
    mixup = Augment([{"name": "mixup", "probability": 1.0, "scale": [0.5, 0.5]}], Fit((60, 60)))
    assert len(mixup(samples[0], 0, samples).target) == 20
