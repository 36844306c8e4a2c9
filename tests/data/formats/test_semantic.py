"""Semantic maps from the masks of objects: COCO, YOLO, shapes; images whose pixels are classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data.dataset import Dataset
from detkit.data.formats.coco import Coco
from detkit.data.formats.semantic_masks import MaskFolders, VocSegmentation
from detkit.data.formats.shapes import Shapes
from detkit.data.formats.yolo import Yolo
from detkit.data.masks import encode
from detkit.data.semantic import names_with_background, painted, with_background
from detkit.data.splits import open_split
from detkit.errors import DataError
from detkit.structures import IGNORED_PIXEL, ClassList

SEMANTIC = frozenset({"semantic"})
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def semantic_of(dataset: Dataset, index: int = 0) -> np.ndarray:
    sample = dataset[index]
    assert sample.target.semantic is not None
    again = dataset.target(index).semantic
    assert again is not None
    assert (again == sample.target.semantic).all()
    return sample.target.semantic.numpy()


@pytest.mark.parametrize("seed", range(20))
def test_smaller_objects_are_painted_over_larger_ones_and_all_over_crowds(seed: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.random((6, 9, 11)) < random.random((6, 1, 1))
    labels = random.integers(1, 5, 6).tolist()
    crowd = (random.random(6) < 0.3).tolist()
    found = painted([encode(mask) for mask in masks], labels, crowd, (9, 11), 0)
    areas = masks.sum((1, 2))
    for row in range(9):
        for column in range(11):
            here = [index for index in range(6) if masks[index, row, column] and not crowd[index]]
            if here:
                smallest = min(areas[index] for index in here)
                assert found[row, column] in {labels[index] for index in here if areas[index] == smallest}
            else:
                in_crowd = any(masks[index, row, column] and crowd[index] for index in range(6))
                assert found[row, column] == (IGNORED_PIXEL if in_crowd else 0)


def test_background_becomes_the_first_class_with_a_raw_id_of_its_own() -> None:
    assert with_background(ClassList(("cat",), (3,))) == ClassList(("background", "cat"), (0, 3))
    assert with_background(ClassList(("cat", "dog"), (0, 1))) == ClassList(("background", "cat", "dog"), (-1, 0, 1))
    own = ClassList(("cat", "background"), (1, 2))
    assert with_background(own) == own
    assert names_with_background(["cat"]) == ("background", "cat")
    assert names_with_background(["cat", "background"]) == ("cat", "background")
    with pytest.raises(DataError, match="at most 255 classes"):
        with_background(ClassList.from_names([str(number) for number in range(255)]))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """An image with a large cat, a small dog in it, and a crowd of cats."""
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (12, 10)).save(tmp_path / "train" / "a.png")

    def square(left: int, top: int, side: int) -> dict[str, Any]:
        right, bottom = left + side, top + side
        polygon = [left, top, right, top, right, bottom, left, bottom]
        return {"bbox": [left, top, side, side], "segmentation": [polygon], "area": side * side}

    crowd = np.zeros((10, 12), dtype=bool)
    crowd[:, 8:] = True
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 5, **square(2, 2, 2)},
        {"id": 2, "image_id": 1, "category_id": 2, **square(0, 0, 6)},
        {"id": 3, "image_id": 1, "category_id": 2, **square(9, 1, 2)},
        {"id": 4, "image_id": 1, "category_id": 2, "bbox": [8, 0, 4, 10], "segmentation": encode(crowd), "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 12, "height": 10}],
        "annotations": annotations,
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


def expected_of_coco() -> np.ndarray:
    expected = np.zeros((10, 12), dtype=np.uint8)
    expected[:, 8:] = IGNORED_PIXEL
    expected[0:6, 0:6] = 1
    expected[2:4, 2:4] = 2
    expected[1:3, 9:11] = 1
    return expected


def test_coco_paints_polygons_and_run_lengths(coco: Path) -> None:
    dataset = Coco(str(coco), "train", semantic=True)
    assert dataset.classes == ClassList(("background", "cat", "dog"), (0, 2, 5))
    assert (semantic_of(dataset) == expected_of_coco()).all()
    # boxes have the same labels
    assert dataset.target(0).labels.tolist() == [2, 1, 1, 1]
    assert dataset.target(0).masks is None


def test_chosen_classes_may_name_the_background(coco: Path) -> None:
    for names in (("dog", "cat"), ("background", "dog", "cat")):
        dataset = Coco(str(coco), "train", class_names=names, semantic=True)
        assert dataset.classes == ClassList(("background", "dog", "cat"), (0, 5, 2))
        assert semantic_of(dataset)[3, 3] == 1


def test_detectors_see_no_background(coco: Path) -> None:
    assert Coco(str(coco), "train").classes.names == ("cat", "dog")
    dataset = open_split({"name": "coco", "root": str(coco)}, "train", SEMANTIC)
    assert dataset.fields >= SEMANTIC
    assert "masks" not in dataset.fields


def test_yolo_paints_polygons(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (12, 10)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("0 0 0 0.5 0 0.5 0.6 0 0.6\n")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    dataset = Yolo(str(tmp_path), "train", semantic=True)
    expected = np.zeros((10, 12), dtype=np.uint8)
    expected[:6, :6] = 1
    assert (semantic_of(dataset) == expected).all()
    assert dataset.classes.names == ("background", "cat")
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match="the line is a box"):
        Yolo(str(tmp_path), "train", semantic=True)


def test_shapes_paint_what_is_seen() -> None:
    plain, dataset = Shapes("train", size=64, masks=True), Shapes("train", size=64, masks=True, semantic=True)
    assert dataset.classes.names == ("background", "circle", "square", "triangle", "star")
    for index in range(20):
        target = dataset.target(index)
        assert target.masks is not None
        expected = np.zeros((64, 64), dtype=np.uint8)
        for mask, label in zip(target.masks.numpy(), target.labels.tolist()):
            expected[mask] = label
        assert (semantic_of(dataset, index) == expected).all()
        assert (plain.target(index).labels + 1 == target.labels).all()


def write_folders(root: Path, masks: dict[str, np.ndarray], split: str = "train", mode: str = "L") -> None:
    for name, values in masks.items():
        picture, mask = root / "images" / split / f"{name}.jpg", root / "masks" / split / f"{name}.png"
        for path in (picture, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", values.shape[::-1]).save(picture)
        image = Image.fromarray(values)
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image.save(mask)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_folders_of_masks(tmp_path: Path, mode: str) -> None:
    masks = {
        "b": np.array([[0, 1, 255], [2, 2, 0]], dtype=np.uint8),
        "sub/a": np.array([[1, 1], [0, 255]], dtype=np.uint8),
    }
    write_folders(tmp_path, masks, mode=mode)
    dataset = MaskFolders(str(tmp_path), "train", ("sky", "sea", "land"))
    assert [dataset.image_id(index) for index in range(2)] == ["b", "sub/a"]
    for index, values in enumerate(masks.values()):
        assert (semantic_of(dataset, index) == values).all()
    assert dataset.fields == SEMANTIC
    with pytest.raises(DataError, match="The head needs boxes"):
        open_split(
            {"name": "masks", "root": str(tmp_path), "class_names": ["a", "b", "c"]}, "train", frozenset({"boxes"})
        )


def test_masks_of_16_bits_and_of_black_and_white_are_read(tmp_path: Path) -> None:
    write_folders(tmp_path, {"a": np.array([[0, 1, 255]], dtype=np.uint16)})
    assert semantic_of(MaskFolders(str(tmp_path), "train", ("x", "y"))).tolist() == [[0, 1, 255]]
    Image.fromarray(np.array([[False, True, True]])).save(tmp_path / "masks" / "train" / "a.png")
    assert semantic_of(MaskFolders(str(tmp_path), "train", ("x", "y"))).tolist() == [[0, 1, 1]]


def test_a_number_that_is_no_class_is_named_with_its_pixel(tmp_path: Path) -> None:
    good, bad = np.zeros((3, 4), dtype=np.uint8), np.zeros((3, 4), dtype=np.uint8)
    bad[1, 2] = 7
    write_folders(tmp_path, {"bad": bad, "good": good})
    dataset = MaskFolders(str(tmp_path), "train", ("x", "y"))
    with pytest.raises(DataError, match=r"bad\.png' has the value 7 in row 1, column 2 .* there are 2 classes: 0: x"):
        dataset.target(0)
    dataset = MaskFolders(str(tmp_path), "train", ("x", "y"), broken="skip")
    assert [dataset.image_id(index) for index in range(len(dataset))] == ["good"]
    assert "1 x broken mask: left out the image" in dataset.problems.summary()


def test_masks_that_are_missing_of_another_size_or_no_numbers_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {name: np.zeros((3, 4), dtype=np.uint8) for name in ("a", "b", "c", "d")})
    folder = tmp_path / "masks" / "train"
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 x missing mask.*a\.png' does not exist"):
        MaskFolders(str(tmp_path), "train", ("x",))
    Image.new("L", (3, 4)).save(folder / "b.png")
    Image.new("RGB", (4, 3)).save(folder / "c.png")
    dataset = MaskFolders(str(tmp_path), "train", ("x",), broken="repair")
    messages = [problem.message for problem in dataset.problems.found]
    assert "the mask is 3 x 4 pixels, but its image 4 x 3 (before its Exif rotation?)" in messages[1]
    assert "is a colour image (mode RGB)" in messages[2]
    assert len(dataset) == 1
    (folder / "d.png").write_bytes((folder / "d.png").read_bytes()[:45])
    with pytest.raises(DataError, match=r"d\.png' cannot be decoded"):
        dataset.target(0)
    for name in ("a", "b", "c"):
        (tmp_path / "images" / "train" / f"{name}.jpg").unlink()
    with pytest.raises(DataError, match=r"1 x broken mask.*d\.png' cannot be decoded: it is truncated"):
        MaskFolders(str(tmp_path), "train", ("x",))


def test_missing_folders_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {"a": np.zeros((3, 4), dtype=np.uint8)})
    with pytest.raises(DataError, match=r"no split 'tran'.*train.*data\.images"):
        MaskFolders(str(tmp_path), "tran", ("x",))
    with pytest.raises(DataError, match=r"data\.annotations"):
        MaskFolders(str(tmp_path), "train", ("x",), annotations="labels/{split}")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    values = np.full((6, 8), 0, dtype=np.uint8)
    values[1:4, 1:5], values[1, 1:5] = 15, 255
    for name in ("2007_1", "2007_2"):
        Image.new("RGB", (8, 6)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    mask = Image.fromarray(values)
    mask.putpalette(list(range(256)) * 3)
    mask.save(tmp_path / "SegmentationClass" / "2007_1.png")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_1\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("2007_1\n2007_2\n")
    return tmp_path


def test_voc_reads_the_lists_of_its_segmentation(voc: Path) -> None:
    dataset = VocSegmentation(str(voc), "val")
    assert len(dataset) == 1
    assert len(dataset.classes) == 21
    found = semantic_of(dataset)
    assert found[2, 2] == 15 == dataset.classes.names.index("person")
    assert found[1, 1] == IGNORED_PIXEL
    assert dataset.image_id(0) == "2007_1"
    with pytest.raises(DataError, match="no split 'train'"):
        VocSegmentation(str(voc), "train")


def test_voc_without_such_lists_takes_those_of_main(voc: Path) -> None:
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    (voc / "ImageSets" / "Segmentation").rmdir()
    with pytest.raises(DataError, match=r"missing mask.*2007_2\.png' does not exist"):
        VocSegmentation(str(voc), "val")
    assert len(VocSegmentation(str(voc), "val", broken="skip")) == 1


def test_voc_with_other_classes(voc: Path) -> None:
    names = tuple(f"class {number}" for number in range(1, 16))
    assert VocSegmentation(str(voc), "val", class_names=names).classes.names == ("background", *names)
    with pytest.raises(DataError, match="has the value 15 in row 2, column 1"):
        VocSegmentation(str(voc), "val", class_names=("a", "b")).target(0)


@pytest.mark.skipif(not (SHARED / "pennfudan").is_dir(), reason="needs the shared pennfudan data")
def test_pennfudans_polygons_agree_with_its_masks() -> None:
    options = {"annotations": "annotations/instances_{split}.json", "images": "images/{split}"}
    dataset = Coco(str(SHARED / "pennfudan"), "val", semantic=True, **options)  # type: ignore[arg-type]
    for index in range(0, len(dataset), 7):
        stem = Path(dataset[index].meta.source).stem
        (path,) = (SHARED / "pennfudan" / "masks").glob(f"**/{stem}*.png")
        with Image.open(path) as mask:
            person = np.asarray(mask) > 0
        found = semantic_of(dataset, index) == 1
        assert (found & person).sum() / (found | person).sum() > 0.95
