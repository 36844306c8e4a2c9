"""Synthetic images of coloured shapes, for first runs, tests, and checks that training works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from detkit.data.dataset import DETECTION_FIELDS, Dataset, Problems
from detkit.data.masks import tight_box
from detkit.data.semantic import BACKGROUND
from detkit.errors import DataError, nearest
from detkit.registry import datasets
from detkit.structures import ClassList, Meta, Sample, Target

_SPLITS = {"train": 0, "val": 1, "test": 2}
_SMALLEST, _LARGEST = 0.12, 0.5  # extent of an object, as a part of the image's side
_LEAST_VISIBLE = 0.5
_EMPTY_SHARE = 0.02
_PLACES_TRIED = 12
_LEAST_CONTRAST = 90.0  # distance in RGB between the colour of an object and all that it covers


@datasets.register("shapes")
class Shapes(Dataset):
    """Circles, squares, triangles and stars of many sizes, colours and textures on textured backgrounds.

    An image depends only on (seed, split, index); splits do not share images. Later objects occlude earlier ones by at
    most half; boxes and masks are exact, tight around the visible pixels. About 2 % of the images have no object.
    meta.image_id is the index.

    Args:
        split: train, val or test.
        train_count: number of training images.
        val_count: number of images of val and of test.
        size: height and width in pixels, at least 32.
        max_objects: maximum number of objects per image, as far as they fit.
        seed: seed of the images.
        masks: targets have masks.
        semantic: targets have semantic maps; the first class is then "background".

    Raises:
        DataError: there is no such split, or a number is too small.
    """

    def __init__(
        self,
        split: str,
        train_count: int = 1000,
        val_count: int = 200,
        size: int = 192,
        max_objects: int = 6,
        seed: int = 0,
        masks: bool = False,
        semantic: bool = False,
    ) -> None:
        if split not in _SPLITS:
            raise DataError(
                f"The shapes have no split '{split}'. {nearest(split, _SPLITS)} Set data.train and data.val."
            )
        for name, value, least in (
            ("train_count", train_count, 1),
            ("val_count", val_count, 1),
            ("size", size, 32),
            ("max_objects", max_objects, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"data.{name} of the shapes is {value}. Set it to at least {least}.")
        self.classes = ClassList.from_names(((BACKGROUND,) if semantic else ()) + tuple(_OUTLINES))
        self.fields = DETECTION_FIELDS | ({"masks"} if masks else set()) | ({"semantic"} if semantic else set())
        self.problems = Problems(f"The shapes (split '{split}')", "fail")
        self._split = split
        self._count = train_count if split == "train" else val_count
        self._side = size
        self._max_objects = max_objects
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        random = self._random(index)
        scene = _Scene(self._side, self._max_objects, random)
        meta = Meta(index, self.source(index), self.size(index))
        return Sample(_paint(scene, random), self._target(scene), meta)

    def target(self, index: int) -> Target:
        return self._target(_Scene(self._side, self._max_objects, self._random(index)))

    def size(self, index: int) -> tuple[int, int]:
        return self._side, self._side

    def image_id(self, index: int) -> int:
        return index

    def source(self, index: int) -> str:
        return f"shapes {self._split} {index} (seed {self._seed})"

    def _random(self, index: int) -> np.random.Generator:
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} images, but the index is {index}")
        return np.random.default_rng([self._seed, _SPLITS[self._split], index])

    def _target(self, scene: _Scene) -> Target:
        masks = scene.masks()
        boxes = [tight_box(mask) for mask in masks]
        first = int("semantic" in self.fields)  # after background
        labels = torch.tensor([first + shape.label for shape in scene.shapes], dtype=torch.int64)
        semantic = None
        if first:
            # The background's owner is -1, the last entry.
            semantic = torch.cat((labels, torch.zeros(1, dtype=torch.int64))).to(torch.uint8)[scene.owner]
        return Target(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels,
            area=torch.from_numpy(masks.sum(axis=(1, 2)).astype(np.float32)),
            masks=torch.from_numpy(masks) if "masks" in self.fields else None,
            image_labels=labels.unique(),
            semantic=semantic,
        )


@dataclass(frozen=True)
class _Shape:
    """An object: its mask on the patch `rows`, `columns` of the image."""

    label: int
    rows: slice
    columns: slice
    mask: np.ndarray


class _Scene:
    """The visible object of each pixel: `owner` is (side, side) int16, -1 for background, else an index of `shapes`."""

    def __init__(self, side: int, max_objects: int, random: np.random.Generator) -> None:
        self.side = side
        self.owner = np.full((side, side), -1, dtype=np.int16)
        self.shapes: list[_Shape] = []
        self._whole: list[int] = []
        count = 0 if random.random() < _EMPTY_SHARE else int(random.integers(1, max_objects + 1))
        for _ in range(count):
            self._place(random)

    def masks(self) -> np.ndarray:
        """(N, side, side) bool: the visible pixels of each object."""
        return self.owner == np.arange(len(self.shapes), dtype=np.int16)[:, None, None]

    def _place(self, random: np.random.Generator) -> None:
        """Add an object where enough of it and of all others can be seen; none where no such place is found."""
        label = int(random.integers(len(_OUTLINES)))
        # Even on a logarithmic scale: small objects are as common as large ones.
        extent = self.side * math.exp(random.uniform(math.log(_SMALLEST), math.log(_LARGEST)))
        patch = _silhouette(list(_OUTLINES.values())[label](), extent, random.uniform(0, 2 * math.pi))
        for _ in range(_PLACES_TRIED):
            top, left = random.uniform(-0.15 * extent, self.side - 0.85 * extent, 2).astype(int)
            first_row, first_column = max(0, -top), max(0, -left)
            mask = patch[first_row : self.side - top, first_column : self.side - left]
            rows = slice(top + first_row, top + first_row + mask.shape[0])
            columns = slice(left + first_column, left + first_column + mask.shape[1])
            if mask.sum() >= _LEAST_VISIBLE * patch.sum() and self._leaves_enough(mask, rows, columns):
                self.owner[rows, columns][mask] = len(self.shapes)
                self.shapes.append(_Shape(label, rows, columns, mask))
                self._whole.append(int(patch.sum()))
                return

    def _leaves_enough(self, mask: np.ndarray, rows: slice, columns: slice) -> bool:
        """Return whether the objects below would remain sufficiently visible."""
        hidden = np.bincount(self.owner[rows, columns][mask] + 1, minlength=len(self.shapes) + 1)[1:]
        if not hidden.any():
            return True
        visible = np.bincount(self.owner.ravel() + 1, minlength=len(self.shapes) + 1)[1:]
        return bool((visible - hidden >= _LEAST_VISIBLE * np.array(self._whole)).all())


def _polygon(radii: list[float]) -> np.ndarray:
    """(K, 2) corners at equally spaced angles around the origin, at the given radii."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


_OUTLINES: dict[str, Callable[[], np.ndarray]] = {
    "circle": lambda: _polygon([1.0] * 48),
    "square": lambda: _polygon([1.0] * 4),
    "triangle": lambda: _polygon([1.0] * 3),
    "star": lambda: _polygon([1.0, 0.42] * 5),
}


def _silhouette(corners: np.ndarray, extent: float, angle: float) -> np.ndarray:
    """(h, w) bool: the outline rotated by `angle`, its longer side scaled to `extent` pixels, tightly cropped."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = corners @ turn.T
    corners = (corners - corners.min(axis=0)) * (extent / np.ptp(corners, axis=0).max())
    pixels = np.round(corners).astype(np.int32)
    canvas = np.zeros((pixels[:, 1].max() + 1, pixels[:, 0].max() + 1), dtype=np.uint8)
    cv2.fillPoly(canvas, [pixels], 1)
    return canvas.astype(bool)


def _paint(scene: _Scene, random: np.random.Generator) -> np.ndarray:
    """Render a scene to (side, side, 3) uint8."""
    side = scene.side
    ground = random.uniform(20, 235, 3)
    image = _texture(side, side, ground, random.uniform(-45, 45, 3), random)
    for index, shape in enumerate(scene.shapes):
        below = image[shape.rows, shape.columns][shape.mask]
        height, width = shape.mask.shape
        texture = _texture(height, width, _contrasting(below, random), random.uniform(-28, 28, 3), random)
        visible = scene.owner[shape.rows, shape.columns] == index
        image[shape.rows, shape.columns][visible] = texture[visible]
    if random.random() < 0.5:
        image = cv2.GaussianBlur(image, (3, 3), random.uniform(0.3, 0.9))
    noise = random.integers(-8, 9, image.shape, dtype=np.int8) * np.float32(random.uniform(0, 1))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _contrasting(below: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Choose an RGB colour that contrasts with `below`, (K, 3) pixels."""
    sample = below[:: max(1, len(below) // 96)]
    candidates = random.uniform(0, 255, (24, 3))
    distances = np.linalg.norm(candidates[:, None] - sample, axis=2).min(axis=1)
    far = np.flatnonzero(distances >= _LEAST_CONTRAST)
    return candidates[far[0] if len(far) else distances.argmax()]


def _texture(height: int, width: int, colour: np.ndarray, swing: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(height, width, 3) float32: `colour` plus a pattern between -swing and swing."""
    patterns = (_flat, _gradient, _clouds, _stripes, _checkers, _speckle)
    pattern = patterns[int(random.integers(len(patterns)))](height, width, random)
    return colour.astype(np.float32) + pattern[..., None] * swing.astype(np.float32)


# The patterns are (height, width) float32 in -1..1.


def _flat(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    return np.zeros((height, width), dtype=np.float32)


def _slope(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Distance in pixels along a random direction."""
    angle = random.uniform(0, 2 * math.pi)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)
    return rows * np.float32(math.sin(angle)) + columns * np.float32(math.cos(angle))


def _gradient(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    slope = _slope(height, width, random)
    return (slope - slope.min()) * (2 / max(float(np.ptp(slope)), 1.0)) - 1


def _clouds(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    cells = int(random.integers(3, 9))
    coarse = random.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), -1, 1)


def _stripes(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    return np.sin(_slope(height, width, random) * np.float32(2 * math.pi / random.uniform(5, 24)))


def _checkers(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    cell = int(random.integers(4, 20))
    odd = (np.arange(height)[:, None] // cell + np.arange(width) // cell) % 2
    return (odd * 2 - 1).astype(np.float32)


def _speckle(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    return random.random((height, width), dtype=np.float32) * 2 - 1
