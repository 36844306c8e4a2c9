import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO

from detkit.data import masks
from detkit.data.coco import Coco
from detkit.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
TRIANGLE = [10, 10, 40, 10, 10, 40]


def annotation(**changes):
    return {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 20, 30, 20], "area": 450.5, "iscrowd": 0} | changes


def write(root, annotations, images=None, categories=CATEGORIES, picture=True):
    images = [{"id": 5, "file_name": "ä 1.jpg", "height": 60, "width": 80}] if images is None else images
    (root / "annotations").mkdir(exist_ok=True)
    (root / "train").mkdir(exist_ok=True)
    for image in images if picture else ():
        Image.fromarray(np.full((60, 80, 3), 90, dtype=np.uint8)).save(root / "train" / image["file_name"])
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
    with pytest.raises(DataError, match=r"data\.class_names has 'dgo'.*Did you mean 'dog'"):
        Coco(root, "train", class_names=("dgo",))
    with pytest.raises(DataError, match=r"annotations\[0\] \(id 1\) of 'ä 1\.jpg': the class 'dog' is not in the list"):
        Coco(root, "train", class_names=("cat",))
    assert Coco(root, "train", class_names=("cat",), broken="skip").target(0).labels.tolist() == [0]


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
        ([[1, 2, 3, 4, 5, float("nan")]], "nan, which is not a finite number"),
        ({"size": [80, 60], "counts": [4800]}, r"for the size \[80, 60\], the image is \[60, 80\]"),
        ({"size": [60, 80], "counts": [4000]}, "add up to the 4800 pixels"),
        ({"size": [60, 80], "counts": "zzzzz"}, "RLE"),
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
        DataError, match=r"instances_train\.json:2: the JSON cannot be parsed, column 18.*Mend the file"
    ):
        Coco(root, "train")
    for content in ("[]", "{}", '{"images": [], "annotations": {}}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"has no list '(images|annotations)'.*not a COCO annotation file"):
            Coco(root, "train")


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        Coco(write(tmp_path, [], images=[]), "train")


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "class name 'cat' stands twice"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "raw id 1 stands twice"),
        ([{"id": 1}], "a category without a usable 'id' and 'name'"),
    ],
)
def test_unusable_categories(tmp_path, categories, message):
    with pytest.raises(DataError, match=message):
        Coco(write(tmp_path, [], categories=categories), "train")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"category_id": 4}, "unknown category", r"category_id 4; there are: 0: dog \(raw id 3\)"),
        ({"category_id": [4]}, "malformed annotation", r"'category_id' must be a whole number, but it is \[4\]"),
        ({"image_id": 6}, "unknown image", "no image with its image_id 6"),
        ({"image_id": None}, "malformed annotation", "no 'image_id'"),
        ({"bbox": [1, 2, 3]}, "malformed annotation", r"must be \[x, y, width, height\], but it is \[1, 2, 3\]"),
        ({"bbox": None}, "malformed annotation", r"must be \[x, y, width, height\]"),
        ({"bbox": [1, 2, 3, "x"]}, "malformed annotation", "'x' is not a number"),
        ({"bbox": [1, 2, float("nan"), 4]}, "not a number", "not a finite number"),
        ({"bbox": [1, 2, 0, 4]}, "empty box", "width 0 and height 4"),
        ({"area": "big"}, "malformed annotation", "'big' is not a number"),
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
    with pytest.raises(DataError, match=r"4 problems .*images\[5\]: it needs 'id' and 'file_name'"):
        Coco(root, "train")
    data = Coco(root, "train", broken="skip")
    assert [data[i].meta.image_id for i in range(len(data))] == [1, 3]
    assert sorted(problem.kind for problem in data.problems.found) == [
        "duplicate image", "malformed image entry", "missing image", "unreadable image",
    ]  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_pedestrians_masks_are_those_of_their_png_files(split):
    root = SHARED / "pennfudan"
    data = Coco(str(root), split, masks=True, images="images/{split}")
    assert len(data) == {"train": 100, "val": 30}[split]
    for index in range(0, len(data), 5):
        target = data.target(index)
        picture = Path(data[index].meta.source)
        ids = np.array(Image.open(root / "masks" / split / f"{picture.stem}.png"))
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
