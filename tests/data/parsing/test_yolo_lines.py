"""Points, ambiguous columns, hostile label files and data.yaml's own types in YOLO data."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data.formats.yolo import Yolo
from detkit.data.points import point_rule
from detkit.errors import DataError

NAMES = "names: [cat, dog]\n"
BOX = [13.0, 15.0, 39.0, 36.0]
PLACES = np.array([[20.0, 20], [32, 20], [26, 26], [22, 32], [30, 32]])


def write(root: Path, lines: list[str] | bytes, yaml: str = NAMES, name: str = "a", text: bool = True) -> str:
    """A YOLO folder with an image of 80 x 60 and its label file."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60)).save(root / "images" / f"{name}.png")
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    (root / "labels" / f"{name}.txt").write_bytes(content)
    (root / "data.yaml").write_text(f"train: images\n{yaml}")
    return str(root)


def pose(numbers: int, visibility: Any = 2, places: np.ndarray = PLACES, box: list[float] = BOX) -> str:
    """A line of a box and points."""
    x, y, width, height = (
        (box[0] + box[2]) / 160,
        (box[1] + box[3]) / 120,
        (box[2] - box[0]) / 80,
        (box[3] - box[1]) / 60,
    )
    points = places / [80, 60]
    if numbers == 3:
        points = np.column_stack([points, np.broadcast_to(visibility, len(points))])
    return " ".join(["0", *(f"{value:.8g}" for value in (x, y, width, height, *points.ravel()))])


def problems(data: Yolo) -> list[str]:
    return [problem.kind for problem in data.problems.found if not problem.harmless]


@pytest.mark.parametrize(("shape", "numbers"), [("[5, 2]", 2), ("[5, 3]", 3)])
def test_points_are_read_where_the_data_declare_them(tmp_path: Path, shape: str, numbers: int) -> None:
    root = write(tmp_path, [pose(numbers)], f"{NAMES}kpt_shape: {shape}\nflip_idx: [1, 0, 2, 4, 3]\n")
    plain = Yolo(root, "train").target(0)
    assert plain.points is None
    np.testing.assert_allclose(plain.boxes, [BOX], atol=1e-4)
    data = Yolo(root, "train", points=True)
    target = data.target(0)
    np.testing.assert_allclose(target.boxes, [BOX], atol=1e-4)
    np.testing.assert_allclose(target.points[0], PLACES, atol=1e-4)  # type: ignore[index]
    assert target.visible.tolist() == [[True] * 5]  # type: ignore[union-attr]
    np.testing.assert_allclose(target.area, [26 * 21], rtol=1e-5)
    assert data.flip_pairs == ((0, 1), (3, 4))
    assert point_rule(data).flip_pairs == ((0, 1), (3, 4))  # type: ignore[union-attr]


def test_points_that_are_not_annotated(tmp_path: Path) -> None:
    yaml = f"{NAMES}kpt_shape: [5, 3]\n"
    data = Yolo(write(tmp_path, [pose(3, [0, 1, 2, 0, 2])], yaml), "train", points=True)
    assert data.target(0).visible.tolist() == [[False, True, True, False, True]]  # type: ignore[union-attr]
    assert data.flip_pairs is None
    places = PLACES.copy()
    places[1], places[3] = 0, -80
    data = Yolo(write(tmp_path, [pose(2, places=places)], f"{NAMES}kpt_shape: [5, 2]\n"), "train", points=True)
    assert data.target(0).visible.tolist() == [[True, False, True, False, True]]  # type: ignore[union-attr]
    # A box alone is an object without points, as in COCO.
    both = [pose(3), "1 0.5 0.5 0.25 0.5"]
    data = Yolo(write(tmp_path, both, yaml), "train", points=True)
    assert data.target(0).visible.tolist() == [[True] * 5, [False] * 5]  # type: ignore[union-attr]
    assert data.target(0).boxes[1].tolist() == [30, 15, 50, 45]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (pose(2), "malformed line", r"15 columns, but with kpt_shape \[5, 3\] a line has 20"),
        (pose(3, [0, 1, 2, 0.5, 1]), "malformed line", "visibility 0.5 of a point is not 0, 1 or 2"),
        (pose(3, [0, 1, 2, 3, 1]), "malformed line", "visibility 3 "),
        (pose(3, [0, 1, 2, -1, 1]), "malformed line", "visibility -1 "),
        (pose(3, float("nan")), "malformed line", "visibility nan "),
        (pose(3, places=PLACES * 80), "not a fraction", "far above 1"),
        (pose(3, places=PLACES + np.nan), "not a number", "nan is not a finite number"),
        (
            pose(3, places=PLACES + np.array([65, 0])),
            "point outside the image",
            "5 of its points are outside the image",
        ),
    ],
)
def test_broken_points(tmp_path: Path, line: str, kind: str, message: str) -> None:
    root = write(tmp_path, [line], f"{NAMES}kpt_shape: [5, 3]\n")
    with pytest.raises(DataError, match=rf"1 x {kind}.*labels/a\.txt:1: .*{message}"):
        Yolo(root, "train", points=True)
    assert problems(Yolo(root, "train", "skip", points=True)) == [kind]


@pytest.mark.parametrize("numbers", [2, 3])
@pytest.mark.parametrize("masks", [False, True])
def test_points_that_could_be_polygons_are_refused(tmp_path: Path, numbers: int, masks: bool) -> None:
    places = PLACES[:4]
    lines = [pose(numbers, [2, 0, 1, 2][: len(places)], places)] * 2 + [pose(numbers, 2, places * 0.99)]
    root = write(tmp_path, lines)
    decides = rf"first of them .*a\.txt:1, can be polygons of .* add 'kpt_shape: \[4, {numbers}\]' to '.*data\.yaml'"
    for broken in ("fail", "skip", "repair"):
        with pytest.raises(DataError, match=decides):
            Yolo(root, "train", broken, masks=masks)
    # The same lines once the file decides.
    root = write(tmp_path, lines[:1], f"{NAMES}kpt_shape: [4, {numbers}]\n")
    np.testing.assert_allclose(Yolo(root, "train").target(0).boxes, [BOX], atol=1e-4)
    root = write(tmp_path, lines[:1], f"{NAMES}kpt_shape: null\n")
    if numbers == 2:
        np.testing.assert_allclose(Yolo(root, "train").target(0).boxes, [[20, 20, 32, 32]], atol=6.1)


def test_the_public_case_of_points_read_as_a_polygon(tmp_path: Path) -> None:
    places = np.array([[18.8, 19.4], [30.9, 20], [25, 25], [20, 31], [30, 30.5]])
    with pytest.raises(DataError, match=r"polygons of 7 corners, or boxes with 5 points.*'kpt_shape: \[5, 2\]'"):
        Yolo(write(tmp_path, [pose(2, places=places)]), "train")


def test_an_odd_number_of_points_with_visibility_names_kpt_shape(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 20 columns, but a box has 5 .*points need kpt_shape in data\.yaml"):
        Yolo(write(tmp_path, [pose(3)]), "train")


def polygon(corners: int, seed: int) -> str:
    """A star-shaped polygon somewhere."""
    generator = random.Random(seed)
    x, y = generator.uniform(0.3, 0.6), generator.uniform(0.3, 0.6)
    angles = np.sort(np.array([generator.uniform(0, 2 * np.pi) for _ in range(corners)]))
    radii = np.array([generator.uniform(0.1, 0.25) for _ in range(corners)])
    table = np.column_stack([x + radii * np.cos(angles), y + radii * np.sin(angles)])
    return " ".join(["1", *(f"{value:.4f}" for value in table.ravel())])


def test_polygons_are_no_points(tmp_path: Path) -> None:
    # Oriented boxes are four corners each, a dense polygon is one even where it is the only one, and polygons of
    # different numbers of corners never are points.
    turned = "0 0.4 0.3 0.5 0.4 0.45 0.45 0.35 0.35"
    data = Yolo(write(tmp_path, [turned, "0 0.5 0.5 0.25 0.5"]), "train")
    np.testing.assert_allclose(data.target(0).boxes, [[28, 18, 40, 27], [30, 15, 50, 45]], atol=1e-4)
    for seed in range(30):
        assert len(Yolo(write(tmp_path, [polygon(24, seed)]), "train", masks=True).target(0)) == 1
        assert len(Yolo(write(tmp_path, [polygon(5, seed), polygon(6, seed)]), "train").target(0)) == 2


def test_many_polygons_of_one_number_of_corners_are_polygons(tmp_path: Path) -> None:
    lines = [polygon(5, seed) for seed in range(30)]
    assert len(Yolo(write(tmp_path, lines), "train").target(0)) == 30


@pytest.mark.parametrize(
    "shape",
    ["5", "[5]", "[5, 4]", "[5, 1]", "[0, 2]", "[-1, 3]", "[5, 2, 1]", "[5.0, 2]", "[a, 2]", "'[5, 2]'", "", "{5: 2}",
     "[1000000, 3]", "[[5, 2]]"],
)  # fmt: skip
def test_malformed_kpt_shape(tmp_path: Path, shape: str) -> None:
    with pytest.raises(DataError, match=r"The key 'kpt_shape' in '.*data\.yaml' must be \[number of points, 2\]"):
        Yolo(write(tmp_path, [pose(2)], f"{NAMES}kpt_shape: {shape}\n"), "train")


@pytest.mark.parametrize("order", ["[1, 0]", "[1, 2, 0, 3, 4]", "[5, 1, 2, 3, 0]", "[-1, 1, 2, 3, 4]", "1", "[a]"])
def test_malformed_flip_idx(tmp_path: Path, order: str) -> None:
    with pytest.raises(DataError, match=r"The key 'flip_idx' in .* must list for each of 5 points"):
        Yolo(write(tmp_path, [pose(2)], f"{NAMES}kpt_shape: [5, 2]\nflip_idx: {order}\n"), "train")


def test_a_head_that_needs_what_the_lines_lack(tmp_path: Path) -> None:
    root = write(tmp_path, [pose(2), "0 0.5 0.5 0.2 0.2"], f"{NAMES}kpt_shape: [5, 2]\n")
    with pytest.raises(DataError, match="2 x no mask"):
        Yolo(root, "train", masks=True)
    with pytest.raises(DataError, match=r"needs points, but '.*data\.yaml' declares none\. Add kpt_shape"):
        Yolo(write(tmp_path, ["0 0.5 0.5 0.2 0.2"]), "train", points=True)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("1 0.5 0.5 1e400 0.2", "not a number", "inf is not a finite number"),
        ("1 -inf 0.5 0.2 0.2", "not a number", "-inf is not a finite number"),
        ("1 0.1 0.1 nan 0.2 0.3 0.3", "not a number", "nan is not a finite number"),
        ("1 0x1 0.5 0.2 0.2", "malformed line", "'0x1' is not a number"),
        ("1 0_1 0.5 0.2 0.2", "malformed line", "'0_1' is not a number"),
        ("1 0.\u0665 0.5 0.2 0.2", "malformed line", "is not a number"),
        ("\uff11 0.5 0.5 0.2 0.2", "malformed line", "is not a number"),
        ("1,0.5,0.5,0.2,0.2", "malformed line", "numbers separated by spaces"),
        ("1 0,5 0,5 0,2 0,2", "malformed line", "'0,5' is not a number"),
        ("# a comment", "malformed line", "'#' is not a number"),
        ("1 0.5 0.5\0 0.2 0.2", "malformed line", r"'0\.5\\x00' is not a number"),
        (f"1 {30 * '9'}a 0.5 0.2 {10**6 * 'x'}", "malformed line", r"'9{30}a' is not a number"),
        (f"1 {10**6 * 'x'} 0.5 0.2 0.2", "malformed line", r"'x{50,60}\.\.\. is not a number"),
        ("1.5 0.5 0.5 0.2 0.2", "class out of range", "the class 1.5 is not in"),
        (f"{10**30} 0.5 0.5 0.2 0.2", "class out of range", r"the class 1e\+30"),
        ("1e400 0.5 0.5 0.2 0.2", "class out of range", "the class inf"),
        ("1 1e300 0.5 0.2 0.2", "not a fraction", r"1e\+300 is far above 1"),
        ("1 0.5 0.5 0.2 0.2 0.93", "malformed line", "has 6 columns, but a box has 5 .*confidences are not"),
        (f"1 {'0.5 ' * 200_001}", "malformed line", "has 200002 columns"),
    ],
)
def test_hostile_lines_are_named_in_few_words(tmp_path: Path, line: str, kind: str, message: str) -> None:
    root = write(tmp_path, ["0 0.5 0.5 0.25 0.5", line])
    with pytest.raises(DataError, match=rf"1 x {kind}.*labels/a\.txt:2: .*{message}") as error:
        Yolo(root, "train")
    assert len(str(error.value)) < 1000
    data = Yolo(root, "train", broken="repair")
    assert (problems(data), len(data.target(0))) == ([kind], 1)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf1 0.5 0.5 0.25 0.5",
        b"1 0.5 0.5 0.25 0.5\r\n\r\n",
        b"\n\n1\t0.5\t0.5\t0.25\t0.5   ",
        b"1\r1 0.5 0.5 0.25 0.5"[2:],
        b"1.0 5e-1 .5 0.25 +0.5",
        b"01 0.5 0.50000 0.25 0.5\n \t \n",
    ],
)
def test_lines_that_are_right_however_they_are_written(tmp_path: Path, content: bytes) -> None:
    target = Yolo(write(tmp_path, content), "train").target(0)
    assert (target.boxes.tolist(), target.labels.tolist()) == ([[30, 15, 50, 45]], [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 0.5 0.5 0.25 0.5".encode("utf-16"), "is not UTF-8 text"),
        (b"1 0.5 0.5 0.25 0.5 \xe9", "is not UTF-8 text"),
        (b"1 " + 21_000_000 * b"0", "has more than 20,000,000 bytes"),
    ],
)
def test_label_files_that_cannot_be_read_leave_their_image_out(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, ["1 0.5 0.5 0.25 0.5"])
    root = write(tmp_path, content, name="b")
    with pytest.raises(DataError, match=rf"1 x unreadable label file.*labels/b\.txt' {message}"):
        Yolo(root, "train")
    data = Yolo(root, "train", broken="skip")
    assert (len(data), problems(data)) == (1, ["unreadable label file"])


@pytest.mark.parametrize(
    ("yaml", "names", "ids"),
    [
        ("names: [yes, no]", ("yes", "no"), (0, 1)),
        ("names: [null, ~, true, On]", ("null", "~", "true", "On"), (0, 1, 2, 3)),
        ("names: [1, 2.50, 0x10, 1e3, 012, 2020-01-01]", ("1", "2.50", "0x10", "1e3", "012", "2020-01-01"), range(6)),
        ("names: {0: no, 2: yes}", ("no", "yes"), (0, 2)),
        ("names: {'2': a, '0': b}", ("b", "a"), (0, 2)),
        ("names:\n  0: 7\n  1: 8\nnc: 2", ("7", "8"), (0, 1)),
        ("names: [a, b]\nnc:", ("a", "b"), (0, 1)),
        ("names: [a, b]\nnc: '2'\ndownload: |\n  import os\n  os.abort()", ("a", "b"), (0, 1)),
    ],
)
def test_names_are_text_as_written(tmp_path: Path, yaml: str, names: Any, ids: Any) -> None:
    data = Yolo(write(tmp_path, ["0 0.5 0.5 0.25 0.5"], yaml), "train")
    assert (data.classes.names, data.classes.raw_ids) == (names, tuple(ids))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: {0: a, 0: b}", "the key '0' is given twice"),
        ("names: {0: a, 00: b}", "a unique name and id"),
        ("names: {0: a, 1: a}", "class name 'a' is listed twice"),
        ("names: [a, b]\nnames: [c]", "the key 'names' is given twice"),
        ("names: {-1: a}", "The key 'names'"),
        ("names: {0x1: a}", "The key 'names'"),
        ("names: {1.0: a}", "The key 'names'"),
        ("names: {\u0663: a}", "The key 'names'"),
        ("names: {99999999999999999999: a}", "The key 'names'"),
        ("names: [a, '']", "none of them empty"),
        ("names: [a, [b]]", "The key 'names'"),
        ("names: [{a: b}]", "The key 'names'"),
        ("names: cat, dog", "The key 'names' .* but is 'cat, dog'"),
        ("names: []", "The key 'names'"),
        ("names: !!set {a, b}", "The key 'names'"),
        ("names: [a, b]\nnc: 3", "nc is 3, but names has 2 classes"),
        ("names: [a, b]\nnc: [2]", r"nc is \['2'\], but"),
        ("names: [a, b]\nnc: two", "nc is 'two', but names has 2"),
        ("names: !!python/object/apply:os.system ['touch hacked']", "is not valid YAML"),
        ("names: [a]\npath: [~, y]", "The key 'path' in .* must be a folder"),
    ],
)
def test_names_that_cannot_be_used(tmp_path: Path, yaml: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path, ["0 0.5 0.5 0.25 0.5"], yaml)
    with pytest.raises(DataError, match=message):
        Yolo(root, "train")
    assert not (tmp_path / "hacked").exists()
