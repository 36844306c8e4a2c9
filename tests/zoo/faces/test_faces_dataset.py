"""Drawn faces: their points, their persons, their options."""

from typing import Any

import numpy as np
import pytest
import torch

from detkit.errors import DataError
from detkit.zoo.faces.dataset import Faces


def test_points_of_drawn_faces_lie_on_eyes_and_mouth() -> None:
    """Where the images are bright (the white of an eye) around both eyes, and as in the ground truth without pixels."""
    faces = Faces("val", val_count=20, size=192, points=True)
    for index in range(20):
        image, target = faces[index].image, faces.target(index)
        assert torch.equal(faces[index].target.points, target.points)  # type: ignore[arg-type]
        left, right, nose, *_ = target.points[0].tolist()  # type: ignore[index]
        if target.visible.all():  # type: ignore[union-attr]
            for x, y in (left, right):
                eye = image[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9].astype(int)
                assert eye.max() - eye.min() > 60
        assert left[0] < nose[0] < right[0] or abs(right[0] - left[0]) < 5


def test_faces_of_persons_are_others_in_each_split_and_look_the_same_in_one() -> None:
    train, val = (Faces(split, train_count=30, val_count=30, persons=4) for split in ("train", "val"))
    assert train.classes.names == ("person 0", "person 1", "person 2", "person 3")
    assert val.classes.names == ("person 4", "person 5", "person 6", "person 7")
    assert {int(train.target(index).image_labels) for index in range(30)} == {0, 1, 2, 3}  # type: ignore[arg-type]
    people: dict[int, Any] = {}
    for index in range(30):
        (face, label), = train._faces(index)[0]  # fmt: skip
        known = people.setdefault(label, face.person)
        assert np.array_equal(known.skin, face.person.skin)
        assert known.width == face.person.width
    assert len({person.width for person in people.values()}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 8}, "data.size"), ({"persons": 1}, "data.persons"), ({"persons": 3, "max_faces": 2}, "max_faces to 1")],
)
def test_options_of_faces_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Faces("train", **options)  # type: ignore[arg-type]
