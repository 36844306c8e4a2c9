"""Synthetic faces with five points, drawn on the fly, to try landmarks, MTCNN and embeddings without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from detkit.data.dataset import Dataset, Problems
from detkit.errors import DataError, nearest
from detkit.registry import datasets
from detkit.structures import ClassList, Meta, Sample, Target

_SPLITS = {"train": 0, "val": 1, "test": 2}
_DETAIL = 3  # supersampling factor of the drawing
_PLACES_TRIED = 20
_EMPTY_SHARE = 0.05
POINT_NAMES = ("left_eye", "right_eye", "nose", "left_mouth_corner", "right_mouth_corner")


@datasets.register("faces")
class Faces(Dataset):
    """Synthetic faces, rotated by up to 30 degrees, on cloudy backgrounds with distractor shapes.

    An image depends on (seed, split, index) alone. Boxes enclose the head without hair; the points are the eyes, the
    tip of the nose and the corners of the mouth, left and right from the viewer's perspective. meta.image_id is the
    index.

    Args:
        split: train, val or test.
        train_count: number of training images.
        val_count: number of images in each of val and test.
        size: height and width in pixels, at least 32.
        max_faces: 1 for portraits, whose face has 0.45 to 0.8 of the image's height; otherwise the maximum number of
            faces of 0.12 to 0.4 of the height, with none in some images.
        persons: number of persons per split, each a class, for embeddings; splits share no persons. null for a new face
            in every image and a single class, "face".
        seed: random seed of the images.
        points: whether targets have points.

    Raises:
        DataError: the split does not exist, a number is too small, or persons are combined with max_faces above 1.
    """

    def __init__(
        self,
        split: str,
        train_count: int = 1000,
        val_count: int = 200,
        size: int = 96,
        max_faces: int = 1,
        persons: int | None = None,
        seed: int = 0,
        points: bool = False,
    ) -> None:
        if split not in _SPLITS:
            raise DataError(
                f"The faces have no split '{split}'. {nearest(split, _SPLITS)} Set data.train and data.val."
            )
        for name, value, least in (
            ("train_count", train_count, 1),
            ("val_count", val_count, 1),
            ("size", size, 32),
            ("max_faces", max_faces, 1),
            ("persons", 2 if persons is None else persons, 2),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"data.{name} of the faces is {value}. Set it to {least} or more.")
        if persons is not None and max_faces > 1:
            raise DataError("data.persons of the faces needs images of one person each. Set data.max_faces to 1.")
        first = _SPLITS[split] * (persons or 0)
        names = ["face"] if persons is None else [f"person {number}" for number in range(first, first + persons)]
        self.classes = ClassList.from_names(names, first)
        self.fields = frozenset({"boxes", "labels", "image_labels"}) | ({"points"} if points else set())
        self.flip_pairs = ((0, 1), (3, 4))
        self.problems = Problems(f"The faces (split '{split}')", "fail")
        self._split, self._seed = split, seed
        self._count = train_count if split == "train" else val_count
        self._side, self._max_faces, self._persons = size, max_faces, persons

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        faces, random = self._faces(index)
        meta = Meta(index, self.source(index), self.size(index))
        return Sample(_paint(self._side, [face for face, _ in faces], random), self._target(faces), meta)

    def target(self, index: int) -> Target:
        return self._target(self._faces(index)[0])

    def size(self, index: int) -> tuple[int, int]:
        return self._side, self._side

    def image_id(self, index: int) -> int:
        return index

    def source(self, index: int) -> str:
        return f"faces {self._split} {index} (seed {self._seed})"

    def _faces(self, index: int) -> tuple[list[tuple[_Face, int]], np.random.Generator]:
        """The faces of an image with their labels, and what is left of its randomness."""
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} images, but the index is {index}")
        random = np.random.default_rng([self._seed, _SPLITS[self._split], index])
        if self._max_faces == 1:
            label = 0 if self._persons is None else int(random.integers(self._persons))
            who = (
                random if self._persons is None else np.random.default_rng([self._seed, 3, self.classes.raw_ids[label]])
            )
            return [(_Face.place(_Person.draw(who), self._side, (0.45, 0.8), random), label)], random
        count = 0 if random.random() < _EMPTY_SHARE else int(random.integers(1, self._max_faces + 1))
        faces: list[_Face] = []
        for _ in range(count):
            for _ in range(_PLACES_TRIED):
                face = _Face.place(_Person.draw(random), self._side, (0.12, 0.4), random)
                if not any(face.is_near(other) for other in faces):
                    faces.append(face)
                    break
        return [(face, 0) for face in faces], random

    def _target(self, faces: Iterable[tuple[_Face, int]]) -> Target:
        boxes = [face.box(self._side) for face, _ in faces]
        labels = torch.tensor([label for _, label in faces], dtype=torch.int64)
        points = np.array([face.points() for face, _ in faces], dtype=np.float32).reshape(-1, len(POINT_NAMES), 2)
        return Target(
            torch.tensor(np.array(boxes, dtype=np.float32)).reshape(-1, 4),
            labels,
            points=torch.from_numpy(points) if "points" in self.fields else None,
            visible=torch.from_numpy(_inside(points, self._side)) if "points" in self.fields else None,
            image_labels=labels.unique(),
        )


@dataclass(frozen=True)
class _Person:
    """The constant features of a person: colours (RGB), and lengths in units of half the height of the head."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    width: float
    eyes_apart: float
    eye_height: float
    eye_size: float
    nose: float
    mouth: float
    mouth_width: float
    fringe: float
    brows: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> _Person:
        tone = random.uniform(0.3, 1.0)
        return cls(
            skin=np.array([255, 214, 182]) * tone * random.uniform(0.88, 1.0, 3),
            hair=random.uniform(10, 200) * random.uniform([0.8, 0.5, 0.2], [1.2, 1.0, 0.9]),
            iris=random.uniform([20, 40, 40], [130, 160, 200]),
            lips=np.array([190, 80, 80]) * (0.5 + tone / 2) * random.uniform(0.8, 1.15, 3),
            width=random.uniform(0.66, 0.9),
            eyes_apart=random.uniform(0.24, 0.4),
            eye_height=random.uniform(-0.25, -0.05),
            eye_size=random.uniform(0.09, 0.15),
            nose=random.uniform(0.18, 0.34),
            mouth=random.uniform(0.48, 0.62),
            mouth_width=random.uniform(0.18, 0.36),
            fringe=random.uniform(-0.85, -0.45),
            brows=random.uniform(0.02, 0.07),
        )


@dataclass(frozen=True)
class _Face:
    """A person in an image: `centre` and `height` in pixels, `angle` in radians, and how the mouth is bent."""

    person: _Person
    centre: np.ndarray
    height: float
    angle: float
    smile: float

    @classmethod
    def place(cls, person: _Person, side: int, extent: tuple[float, float], random: np.random.Generator) -> _Face:
        height = side * math.exp(random.uniform(math.log(extent[0]), math.log(extent[1])))
        room = 0.45 * height
        centre = random.uniform(room, side - room, 2)
        return cls(person, centre, height, math.radians(random.uniform(-30, 30)), random.uniform(-0.06, 0.12))

    def to_pixels(self, places: np.ndarray) -> np.ndarray:
        """(K, 2) pixels of places in the face's own units, from its centre."""
        turn = np.array([[math.cos(self.angle), -math.sin(self.angle)], [math.sin(self.angle), math.cos(self.angle)]])
        return self.centre + np.asarray(places) @ turn.T * (self.height / 2)

    def points(self) -> np.ndarray:
        """(5, 2) pixels, in the order of POINT_NAMES."""
        person = self.person
        eyes = [[-person.eyes_apart, person.eye_height], [person.eyes_apart, person.eye_height]]
        corners = [[-person.mouth_width, person.mouth], [person.mouth_width, person.mouth]]
        return self.to_pixels(np.array([*eyes, [0.0, person.nose], *corners]))

    def box(self, side: int) -> np.ndarray:
        """(4,) xyxy pixels around the head, inside an image of `side`."""
        outline = self.to_pixels(_ellipse((0, 0), self.person.width, 1.0))
        return np.concatenate([outline.min(0), outline.max(0)]).clip(0, side)

    def is_near(self, other: _Face) -> bool:
        return bool(np.linalg.norm(self.centre - other.centre) < 0.65 * (self.height + other.height))


def _inside(points: np.ndarray, side: int) -> np.ndarray:
    inside = np.logical_and(points >= 0, points <= side)
    return np.logical_and(inside[..., 0], inside[..., 1])


def _ellipse(
    centre: tuple[float, float], width: float, height: float, part: tuple[float, float] = (0, 1)
) -> np.ndarray:
    """(48, 2) places on an ellipse of these half axes, or on a part of it, in turns from the right and downwards."""
    angles = np.linspace(part[0], part[1], 48) * 2 * math.pi
    return np.array(centre) + np.stack([np.cos(angles) * width, np.sin(angles) * height], axis=1)


def _paint(side: int, faces: list[_Face], random: np.random.Generator) -> np.ndarray:
    """(side, side, 3) uint8."""
    large = side * _DETAIL
    clouds = random.uniform(20, 235, 3) + random.uniform(-60, 60, (4, 4, 3))
    image = cv2.resize(clouds.clip(0, 255).astype(np.uint8), (large, large), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(random.integers(0, 5))):
        corners = random.uniform(0, large, 2) + random.uniform(-0.25, 0.25, (int(random.integers(3, 7)), 2)) * large
        cv2.fillPoly(image, [corners.round().astype(np.int32)], random.uniform(0, 255, 3).tolist())
    for face in faces:
        _paint_face(image, face)
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    light = cv2.resize(random.uniform(0.75, 1.15, (2, 2)).astype(np.float32), (side, side))
    noise = random.integers(-8, 9, image.shape)
    return np.clip(image * light[..., None] + noise, 0, 255).astype(np.uint8)


def _paint_face(image: np.ndarray, face: _Face) -> None:
    person = face.person
    unit = face.height / 2 * _DETAIL

    def fill(places: np.ndarray, color: np.ndarray) -> None:
        cv2.fillPoly(image, [_pixels(face, places)], color.clip(0, 255).tolist(), cv2.LINE_AA)

    def line(places: np.ndarray, color: np.ndarray, width: float) -> None:
        cv2.polylines(image, [_pixels(face, places)], False, color.clip(0, 255).tolist(), max(1, round(width * unit)))

    fill(_ellipse((0, -0.12), person.width * 1.12, 1.08), person.hair)
    fill(_ellipse((0, 0), person.width, 1.0), person.skin)
    cap = _ellipse((0, 0), person.width, 1.0)
    fill(np.stack([cap[:, 0], np.minimum(cap[:, 1], person.fringe)], axis=1), person.hair)
    for side in (-1, 1):
        eye = (side * person.eyes_apart, person.eye_height)
        fill(_ellipse(eye, person.eye_size * 1.3, person.eye_size * 0.85), np.array([245, 245, 245]))
        fill(_ellipse(eye, person.eye_size * 0.7, person.eye_size * 0.7), person.iris)
        fill(_ellipse(eye, person.eye_size * 0.3, person.eye_size * 0.3), np.array([10, 10, 10]))
        line(_ellipse((eye[0], eye[1] - 0.12), 0.17, 0.07, (0.55, 0.95)), person.hair * 0.8, person.brows)
    line(np.array([[0.02, person.eye_height], [0.07, person.nose - 0.05], [0, person.nose]]), person.skin * 0.75, 0.04)
    fill(_ellipse((0, person.nose), 0.05, 0.03), person.skin * 0.65)
    _mouth(line, face)


def _mouth(line: Callable[[np.ndarray, np.ndarray, float], None], face: _Face) -> None:
    """A parabola between the corners."""
    across = np.linspace(-1, 1, 15)
    bend = face.smile * (1 - across**2)
    line(np.stack([across * face.person.mouth_width, face.person.mouth + bend], axis=1), face.person.lips, 0.07)


def _pixels(face: _Face, places: np.ndarray) -> np.ndarray:
    """For OpenCV, which counts from the centre of the first pixel."""
    return (face.to_pixels(places) * _DETAIL - 0.5).round().astype(np.int32)
