"""Augmentations of single images, each an albumentations transform, so that they combine with albumentations' own.

Those that mix several images are in detkit.data.augment.mixing.
"""

import os
import warnings
from typing import Any

# Albumentations checks for a new version online on import, unless this is set.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.crops.transforms import BaseCrop
from albumentations.core.bbox_utils import BboxProcessor, calculate_bbox_areas_in_pixels, clip_bboxes

from detkit.data.augment.warping import RandomWarp, warp_boxes, warp_image, warp_mask, warp_points
from detkit.data.points import drop_outside
from detkit.data.transforms import UNCUT
from detkit.errors import ConfigError, check_range, nearest
from detkit.registry import augmentations


@augmentations.register("flip")
def flip(horizontal: float = 0.5, vertical: float = 0.0) -> Any:
    """Mirror left to right and top to bottom, each with its own probability."""
    return A.Sequential([_HorizontalFlip(p=horizontal), _VerticalFlip(p=vertical)], p=1.0)


class _SameScale:
    """Mixin of transforms that do not magnify; see Augment.largest_zoom."""

    def largest_zoom(self, size: tuple[int, int]) -> float:
        return 1.0


class _HorizontalFlip(_SameScale, A.HorizontalFlip):
    """A flip that mirrors points like boxes, at the image's centre; albumentations is half a pixel off for points."""

    def apply_to_keypoints(self, keypoints: np.ndarray, **params: Any) -> np.ndarray:
        mirrored = keypoints.copy()
        mirrored[:, 0] = params["shape"][1] - keypoints[:, 0]
        return mirrored


class _VerticalFlip(_SameScale, A.VerticalFlip):
    """A vertical flip; see `_HorizontalFlip`."""

    def apply_to_keypoints(self, keypoints: np.ndarray, **params: Any) -> np.ndarray:
        mirrored = keypoints.copy()
        mirrored[:, 1] = params["shape"][0] - keypoints[:, 1]
        return mirrored


class VisibleBoxes(BboxProcessor):
    """Drops boxes of which a cut leaves too little.

    Albumentations' processor also drops uncut boxes that become smaller than a pixel in the resize to the input. The
    last column of a box is set if an earlier transform has cut it.
    """

    def filter(self, data: np.ndarray, shape: Any) -> np.ndarray:
        if not len(data):
            return data
        clipped = clip_bboxes(data, shape)
        whole, left = (calculate_bbox_areas_in_pixels(boxes, shape) for boxes in (data, clipped))
        # Albumentations' epsilon against division by 0; for boxes as small as that, use whether they are inside.
        inside = np.isclose(data[:, :4], clipped[:, :4], rtol=0).all(1)
        visible = np.where(whole > 1e-3, left / (whole + 1e-7), inside)
        clipped[:, -1] = np.maximum(clipped[:, -1], visible < UNCUT)
        sides = (clipped[:, 2:4] - clipped[:, :2]) * [shape["width"], shape["height"]]
        too_small = (clipped[:, -1] > 0) & (sides < 1 - 1e-7).any(1)
        return clipped[(visible > 0) & (visible >= self.params.min_visibility) & ~too_small]

    def check(self, data: np.ndarray, shape: Any) -> None:
        """Also accept boxes without area, since boxes were checked when the data set was read."""


class DropOutsidePoints(A.NoOp):
    """Moves points outside the image far away; see detkit.data.points."""

    def apply_to_keypoints(self, keypoints: np.ndarray, **params: Any) -> np.ndarray:
        return drop_outside(keypoints, params["shape"][:2])


class _ColorJitter(_SameScale, A.ColorJitter):
    pass


@augmentations.register("photometric")
def photometric(
    brightness: float = 0.125,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.05,
    probability: float = 0.5,
) -> Any:
    """SSD's colour distortion (Liu et al. 2016, section 2.2), in random order; strengths are relative to no change."""
    return _ColorJitter(
        brightness=(1 - brightness, 1 + brightness),
        contrast=(1 - contrast, 1 + contrast),
        saturation=(1 - saturation, 1 + saturation),
        hue=(-hue, hue),
        p=probability,
    )


class _HSV(_SameScale, A.ImageOnlyTransform):
    """Shifts hue and multiplies saturation and value, by look-up tables."""

    def __init__(self, hue: float, saturation: float, value: float, p: float) -> None:
        super().__init__(p=p)
        self.strengths = hue, saturation, value

    def get_params(self) -> dict[str, Any]:
        hue, saturation, value = (self.py_random.uniform(-strength, strength) for strength in self.strengths)
        levels = np.arange(256)
        # OpenCV's hues are 0..179.
        tables = [(levels + round(180 * hue)) % 180, levels * (1 + saturation), levels * (1 + value)]
        return {"tables": np.stack(tables, axis=-1).round().clip(0, 255).astype(np.uint8)[None]}

    def apply(self, img: np.ndarray, tables: np.ndarray, **params: Any) -> np.ndarray:
        changed = cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV), tables)
        return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB)


@augmentations.register("hsv")
def hsv(hue: float = 0.015, saturation: float = 0.7, value: float = 0.4, probability: float = 1.0) -> Any:
    """YOLO's colour distortion (Redmon et al. 2016, section 2.2): shift the hue by up to the fraction `hue` of the
    colour circle, and multiply saturation and value by up to 1 ± their strength. The defaults are YOLOv5's."""
    check_range("hsv", 0, 0.5, hue=hue)
    check_range("hsv", 0, 1, saturation=saturation, value=value, probability=probability)
    return _HSV(hue, saturation, value, probability)


class _Perspective(A.DualTransform):
    """Applies a random homography, keeping the image size."""

    def __init__(self, warp: RandomWarp, fill: float, p: float) -> None:
        super().__init__(p=p)
        self.warp, self.fill = warp, fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        size = params["shape"][:2]
        return {"matrix": self.warp.draw(self.random_generator, size, size)}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        return warp_image(img, matrix, params["shape"][:2], self.fill)

    def apply_to_mask(self, mask: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        return warp_mask(mask, matrix, params["shape"][:2])

    def apply_to_bboxes(self, bboxes: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        height, width = params["shape"][:2]
        sides = np.array([width, height, width, height])
        # Albumentations passes boxes as fractions of the sides, followed by further columns.
        moved = warp_boxes(bboxes[:, :4] * sides, matrix) / sides
        return np.column_stack([moved, bboxes[:, 4:]]).astype(bboxes.dtype)

    def apply_to_keypoints(self, keypoints: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        moved = warp_points(keypoints[:, :2], matrix)
        return np.column_stack([moved, keypoints[:, 2:]]).astype(keypoints.dtype)

    def largest_zoom(self, size: tuple[int, int]) -> float:
        return self.warp.largest_zoom(size)


@augmentations.register("perspective")
def perspective(
    rotation: float = 10.0,
    translation: float = 0.1,
    scale: tuple[float, float] = (0.5, 1.5),
    shear: float = 2.0,
    perspective: float = 0.1,
    fill: float = 114.0,
    probability: float = 1.0,
) -> Any:
    """Rotate, translate, scale, shear and tilt the image at random in one step (YOLOv5's random perspective).

    The new boxes enclose the rotated ones: for large angles they are too wide for most objects.

    Args:
        rotation: maximum angle in degrees, in both directions.
        translation: maximum shift of the centre, as a fraction of each side, in both directions.
        scale: smallest and largest factor.
        shear: maximum angle in degrees, along each axis.
        perspective: maximum relative difference of distance between the edges and the centre along each axis; 0 for
            none.
        fill: grey value in 0..255 outside the image.
        probability: probability of the transform.
    """
    check_range("perspective", 0, 255, fill=fill)
    check_range("perspective", 0, 1, probability=probability)
    return _Perspective(RandomWarp("perspective", rotation, translation, scale, shear, perspective), fill, probability)


class _Expand(_SameScale, A.Pad):
    """Places the image at random on a larger canvas."""

    def __init__(self, max_ratio: float, fill: tuple[float, float, float], p: float) -> None:
        super().__init__(fill=fill, p=p)
        self.max_ratio = max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1.0, self.max_ratio)
        rows, columns = round(height * (ratio - 1)), round(width * (ratio - 1))
        top, left = self.py_random.randint(0, rows), self.py_random.randint(0, columns)
        return {"pad_top": top, "pad_bottom": rows - top, "pad_left": left, "pad_right": columns - left}


@augmentations.register("expand")
def expand(
    max_ratio: float = 4.0, fill: tuple[float, float, float] = (123.0, 117.0, 104.0), probability: float = 0.5
) -> Any:
    """SSD's zoom out: place the image at random on a canvas of colour `fill`, up to `max_ratio` times as large."""
    if max_ratio < 1:
        raise ConfigError(f"'expand.max_ratio' must be at least 1, but is {max_ratio}.")
    return _Expand(max_ratio, fill, probability)


class _IoUCrop(BaseCrop):
    """Crops a random window whose IoU with at least one object reaches a random minimum."""

    def __init__(
        self, min_scale: float, max_scale: float, min_ratio: float, max_ratio: float, trials: int, p: float
    ) -> None:
        super().__init__(p=p)
        self.scales, self.ratios, self.trials = (min_scale, max_scale), (min_ratio, max_ratio), trials

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        boxes = np.array([box[:4] for box in data["bboxes"]], dtype=np.float64).reshape(-1, 4)
        boxes *= [width, height, width, height]
        # 2 means the whole image, one of the paper's choices.
        minimum = self.py_random.choice([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 2.0])
        if minimum < 2.0:
            for _ in range(self.trials):
                window = self._window(height, width)
                if self._accept(window, boxes, minimum):
                    return {"crop_coords": window}
        return {"crop_coords": (0, 0, width, height)}

    def largest_zoom(self, size: tuple[int, int]) -> float:
        return 1 / max(self.scales[0], 1e-9)

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        rows = max(1, round(height * self.py_random.uniform(*self.scales)))
        columns = max(1, round(width * self.py_random.uniform(*self.scales)))
        top, left = self.py_random.randint(0, height - rows), self.py_random.randint(0, width - columns)
        return left, top, left + columns, top + rows

    def _accept(self, window: tuple[int, int, int, int], boxes: np.ndarray, minimum: float) -> bool:
        left, top, right, bottom = window
        if not self.ratios[0] <= (right - left) / (bottom - top) <= self.ratios[1]:
            return False
        if not len(boxes):
            return True
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres > [left, top]) & (centres < [right, bottom])).all(1)
        if not inside.any():
            return False
        overlap = np.minimum(boxes[:, 2:], [right, bottom]) - np.maximum(boxes[:, :2], [left, top])
        intersection = overlap.clip(0).prod(1)
        union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (right - left) * (bottom - top) - intersection
        return bool((intersection[inside] / union[inside]).max() >= minimum)


@augmentations.register("iou_crop")
def iou_crop(
    min_scale: float = 0.3,
    max_scale: float = 1.0,
    min_ratio: float = 0.5,
    max_ratio: float = 2.0,
    trials: int = 40,
    probability: float = 1.0,
) -> Any:
    """SSD's random crop (Liu et al. 2016, section 2.2): the window contains an object's centre and has at least an IoU
    drawn from 0, 0.1, 0.3, 0.5, 0.7, 0.9 with that object; with probability 1/7, or if `trials` do not find such a
    window, the whole image is kept. Scales are fractions of each side, ratios of width to height."""
    return _IoUCrop(min_scale, max_scale, min_ratio, max_ratio, trials, probability)


@augmentations.register("zoom_crop")
def zoom_crop(min_scale: float = 0.5, max_ratio: float = 1.33, probability: float = 0.5) -> Any:
    """Crop a random window of at least `min_scale` of each side, regardless of its content, changing aspect ratios by
    at most `max_ratio`. Milder than `iou_crop`: for few images with many objects each."""
    return _ZoomCrop(min_scale, max_ratio, probability)


class _ZoomCrop(BaseCrop):
    """Crops a random window of nearly the image's aspect ratio."""

    def __init__(self, min_scale: float, max_ratio: float, p: float) -> None:
        super().__init__(p=p)
        self.min_scale, self.max_ratio = min_scale, max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        scale = self.py_random.uniform(self.min_scale, 1.0)
        stretch = self.py_random.uniform(1 / self.max_ratio, self.max_ratio) ** 0.5
        rows = max(1, round(height * min(1.0, scale / stretch)))
        columns = max(1, round(width * min(1.0, scale * stretch)))
        top, left = self.py_random.randint(0, height - rows), self.py_random.randint(0, width - columns)
        return {"crop_coords": (left, top, left + columns, top + rows)}

    def largest_zoom(self, size: tuple[int, int]) -> float:
        return self.max_ratio**0.5 / max(self.min_scale, 1e-9)


@augmentations.register("random_resized_crop")
def random_resized_crop(
    area: tuple[float, float] = (0.1, 1.0), ratio: tuple[float, float] = (0.5, 2.0), probability: float = 1.0
) -> Any:
    """Crop a random window, which is then resized to the input (Szegedy et al. 2015, section 6): the standard of
    classification, for which the position of objects hardly matters.

    Args:
        area: smallest and largest fraction of the image's area.
        ratio: smallest and largest ratio of the window's width to its height, drawn on a logarithmic scale.
        probability: probability of the transform.
    """
    for name, (low, high), most in (("area", area, 1.0), ("ratio", ratio, np.inf)):
        if not 0 < low <= high <= most:
            raise ConfigError(
                f"'random_resized_crop.{name}' must be two numbers above 0, the smaller first"
                f"{' and none above 1' if most == 1 else ''}, but is {[low, high]}."
            )
    return _RandomResizedCrop(area, ratio, probability)


class _RandomResizedCrop(BaseCrop):
    """Crops a random window by area and aspect ratio.

    Unlike albumentations' transform it does not resize the window, which is done once at the end of the pipeline.
    """

    def __init__(self, area: tuple[float, float], ratio: tuple[float, float], p: float) -> None:
        super().__init__(p=p)
        self.area, self.ratio = area, ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        rows, columns = height, width
        for _ in range(10):
            pixels = height * width * self.py_random.uniform(*self.area)
            ratio = float(np.exp(self.py_random.uniform(*np.log(self.ratio))))
            tried = max(1, round((pixels / ratio) ** 0.5)), max(1, round((pixels * ratio) ** 0.5))
            if tried[0] <= height and tried[1] <= width:
                rows, columns = tried
                break
        top, left = self.py_random.randint(0, height - rows), self.py_random.randint(0, width - columns)
        return {"crop_coords": (left, top, left + columns, top + rows)}

    def largest_zoom(self, size: tuple[int, int]) -> float:
        shape = size[1] / size[0]
        # The relative sides of a window are at least its relative area.
        parts = self.area[0] * shape / self.ratio[1], self.area[0] * self.ratio[0] / shape
        return 1 / max(self.area[0], min(parts) ** 0.5)


@augmentations.register("random_scale")
def random_scale(smallest: float = 0.5, largest: float = 2.0, probability: float = 1.0) -> Any:
    """Resize the image by a random factor, for `input.resize: crop`, which then takes a crop of it; the default factors
    are common for segmentation (Chen et al. 2017, DeepLabv3, section 4.1)."""
    if not 0 < smallest <= largest:
        raise ConfigError(
            f"'random_scale' draws from smallest..largest, both greater than 0, but these are {smallest} and {largest}."
        )
    check_range("random_scale", 0, 1, probability=probability)
    # Albumentations' default, INTER_NEAREST, shifts masks by up to half a pixel.
    exact = cv2.INTER_NEAREST_EXACT
    return A.RandomScale((smallest - 1, largest - 1), mask_interpolation=exact, p=probability)


@augmentations.register("albumentations")
def albumentations(transform: str, options: dict[str, Any] | None = None) -> Any:
    """Any albumentations transform by its class name, with its own options.

    Raises:
        ConfigError: there is no such transform, or an option is unknown; albumentations itself only warns about a
            misspelt one and ignores it.
    """
    if not (isinstance(getattr(A, transform, None), type) and issubclass(getattr(A, transform), A.BasicTransform)):
        names = [
            name
            for name in dir(A)
            if isinstance(getattr(A, name), type) and issubclass(getattr(A, name), A.BasicTransform)
        ]
        raise ConfigError(f"There is no albumentations transform named '{transform}'. {nearest(transform, names)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return getattr(A, transform)(**(options or {}))
        except (UserWarning, TypeError, ValueError) as error:
            raise ConfigError(f"The albumentations transform '{transform}' rejects its options: {error}") from None
