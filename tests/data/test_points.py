"""Points through Fit, augmentation, COCO files and crops."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data.formats.coco import Coco
from detkit.data.formats.crops import Crops
from detkit.data.points import PointRule, flip_pairs_of, point_rule
from detkit.data.transforms import Augment, Fit, undo
from detkit.errors import ConfigError, DataError
from detkit.structures import Detections, Meta, Sample, Target

PLACES = [[20.0, 30.0], [60.0, 30.0], [40.0, 50.0], [7.0, 75.0]]
COLORS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]
RULE = PointRule(((0, 1),))


def sample() -> Sample:
    """Each point is the centre of a patch of its own colour, 6 x 6 pixels."""
    image = np.zeros((100, 80, 3), np.uint8)
    for (x, y), color in zip(PLACES, COLORS):
        image[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3] = color
    target = Target(
        torch.tensor([[1.0, 2, 79, 98]]),
        torch.tensor([0]),
        points=torch.tensor([PLACES]),
        visible=torch.ones(1, 4, dtype=torch.bool),
    )
    return Sample(image, target, Meta(1, "a.jpg", (100, 80)))


def seen(image: np.ndarray, color: list[int]) -> np.ndarray:
    """The centre of the patch of a colour, x and y."""
    rows, columns = np.nonzero((np.abs(image.astype(int) - color) < 100).all(2))
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def check(result: Sample, tolerance: float, order: list[int] | None = None) -> None:
    assert result.target.points is not None
    assert result.target.visible is not None
    for place, visible, index in zip(result.target.points[0], result.target.visible[0], order or range(4)):
        if visible:
            np.testing.assert_allclose(seen(result.image, COLORS[index]), place.numpy(), atol=tolerance)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_fit_moves_points_with_their_pixels_and_undo_takes_them_back(resize: Any) -> None:
    fitted = Fit((160, 200), resize)(sample())
    pixels = (fitted.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    check(Sample(pixels, fitted.target, fitted.meta), 0.7)
    found = Detections(fitted.target.boxes, torch.ones(1), torch.tensor([0]), points=fitted.target.points)
    back = undo(found, fitted.meta).points
    np.testing.assert_allclose(back[0], PLACES, atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "parts",
    [
        [{"name": "flip", "horizontal": 0.5, "vertical": 0.5}],
        [{"name": "zoom_crop", "probability": 1.0}, {"name": "flip"}],
        [{"name": "expand", "probability": 1.0}, {"name": "iou_crop"}],
        [{"name": "perspective", "rotation": 15.0, "scale": [0.9, 1.1], "fill": 20.0}],
    ],
)
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_augmentation_moves_points_with_their_pixels(seed: int, parts: list[dict[str, Any]], resize: Any) -> None:
    result = Augment(parts, Fit((120, 120), resize), points=RULE)(sample(), seed)
    if not len(result.target):
        return
    assert result.target.points is not None
    assert result.target.visible is not None
    red, green = (seen_or_none(result.image, color) for color in COLORS[:2])
    swapped = bool(
        red is not None
        and green is not None
        and np.linalg.norm(result.target.points[0, 0].numpy() - green)
        < np.linalg.norm(result.target.points[0, 0].numpy() - red)
    )
    for index, (place, visible) in enumerate(zip(result.target.points[0].numpy(), result.target.visible[0])):
        color = COLORS[[1, 0, 2, 3][index] if swapped else index]
        where = seen_or_none(result.image, color)
        if not visible or where is None:
            continue
        # A patch that the border cuts has its centre elsewhere.
        if (place > 12).all() and (place < 108).all():
            np.testing.assert_allclose(where, place, atol=1.6)


def seen_or_none(image: np.ndarray, color: list[int]) -> np.ndarray | None:
    found = (np.abs(image.astype(int) - color) < 100).all(2)
    return seen(image, color) if found.any() else None


def test_a_mirrored_image_has_left_and_right_exchanged() -> None:
    original = sample()
    visible = torch.tensor([[True, False, True, True]])
    original = replace(original, target=replace(original.target, visible=visible))
    flip = [{"name": "flip", "horizontal": 1.0}]
    result = Augment(flip, Fit((100, 80)), points=RULE)(original, 0)
    assert result.target.points is not None
    assert result.target.points[0].tolist() == [[20.0, 30], [60, 30], [40, 50], [73, 75]]
    assert result.target.visible.tolist() == [[False, True, True, True]]  # type: ignore[union-attr]
    # Upside down it is mirrored, too; turned by half a circle it is not.
    half_turn = [{"name": "flip", "horizontal": 1.0, "vertical": 1.0}]
    result = Augment(half_turn, Fit((100, 80)), points=RULE)(original, 0)
    assert result.target.points[0, 0].tolist() == [60.0, 70.0]  # type: ignore[index]


def test_a_point_that_leaves_the_image_is_not_visible_even_where_padding_follows() -> None:
    crop = {
        "name": "albumentations",
        "transform": "Crop",
        "options": {"x_min": 0, "y_min": 0, "x_max": 50, "y_max": 100},
    }
    for parts in ([crop], [crop, {"name": "expand", "probability": 1.0}]):
        result = Augment(parts, Fit((100, 100), "letterbox"), points=RULE)(sample(), 0)
        assert result.target.visible.tolist() == [[True, False, True, True]]  # type: ignore[union-attr]


def test_augmentations_that_would_spoil_points_are_refused() -> None:
    fit = Fit((64, 64))
    with pytest.raises(ConfigError, match="HorizontalFlip mirrors images"):
        Augment([{"name": "flip"}], fit, points=PointRule(None))
    with pytest.raises(ConfigError, match="do not support points"):
        Augment([{"name": "mosaic"}], fit, points=RULE)
    turn = [{"name": "albumentations", "transform": "Affine", "options": {"scale": {"x": -1.0, "y": 1.0}, "p": 1.0}}]
    try:
        mirroring = Augment(turn, fit, points=PointRule(None))
    except ConfigError:
        return  # this version of albumentations takes no negative scale
    with pytest.raises(DataError, match="mirrored an image"):
        mirroring(sample(), 0)


def test_pairs_are_found_by_their_names() -> None:
    assert flip_pairs_of(["nose", "left_eye", "right_eye", "left_ear"]) == ((1, 2),)
    assert flip_pairs_of(["nose", "chin"]) is None


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Path]:
    """A COCO data set of one image, with these keypoints of its one object, and names of the points."""

    def make(keypoints: Any, names: Any = ("left_eye", "right_eye"), **entry: Any) -> Path:
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (80, 60)).save(tmp_path / "train" / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
            "categories": [{"id": 1, "name": "person", "keypoints": list(names)}, {"id": 2, "name": "dog"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30], "keypoints": keypoints, **entry},
                {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]},
            ],
        }
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_coco_keypoints_are_read(coco: Callable[..., Path]) -> None:
    dataset = Coco(str(coco([20, 15, 2, 0, 0, 0])), "train", points=True)
    target = dataset.target(0)
    assert target.points.tolist() == [[[20, 15], [0, 0]], [[0, 0], [0, 0]]]  # type: ignore[union-attr]
    assert target.visible.tolist() == [[True, False], [False, False]]  # type: ignore[union-attr]
    assert dataset.flip_pairs == ((0, 1),)
    assert point_rule(dataset) == PointRule(((0, 1),))
    assert point_rule(Coco(dataset._json.parents[1].as_posix(), "train")) is None


@pytest.mark.parametrize(
    ("keypoints", "names", "message"),
    [
        ([20, 15, 2], ("a", "b"), r"6 numbers, but is \[20, 15, 2\], which has 3 values"),
        ([20, 15, 2, "x", 0, 0], ("a", "b"), "'x' is not a finite number"),
        ([20, 15, 2, True, 0, 0], ("a", "b"), "but True is not a finite number"),
        ([20, 15, 2, 10**400, 0, 0], ("a", "b"), "0 is not a finite number"),
        (5, ("a", "b"), "but is 5"),
        ([20, 15, 2, 200, 15, 1], ("a", "b"), "1 of its points are outside the image"),
        ([20, 15, 2, float("nan"), 15, 1], ("a", "b"), "nan is not a finite number"),
        ([], (), "no category in .* has 'keypoints'"),
        ([], [1, 2], r"'keypoints' of a category in .* must be a list of names, but is \[1, 2\]"),
    ],
)
def test_broken_keypoints_are_named(coco: Callable[..., Path], keypoints: Any, names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Coco(str(coco(keypoints, names)), "train", points=True)
    Coco(str(coco(keypoints, names)), "train")  # without points nobody asks


def test_points_outside_are_not_visible_where_data_are_repaired(coco: Callable[..., Path]) -> None:
    dataset = Coco(str(coco([20, 15, 2, 200, 15, 1])), "train", "repair", points=True)
    assert dataset.target(0).visible.tolist() == [[True, False], [False, False]]  # type: ignore[union-attr]
    assert "point outside the image" in dataset.problems.summary()


def test_crops_carry_the_points_of_their_object(coco: Callable[..., Path]) -> None:
    root = coco([20, 15, 2, 79, 59, 2])
    crops = Crops("train", {"name": "coco", "root": str(root)}, margin=0.0, points=True)
    target = crops[0].target
    assert target.points.tolist() == [[[10, 5], [69, 49]]]  # type: ignore[union-attr]
    assert target.visible.tolist() == [[True, False]]  # type: ignore[union-attr]
    assert target.boxes.tolist() == [[0, 0, 40, 30]]
    assert crops.flip_pairs == ((0, 1),)
    assert "points" not in Crops("train", {"name": "coco", "root": str(root)}).fields
