"""Parser of the lines of YOLO label files: a box, a polygon, or a box and points, in fractions of the image."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detkit.data.dataset import Box, number
from detkit.data.parsing.keypoints import inside_image
from detkit.errors import DataError
from detkit.io.files import read_text

LARGEST_FRACTION = 2.0
"""Coordinates above this are not inaccurate fractions, but pixels."""
LARGEST_FILE = 20_000_000
"""Maximum bytes of a label file; the largest of LVIS has a few hundred thousand."""
SAMPLE = 100
"""Number of lines that are examined to distinguish polygons from points."""


class LineError(ValueError):
    """The reason why a line cannot be used, and the kind of problem."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class PointShape:
    """The points of each object, as kpt_shape in data.yaml declares them.

    Args:
        count: number of points.
        numbers: values per point, 2 for x y, 3 for x y visibility.
    """

    count: int
    numbers: int

    def __str__(self) -> str:
        return f"[{self.count}, {self.numbers}]"


@dataclass(frozen=True)
class LabelLine:
    """One object, in pixels.

    Args:
        box: xyxy.
        polygon: x1, y1, x2, y2 ... or None for a box.
        points: (K, 3) float32 x, y and whether the point is annotated; None if no shape is declared.
        points_outside: number of annotated points outside the image, which are treated as not annotated.
    """

    box: Box
    polygon: list[float] | None = None
    points: np.ndarray | None = None
    points_outside: int = 0


def read_label_file(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Read the words of the non-blank lines, with their line numbers.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is longer than LARGEST_FILE.
    """
    # Reading and quoting a larger file would only cost memory.
    if path.stat().st_size > LARGEST_FILE:
        raise DataError(f"The label file '{path}' has more than {LARGEST_FILE:,} bytes. Check its content.")
    lines = read_text(path, "label file").split("\n")
    return [(number, tuple(line.split())) for number, line in enumerate(lines, 1) if line.strip()]


def parse_numbers(words: Sequence[str]) -> tuple[float, ...]:
    """Parse the numbers of a line, including "nan" and "inf".

    Raises:
        LineError: a word is not a number in ASCII digits.
    """
    try:
        return tuple(map(number, words))
    except ValueError as error:
        raise LineError("malformed line", f"{error}; a line is numbers separated by spaces") from None


def looks_like_labels(path: Path) -> bool:
    """Return whether a text file without an image looks like a label file, not a list of classes or a note."""
    try:
        lines = read_label_file(path)
    except DataError:
        return True
    words = lines[0][1] if lines else ()
    return not words or 2 * sum(map(_is_number, words)) > len(words) > 1


def parse_line(values: Sequence[float], shape: PointShape | None, size: tuple[int, int]) -> LabelLine:
    """Parse the object of a line.

    Args:
        values: all numbers of the line, the class first.
        shape: the shape of the points; None if lines are boxes and polygons.
        size: (height, width) of the image in pixels.

    Raises:
        LineError: the number of columns or a coordinate is not valid.
    """
    _check_columns(len(values), shape)
    if shape is None and len(values) > 5:
        polygon = _pixels(values[1:], size)
        xs, ys = polygon[0::2], polygon[1::2]
        return LabelLine((min(xs), min(ys), max(xs), max(ys)), polygon)
    x, y, width, height = _pixels(values[1:5], size)
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if shape is None:
        return LabelLine(box)
    if len(values) == 5:
        return LabelLine(box, points=np.zeros((shape.count, 3), dtype=np.float32))
    points, outside = inside_image(_points(np.reshape(values[5:], (shape.count, shape.numbers)), size), size)
    return LabelLine(box, points=points, points_outside=outside)


@dataclass
class PolygonEvidence:
    """Distinguishes polygons from points if kpt_shape is missing.

    A box with points has as many columns as some polygon. But polygons vary in the number of columns, and are rarely
    valid as a box with points in it.
    """

    columns: set[int] = field(default_factory=set)
    lines: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)

    def add(self, values: tuple[float, ...], where: str) -> None:
        """Add a line that is read as a polygon."""
        self.columns.add(len(values))
        if len(self.lines) < SAMPLE:
            self.lines.append((where, values))

    def check(self, yaml: Path) -> None:
        """Check that the lines are not valid both as polygons and as points.

        Raises:
            DataError: naming the key of `yaml` that decides.
        """
        if len(self.columns) != 1:
            return
        shapes = Counter(shape for _, values in self.lines for shape in _possible_shapes(values))
        shape, count = shapes.most_common(1)[0] if shapes else (None, 0)
        if shape is None or count < 0.9 * len(self.lines):
            return
        columns = min(self.columns)
        raise DataError(
            f"The lines of {columns} columns, the first of them {self.lines[0][0]}, can be polygons of "
            f"{(columns - 1) // 2} corners, or boxes with {shape.count} points. If they are points, add 'kpt_shape: "
            f"{shape}' to '{yaml}'; if they are polygons, add 'kpt_shape: null'."
        )


def _is_number(word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return True


def _check_columns(count: int, shape: PointShape | None) -> None:
    if shape is not None:
        expected = 5 + shape.count * shape.numbers
        if count not in (5, expected):
            raise LineError(
                "malformed line",
                f"the line has {count} columns, but with kpt_shape {shape} a line has {expected} (class x y width "
                f"height, then {'x y' if shape.numbers == 2 else 'x y visibility'} of each point), or 5 without points",
            )
    elif count != 5 and (count < 7 or count % 2 == 0):
        raise LineError(
            "malformed line",
            f"the line has {count} columns, but a box has 5 (class x y width height) and a polygon an odd number of at "
            f"least 7 (class x1 y1 x2 y2 x3 y3 ...); points need kpt_shape in data.yaml, confidences are not supported",
        )


def _pixels(fractions: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Convert fractions x, y, x, y ... to pixels."""
    if not all(math.isfinite(value) for value in fractions):
        worst = next(value for value in fractions if not math.isfinite(value))
        raise LineError("not a number", f"the coordinate {worst} is not a finite number")
    if max(map(abs, fractions)) > LARGEST_FRACTION:
        raise LineError(
            "not a fraction",
            f"the coordinate {max(fractions, key=abs):g} is far above 1; coordinates must be fractions of the width "
            f"and height of the image, here {size[1]} x {size[0]}, not pixels",
        )
    height, width = size
    return [value * (height if index % 2 else width) for index, value in enumerate(fractions)]


def _points(table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Convert a table of K rows to (K, 3) x and y in pixels, and whether the point is annotated."""
    xy = table[:, :2]
    if table.shape[1] == 3:
        visibility = table[:, 2]
        if not np.isin(visibility, (0, 1, 2)).all():
            wrong = visibility[~np.isin(visibility, (0, 1, 2))][0]
            raise LineError("malformed line", f"the visibility {wrong:g} of a point is not 0, 1 or 2")
        annotated = visibility > 0
    else:
        # Without visibility, points that are not annotated are negative or 0 0.
        annotated = np.logical_and((xy >= 0).all(1), (xy > 0).any(1))
    pixels = np.reshape(_pixels(xy.ravel().tolist(), size), (-1, 2))
    return np.column_stack([pixels, annotated])


def _possible_shapes(values: tuple[float, ...]) -> list[PointShape]:
    """Return the shapes of points for which a line is valid as a box in the image with points in it."""
    corners = np.reshape(values[1:], (-1, 2))
    centre, sides = corners[0], corners[1]
    # The box may exceed the image only by a rounding error.
    if not ((sides > 0) & (np.abs(centre - 0.5) + sides / 2 <= 0.51)).all() or _is_polygon(corners):
        return []
    shapes = []
    for numbers in (2, 3):
        if (len(values) - 5) % numbers == 0:
            table = np.reshape(values[5:], (-1, numbers))
            near = (np.abs(table[:, :2] - centre) <= 0.6 * sides).all(1)
            absent = (table[:, :2] <= 0).all(1)
            if (near | absent).all() and np.isin(table[:, 2:], (0, 1, 2)).all():
                shapes.append(PointShape(len(table), numbers))
    return shapes


def _is_polygon(corners: np.ndarray) -> bool:
    """Return whether (N, 2) corners are certainly those of a polygon, not a box and points."""
    if len(corners) == 4:  # an oriented box
        return bool((np.abs(corners[0] - corners[1] + corners[2] - corners[3]) < 0.01).all())
    if (corners[0] == corners[-1]).all() or len(corners) > 300:
        return True
    # A path through a dozen points in random order crosses itself.
    return len(corners) >= 12 and not _crosses_itself(corners)


def _crosses_itself(corners: np.ndarray) -> bool:
    start, along = corners[:, None], np.roll(corners, -1, 0)[:, None] - corners[:, None]
    side = along[..., 0] * (corners - start)[..., 1] - along[..., 1] * (corners - start)[..., 0]
    separates = side * np.roll(side, -1, 1) < 0  # [i, j]: the line through edge i separates the ends of edge j
    return bool((separates & separates.T).any())
