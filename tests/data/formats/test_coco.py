import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO

from detkit.data import masks
from detkit.data.formats.coco import Coco
from detkit.errors import DataError

SHARED = Path(__file__).parents[4] / "shared" / "data"
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
TRIANGLE = [10, 10, 40, 10, 10, 40]


def annotation(**changes):
    return {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 20, 30, 20], "area": 450.5, "iscrowd": 0} | changes


def write(root, annotations, images=None, categories=CATEGORIES, image=True):
    images = [{"id": 5, "file_name": "ä 1.jpg", "height": 60, "width": 80}] if images is None else images
    (root / "annotations").mkdir(exist_ok=True)
    (root / "train").mkdir(exist_ok=True)
    for entry in images if image else ():
        Image.fromarray(np.full((60, 80, 3), 90, dtype=np.uint8)).save(root / "train" / entry["file_name"])
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return str(root)


def test_boxes_labels_and_ids(tmp_path):
    root = write(tmp_path, [annotation(), annotation(id=2, category_id=7, bbox=[0, 0, 80, 60], area=None)])
    data = Coco(root, "train")
    target = data.target(0)
    assert target.boxes.tolist() == [[10, 20, 40, 40], [0, 0, 80, 60]]
    assert target.labels.tolist() == [0, 1]
    assert target.area.tolist() == [450.5, 4800]
    assert (data.classes.names, data.classes.raw_ids) == (("dog", "cat"), (3, 7))
    assert data[0].meta.image_id == 5
    assert data.fields == {"boxes", "labels", "image_labels"}


def test_an_image_without_annotations_stays(tmp_path):
    data = Coco(write(tmp_path, []), "train", masks=True)
    assert len(data) == 1
    assert data.target(0).masks.shape == (0, 60, 80)
    assert data[0].image.shape == (60, 80, 3)


def test_fixed_class_names_give_the_order_of_labels(tmp_path):
    root = write(tmp_path, [annotation(), annotation(id=2, category_id=7)])
    data = Coco(root, "train", class_names=("cat", "dog"))
    assert data.target(0).labels.tolist() == [1, 0]
    assert data.classes.raw_ids == (7, 3)
    with pytest.raises(DataError, match=r"data\.class_names lists 'dgo'.*Did you mean 'dog'"):
        Coco(root, "train", class_names=("dgo",))
    with pytest.raises(DataError, match=r"annotations\[0\] \(id 1\) of 'ä 1\.jpg': the class 'dog' is not in the list"):
        Coco(root, "train", class_names=("cat",))
    assert Coco(root, "train", class_names=("cat",), broken="skip").target(0).labels.tolist() == [0]


def test_objects_of_other_classes_are_dropped_on_request(tmp_path):
    root = write(tmp_path, [annotation(), annotation(id=2, category_id=7), annotation(id=3, bbox=[0, 0, 5, 5])])
    with pytest.raises(DataError, match=r"2 x unknown class.* set data\.other_classes to 'drop'"):
        Coco(root, "train", class_names=("cat",))
    data = Coco(root, "train", class_names=("cat",), other_classes="drop")
    assert data.target(0).labels.tolist() == [0]
    assert data.problems.found == []
    assert "2 x object of a class that data.class_names does not list: left out" in data.problems.summary()
    # A category that no file declares stays a problem.
    root = write(tmp_path, [annotation(category_id=99)])
    with pytest.raises(DataError, match="1 x unknown category"):
        Coco(root, "train", class_names=("cat",), other_classes="drop")


def test_categories_of_one_name_are_merged_on_request(tmp_path):
    categories = [{"id": 4, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}]
    root = write(tmp_path, [annotation(id=n, category_id=n, bbox=[n, 0, 5, 5]) for n in (2, 3, 4)], None, categories)
    with pytest.raises(DataError, match=r"class name 'cat' is listed twice.*, or set data\.merge_classes to true"):
        Coco(root, "train")
    data = Coco(root, "train", merge_classes=True)
    assert (data.classes.names, data.classes.raw_ids) == (("dog", "cat"), (2, 3))
    assert data.target(0).labels.tolist() == [0, 1, 1]
    chosen = Coco(root, "train", merge_classes=True, class_names=("cat",), other_classes="drop")
    assert (chosen.classes.raw_ids, chosen.target(0).labels.tolist()) == ((3,), [0, 0])
    # Ids are not merged: nothing tells which category an object is of.
    root = write(tmp_path, [], None, [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}])
    with pytest.raises(DataError, match=r"raw id 1 is listed twice.* unique name and id\.$"):
        Coco(root, "train", merge_classes=True)


ROBOFLOW = [
    {"id": 0, "name": "fruits", "supercategory": "none"},
    {"id": 1, "name": "apple", "supercategory": "fruits"},
    {"id": 2, "name": "pear", "supercategory": "fruits"},
]


def test_the_category_that_groups_the_others_of_roboflow_is_left_out(tmp_path):
    root = write(tmp_path, [annotation(category_id=2)], None, ROBOFLOW)
    data = Coco(root, "train")
    assert (data.classes.names, data.classes.raw_ids) == (("apple", "pear"), (1, 2))
    assert data.target(0).labels.tolist() == [1]
    assert "category 'fruits' (id 0) without objects that only groups the others: left out" in data.problems.summary()
    # It stays where the user names it, or an object is of it.
    assert Coco(root, "train", class_names=("fruits", "apple", "pear")).classes.raw_ids == (0, 1, 2)
    root = write(tmp_path, [annotation(category_id=0)], None, ROBOFLOW)
    assert Coco(root, "train").classes.names == ("fruits", "apple", "pear")


@pytest.mark.parametrize("class_names", [None, ("tree",)])
def test_a_group_of_roboflow_with_the_name_of_its_class(tmp_path, class_names):
    categories = [
        {"id": 0, "name": "tree", "supercategory": "none"},
        {"id": 1, "name": "tree", "supercategory": "tree"},
    ]
    data = Coco(write(tmp_path, [annotation(category_id=1)], None, categories), "train", class_names=class_names)
    assert (data.classes.names, data.classes.raw_ids) == (("tree",), (1,))


@pytest.mark.parametrize(
    "root",
    [{"id": 0, "name": "other"}, {"id": 0, "name": "other", "supercategory": "none"}, {"id": 0, "name": "fruits"}],
)
def test_other_categories_of_id_0_are_classes(tmp_path, root):
    data = Coco(write(tmp_path, [], None, [root, *ROBOFLOW[1:]]), "train")
    assert data.classes.raw_ids == (0, 1, 2)


@pytest.mark.parametrize(
    "segmentation",
    [[[10.2, 10.2, 10.3, 10.2, 10.3, 10.3]], {"size": [60, 80], "counts": [4800]}, [[-99, 0, -9, 0, -9, 9]]],
)
def test_masks_without_pixels_are_problems(tmp_path, segmentation):
    root = write(tmp_path, [annotation(segmentation=segmentation), annotation(id=2, segmentation=[TRIANGLE])])
    with pytest.raises(DataError, match=r"1 x empty mask.*annotations\[0\] \(id 1\).*its mask covers no pixel"):
        Coco(root, "train", masks=True)
    for policy in ("skip", "repair"):
        assert Coco(root, "train", masks=True, broken=policy).target(0).masks.sum() > 0
        assert len(Coco(root, "train", masks=True, broken=policy).target(0)) == 1
    assert len(Coco(root, "train").target(0)) == 2


def random_mask(seed):
    return np.random.default_rng(seed).random((60, 80)) < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_decode_as_pycocotools_does(tmp_path, seed):
    mask = random_mask(seed)
    compressed = reference.encode(np.asfortranarray(mask, dtype=np.uint8))
    flat = np.concatenate([[False], mask.ravel("F"), [not mask.ravel("F")[-1]]])
    counts = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])).tolist()
    entries = [
        annotation(iscrowd=1, segmentation={"size": [60, 80], "counts": counts}),
        annotation(id=2, segmentation={"size": [60, 80], "counts": compressed["counts"].decode()}),
    ]
    target = Coco(write(tmp_path, entries), "train", masks=True).target(0)
    assert np.array_equal(target.masks[0], mask)
    assert np.array_equal(target.masks[1], reference.decode(compressed).astype(bool))
    assert target.crowd.tolist() == [True, False]
    assert target.ignored.tolist() == [True, False]
    assert masks.encode(mask) == {"size": [60, 80], "counts": compressed["counts"].decode()}


@pytest.mark.parametrize("seed", range(5))
def test_polygons_have_the_pixels_and_area_of_pycocotools(tmp_path, seed):
    polygons = np.random.default_rng(seed).uniform(-5, 85, (2, 10)).tolist()
    target = Coco(write(tmp_path, [annotation(segmentation=polygons)]), "train", masks=True).target(0)
    expected = reference.merge(reference.frPyObjects(polygons, 60, 80))
    assert np.array_equal(target.masks[0], reference.decode(expected).astype(bool))
    assert target.masks.sum() == reference.area(expected)


def test_polygon_area_and_tight_box():
    assert masks.polygon_area(TRIANGLE) == 450
    mask = np.zeros((60, 80), dtype=bool)
    assert masks.tight_box(mask) is None
    mask[3:7, 10:12] = True
    assert masks.tight_box(mask) == (10, 3, 12, 7)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "must be a list of polygons or"),
        ([], "must be a list of polygons or"),
        ([[1, 2, 3, 4]], r"at least three points .* but one is \[1, 2, 3, 4\]"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "nan is not a finite number"),
        ([[1, 2, 3, 4, 5, "6"]], "'6' is not a finite number"),
        ([[1, 2, 3, 4, 5, True]], "True is not a finite number"),
        ([[1, 2, 3, 4, 5, 10**400]], "0 is not a finite number"),
        ([[[1, 2], [3, 4], [5, 6], [7, 8], [9, 9], [1, 1]]], r"\[1, 2\] is not a finite number"),
        ([1, 2, 3, 4, 5, 6], "at least three points as x, y pairs, but one is 1"),
        ([TRIANGLE, None], "at least three points as x, y pairs, but one is None"),
        ([[1e9, 1, 2, 2, 3, 1]], "1e\\+09, which is too large"),
        ([[-1.1e6, 1, 2, 2, 3, 1]], "-1.1e\\+06, which is too large"),
        ([[0, 0, 79, 59] * 2000], r"outline of a polygon is \d+ pixels long, longer than the number of pixels"),
        ("abc", "must be a list of polygons or"),
        ({"size": [60, 80]}, "must be a list of polygons or"),
        ({"size": 60, "counts": [4800]}, r"have the size 60, but the image has \[60, 80\]"),
        ({"size": [80, 60], "counts": [4800]}, r"have the size \[80, 60\], but the image has \[60, 80\]"),
        ({"size": [60, 80], "counts": [4000]}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": [-10, 4810]}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": [True, 4799]}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": ["4800"]}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": [10**400]}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": []}, "whose sum is the 4800 pixels"),
        ({"size": [60, 80], "counts": "zzzzz"}, "text of compressed ones, not 'zzzzz'"),
        ({"size": [60, 80], "counts": "é1"}, "text of compressed ones, not 'é1'"),
        ({"size": [60, 80], "counts": ""}, "text of compressed ones, not ''"),
        ({"size": [60, 80], "counts": "P"}, "text of compressed ones, not 'P'"),
        ({"size": [60, 80], "counts": "oooooooooo0"}, "text of compressed ones"),
        ({"size": [60, 80], "counts": "0"}, "compressed run lengths '0' do not match this size"),
        ({"size": [60, 80], "counts": "531"}, "compressed run lengths '531' do not match this size"),
        ({"size": [60, 80], "counts": "O"}, "compressed run lengths 'O' do not match this size"),
        ({"size": [60, 80], "counts": 5}, "'counts' must be"),
    ],
)
def test_malformed_masks_are_named(tmp_path, segmentation, message):
    root = write(tmp_path, [annotation(segmentation=segmentation), annotation(id=2, segmentation=[TRIANGLE])])
    with pytest.raises(DataError, match=rf"1 x malformed mask.*annotations\[0\] \(id 1\).*{message}.*data\.broken"):
        Coco(root, "train", masks=True)
    assert len(Coco(root, "train", masks=True, broken="skip").target(0).masks) == 1
    assert len(Coco(root, "train").target(0)) == 2


def test_missing_files_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere' does not exist\. Set data\.root .*data\.annotations, data\.images"):
        Coco(str(tmp_path / "nowhere"), "train")
    root = write(tmp_path, [])
    with pytest.raises(
        DataError, match=r"instances_tran\.json' does not exist\. Did you mean 'train'\? Valid: train\."
    ):
        Coco(root, "tran")
    with pytest.raises(DataError, match=r"images/train' does not exist\. Set data\.images"):
        Coco(root, "train", images="images/{split}")


def test_malformed_json_names_its_line(tmp_path):
    root = write(tmp_path, [])
    path = tmp_path / "annotations/instances_train.json"
    path.write_text('{"images": [],\n "annotations": [}\n')
    with pytest.raises(
        DataError, match=r"instances_train\.json' is not valid JSON: .*line 2 column 18.*generate it again"
    ):
        Coco(root, "train")
    for content in ("[]", "{}", "5", "null", '{"images": [], "annotations": {}}', '{"images": 5}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"has no list '(images|annotations)'.*not a COCO annotation file"):
            Coco(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b'{"images": ["\xff"]}', "not UTF-8"),
        (b'{"images": ["\\ud800"]}', "surrogate"),
        (b"", "not valid JSON"),
    ],
)
def test_a_hostile_file_is_one_error(tmp_path, content, message):
    root = write(tmp_path, [])
    (tmp_path / "annotations/instances_train.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"instances_train\.json' .*{message}"):
        Coco(root, "train")


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        Coco(write(tmp_path, [], images=[]), "train")


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "class name 'cat' is listed twice"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "raw id 1 is listed twice"),
        ([{"id": 1}], r"categories\[0\]: the category has no valid 'id' and 'name' \(it has no 'name'\)"),
        ([{"id": 1, "name": "a"}, {"name": "b"}], r"categories\[1\]: .*it has no 'id'"),
        ([{"id": "1", "name": "cat"}], "'id' must be a whole number, but is '1'"),
        ([{"id": True, "name": "cat"}], "'id' must be a whole number, but is True"),
        ([{"id": 1.5, "name": "cat"}], "'id' must be a whole number, but is 1.5"),
        ([{"id": float("inf"), "name": "cat"}], "'id' must be a whole number, but is inf"),
        ([{"id": None, "name": "cat"}], "'id' must be a whole number, but is None"),
        ([{"id": 1, "name": 7}], "'name' must be text, but is 7"),
        ([{"id": 1, "name": ""}], "class name '' is empty"),
        (["cat"], "must be an object with keys and values, but is 'cat'"),
    ],
)
def test_unusable_categories(tmp_path, categories, message):
    with pytest.raises(DataError, match=message):
        Coco(write(tmp_path, [], categories=categories), "train")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"category_id": 4}, "unknown category", r"category_id 4; there are: 0: dog \(raw id 3\)"),
        ({"category_id": [4]}, "malformed annotation", r"'category_id' must be a whole number, but is \[4\]"),
        ({"image_id": 6}, "unknown image", "no image with its image_id 6"),
        ({"category_id": 3.7}, "malformed annotation", "'category_id' must be a whole number, but is 3.7"),
        ({"category_id": "3"}, "malformed annotation", "'category_id' must be a whole number, but is '3'"),
        ({"category_id": True}, "malformed annotation", "'category_id' must be a whole number, but is True"),
        ({"category_id": float("nan")}, "malformed annotation", "must be a whole number, but is nan"),
        ({"category_id": 10**400}, "unknown category", "there is no category with its category_id 1000"),
        ({"image_id": None}, "malformed annotation", "'image_id' must be a whole number or text, but is None"),
        ({"image_id": 5.5}, "malformed annotation", "must be a whole number or text, but is 5.5"),
        ({"image_id": True}, "malformed annotation", "must be a whole number or text, but is True"),
        ({"image_id": [5]}, "malformed annotation", r"must be a whole number or text, but is \[5\]"),
        ({"image_id": "5"}, "unknown image", "no image with its image_id '5'"),
        ({"bbox": [1, 2, 3]}, "malformed annotation", r"must be \[x, y, width, height\], but is \[1, 2, 3\]"),
        ({"bbox": None}, "malformed annotation", r"must be \[x, y, width, height\]"),
        ({"bbox": [1, 2, 3, 4, 5]}, "malformed annotation", "which has 5 values"),
        ({"bbox": {"x": 1}}, "malformed annotation", "but is {'x': 1}"),
        ({"bbox": [1, 2, 3, "x"]}, "malformed annotation", "'x' is not a finite number"),
        ({"bbox": [1, 2, 3, "4"]}, "malformed annotation", "'4' is not a finite number"),
        ({"bbox": [1, 2, 3, None]}, "malformed annotation", "None is not a finite number"),
        ({"bbox": [1, 2, 3, True]}, "malformed annotation", "True is not a finite number"),
        ({"bbox": [1, 2, 3, [4]]}, "malformed annotation", r"\[4\] is not a finite number"),
        ({"bbox": [1, 2, 3, 10**400]}, "malformed annotation", "0 is not a finite number"),
        ({"bbox": [1, 2, float("nan"), 4]}, "malformed annotation", "nan is not a finite number"),
        ({"bbox": [float("-inf"), 2, 3, 4]}, "malformed annotation", "-inf is not a finite number"),
        ({"bbox": [1e308, 2, 1e308, 4]}, "not a number", "not a finite number"),
        ({"bbox": [1, 2, 0, 4]}, "empty box", "width 0 and height 4"),
        ({"area": "big"}, "malformed annotation", "'area' must be in square pixels, but 'big' is not a finite number"),
        ({"area": "12"}, "malformed annotation", "'12' is not a finite number"),
        ({"area": -1}, "malformed annotation", r"'area' must be in 0\.\.1e\+10 square pixels, but is -1"),
        ({"area": float("nan")}, "malformed annotation", "nan is not a finite number"),
        ({"area": float("inf")}, "malformed annotation", "inf is not a finite number"),
        ({"area": 1e11}, "malformed annotation", "but is 1e\\+11"),
        ({"area": True}, "malformed annotation", "True is not a finite number"),
        ({"area": [1]}, "malformed annotation", r"\[1\] is not a finite number"),
        ({"iscrowd": "0"}, "malformed annotation", "'iscrowd' must be 0 or 1, but is '0'"),
        ({"iscrowd": 2}, "malformed annotation", "'iscrowd' must be 0 or 1, but is 2"),
        ({"iscrowd": -1}, "malformed annotation", "must be 0 or 1, but is -1"),
        ({"iscrowd": []}, "malformed annotation", r"must be 0 or 1, but is \[\]"),
        ({"iscrowd": float("nan")}, "malformed annotation", "must be 0 or 1, but is nan"),
    ],
)
def test_broken_annotations_under_each_policy(tmp_path, changes, kind, message):
    root = write(tmp_path, [annotation(), annotation(id=9, **changes)])
    with pytest.raises(
        DataError, match=rf"1 x {kind}.*instances_train\.json, annotations\[1\].*{message}.*data\.broken"
    ):
        Coco(root, "train")
    for policy in ("skip", "repair"):
        data = Coco(root, "train", broken=policy)
        assert len(data.target(0)) == 1
        assert [(p.kind, p.action) for p in data.problems.found] == [(kind, "left out the box")]


def test_entries_that_are_no_objects_are_named(tmp_path):
    root = write(tmp_path, [annotation(), None, [1], {}])
    with pytest.raises(DataError, match=r"3 x malformed annotation.*annotations\[1\]: it must be an object .* is None"):
        Coco(root, "train")
    data = Coco(root, "train", broken="skip")
    assert [problem.message for problem in data.problems.found][1:] == [
        "it must be an object with keys and values, but is [1]",
        "it has no 'image_id'",
    ]
    assert len(data.target(0)) == 1


def test_numbers_that_json_writes_in_two_ways_are_the_same(tmp_path):
    entries = [annotation(image_id=5.0, category_id=3.0, iscrowd=True), annotation(iscrowd=None), annotation(area=0)]
    images = [{"id": 5.0, "file_name": "a.jpg", "height": 60.0, "width": 80}]
    target = (data := Coco(write(tmp_path, entries, images), "train")).target(0)
    assert (target.labels.tolist(), target.crowd.tolist()) == ([0, 0, 0], [True, False, False])
    assert target.area.tolist() == [450.5, 450.5, 0]
    assert data.image_id(0) == 5
    assert type(data.image_id(0)) is int


@pytest.mark.parametrize("key", ["id", "bbox", "area", "image_id", "iscrowd", "category_id", "segmentation"])
def test_deeply_nested_values_are_named_like_others(tmp_path, key):
    root = write(tmp_path, [annotation(segmentation=[TRIANGLE]) | {key: "deep"}])
    path = tmp_path / "annotations/instances_train.json"
    path.write_text(path.read_text().replace('"deep"', "[" * 900 + "]" * 900))
    if key == "id":  # nobody reads it but for messages
        assert len(Coco(root, "train", masks=True)) == 1
        return
    with pytest.raises(DataError, match=r"1 x malformed (annotation|mask)"):
        Coco(root, "train", masks=True)


@pytest.mark.parametrize(
    ("bbox", "repaired"), [([50, 20, 90, 10], [50, 20, 80, 30]), ([40, 30, -20, -10], [20, 20, 40, 30])]
)
def test_repaired_boxes(tmp_path, bbox, repaired):
    root = write(tmp_path, [annotation(bbox=bbox)])
    assert Coco(root, "train", broken="repair").target(0).boxes.tolist() == [repaired]
    assert len(Coco(root, "train", broken="skip").target(0)) == 0


def test_broken_images_under_each_policy(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2, 3, 3)]
    root = write(tmp_path, [annotation(image_id=1)], images)
    (tmp_path / "train/2.jpg").write_bytes(b"")
    content = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    content["images"] += [{"id": 4, "file_name": "none.jpg"}, {"id": 5}]
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"4 problems .*images\[5\]: it needs a valid 'id' and 'file_name' \(it has no 'file_name'\)"
    ):
        Coco(root, "train")
    data = Coco(root, "train", broken="skip")
    assert [data[i].meta.image_id for i in range(len(data))] == [1, 3]
    assert sorted(problem.kind for problem in data.problems.found) == [
        "duplicate image", "malformed image entry", "missing image", "unreadable image",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 1.5}, "'id' must be a whole number or text, but is 1.5"),
        ({"id": None}, "'id' must be a whole number or text, but is None"),
        ({"id": True}, "'id' must be a whole number or text, but is True"),
        ({"file_name": None}, "it has no 'file_name'"),
        ({"file_name": ""}, "'file_name' must be the path of a file, but is ''"),
        ({"file_name": 7}, "'file_name' must be the path of a file, but is 7"),
        ({"file_name": "a\0b"}, "'file_name' must be the path of a file"),
        ({"width": -80}, "'width' must be above 0, but is -80"),
        ({"width": "80"}, "'width' must be a whole number, but is '80'"),
        ({"height": 60.5}, "'height' must be a whole number, but is 60.5"),
        ({"height": float("inf")}, "'height' must be a whole number, but is inf"),
        ({"height": [60]}, r"'height' must be a whole number, but is \[60\]"),
    ],
)
def test_malformed_image_entries(tmp_path, changes, message):
    root = write(tmp_path, [])
    path = tmp_path / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 6, "file_name": "b.jpg", "height": 60, "width": 80} | changes)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"1 x malformed image entry.*images\[1\]: .*{message}"):
        Coco(root, "train")
    assert len(Coco(root, "train", broken="skip")) == 1


@pytest.mark.parametrize("name", ["none.jpg", "../a.jpg"])
def test_missing_images_are_named(tmp_path, name):
    root = write(tmp_path, [], [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": name}], image=False)
    Image.new("RGB", (80, 60)).save(tmp_path / "train/a.jpg")
    with pytest.raises(DataError, match=r"1 x missing image.*images\[1\] \(id 6, "):
        Coco(root, "train")


@pytest.mark.parametrize("size", [{}, {"height": None, "width": None}, {"height": 0, "width": 0}])
def test_an_image_entry_may_lack_its_size(tmp_path, size):
    images = [{"id": 5, "file_name": "a.jpg"} | size]
    assert Coco(write(tmp_path, [annotation()], images), "train").size(0) == (60, 80)


@pytest.mark.parametrize(("images", "stored"), [("train", "1.jpg"), (".", "train/1.jpg"), ("train", "train/1.jpg")])
def test_images_of_lvis_are_found_by_their_url(tmp_path, images, stored):
    root = write(tmp_path, [annotation()])
    path = tmp_path / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["images"] = [{"id": 5, "coco_url": "http://images.cocodataset.org/train/1.jpg", "height": 60, "width": 80}]
    path.write_text(json.dumps(content))
    target = tmp_path / images / stored
    target.parent.mkdir(exist_ok=True)
    (tmp_path / "train/ä 1.jpg").rename(target)
    assert Coco(root, "train", images=images).source(0) == str(target)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_pedestrians_masks_are_those_of_their_png_files(split):
    root = SHARED / "pennfudan"
    data = Coco(str(root), split, masks=True, images="images/{split}")
    assert len(data) == {"train": 100, "val": 30}[split]
    for index in range(0, len(data), 5):
        target = data.target(index)
        image = Path(data[index].meta.source)
        ids = np.array(Image.open(root / "masks" / split / f"{image.stem}.png"))
        assert len(target) == len(np.unique(ids)) - 1
        truth = np.stack([ids == k for k in np.unique(ids) if k])
        found = target.masks.numpy()
        overlap = (truth[:, None] & found).sum((2, 3)) / (truth[:, None] | found).sum((2, 3))
        assert overlap.max(axis=0).min() > 0.9


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_itself_agrees_with_pycocotools(split):
    root = SHARED / "coco_tiny"
    data = Coco(str(root), split, masks=True)
    coco = COCO(str(root / f"annotations/instances_{split}.json"))
    assert len(data) == len(coco.imgs) == 80
    assert data.classes.raw_ids == tuple(sorted(coco.cats))
    assert data.problems.found == []
    assert sum(data.target(i).crowd.sum().item() for i in range(80)) == sum(a["iscrowd"] for a in coco.anns.values())
    for index in range(80):
        sample, target = data[index], data.target(index)
        entries = coco.imgToAnns[sample.meta.image_id]
        assert [data.classes.raw_ids[label] for label in target.labels] == [e["category_id"] for e in entries]
        expected = np.array([e["bbox"] for e in entries]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        assert np.allclose(target.boxes, expected, atol=1)
        assert np.allclose(target.area, [e["area"] for e in entries])
        for mask, entry in zip(target.masks.numpy(), entries):
            assert np.array_equal(mask, coco.annToMask(entry).astype(bool))


def test_annotations_of_other_names_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(DataError, match=r"Set data\.annotations, now .*2017.* annotations/instances_train\.json"):
        Coco(str(tmp_path), "train", annotations="annotations/instances_{split}2017.json")
