import numpy as np
import pytest
import yaml
from PIL import Image

from detkit.data.yolo import Yolo
from detkit.errors import DataError


def write(root, labels, split="train", **changes):
    """A YOLO folder of 80 x 60 pictures; `labels` gives the lines of each, None for no label file."""
    for name, lines in labels.items():
        picture = root / "images" / split / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((60, 80, 3), 90, dtype=np.uint8)).save(picture)
        label = (root / "labels" / split / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            label.write_text("\n".join(lines))
    content = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | changes
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(root)


BOX = "1 0.5 0.5 0.25 0.5"


def test_boxes_labels_and_background(tmp_path):
    root = write(tmp_path, {"a b.jpg": [BOX, "0.0 0.25 0.25 0.5 0.5", ""], "ü.png": [], "c.jpg": None})
    data = Yolo(root, "train")
    assert [data[i].meta.image_id for i in range(3)] == [
        "images/train/a b.jpg",
        "images/train/c.jpg",
        "images/train/ü.png",
    ]
    assert data.target(0).boxes.tolist() == [[30, 15, 50, 45], [0, 0, 40, 30]]
    assert data.target(0).labels.tolist() == [1, 0]
    assert [len(data.target(i)) for i in range(3)] == [2, 0, 0]
    assert data.problems.unlabelled == 1
    assert "1 x image without a label file" in data.problems.summary()
    assert len(Yolo(f"{root}/data.yaml", "train")) == 3


def test_polygons_give_boxes_areas_and_masks(tmp_path):
    root = write(tmp_path, {"a.jpg": ["1 0.25 0.25 0.75 0.25 0.25 0.75"]})
    data = Yolo(root, "train", masks=True)
    target = data.target(0)
    assert target.boxes.tolist() == [[20, 15, 60, 45]]
    assert target.area.tolist() == [600]
    assert target.masks.shape == (1, 60, 80)
    assert abs(target.masks.sum().item() - 600) < 45
    assert data.fields == {"boxes", "labels", "image_labels", "masks"}
    assert Yolo(root, "train").target(0).masks is None
    assert data[0].image.shape == (60, 80, 3)


def test_a_box_has_no_mask(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX]})
    with pytest.raises(DataError, match=r"1 x no mask.*a\.txt:1: the line is a box, but data\.masks asks for polygons"):
        Yolo(root, "train", masks=True)


def test_names_by_id_and_fixed_class_names(tmp_path):
    root = write(tmp_path, {"a.jpg": ["4 0.5 0.5 0.2 0.2", "2 0.5 0.5 0.2 0.3"]}, names={4: "cat", 2: "dog"})
    data = Yolo(root, "train")
    assert (data.classes.names, data.classes.raw_ids) == (("dog", "cat"), (2, 4))
    assert data.target(0).labels.tolist() == [1, 0]
    fixed = Yolo(root, "train", class_names=("cat", "dog"))
    assert fixed.target(0).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"a\.txt:2: the class 'dog' is not in the list of classes; Valid: cat"):
        Yolo(root, "train", class_names=("cat",))
    with pytest.raises(DataError, match=r"data\.class_names has 'cow'.*data\.yaml"):
        Yolo(root, "train", class_names=("cow",))


def test_only_the_last_images_folder_becomes_labels(tmp_path):
    root = write(tmp_path / "images", {"a.jpg": [BOX]})
    assert len(Yolo(root, "train").target(0)) == 1


def test_lists_of_folders_and_list_files(tmp_path):
    write(tmp_path, {"a.jpg": [BOX]})
    write(tmp_path, {"b.jpg": [BOX]}, split="val")
    (tmp_path / "list.txt").write_text("images/train/a.jpg\n./images/val/b.jpg\n\n")
    root = write(tmp_path, {}, both=["images/train", "images/val"], listed="list.txt")
    for split in ("both", "listed"):
        data = Yolo(root, split)
        assert [data[i].meta.image_id for i in range(2)] == ["images/train/a.jpg", "images/val/b.jpg"]


def test_path_starts_from_the_yaml_file(tmp_path):
    write(tmp_path / "pictures", {"a.jpg": [BOX]})
    (tmp_path / "config").mkdir()
    (tmp_path / "config/mine.yaml").write_text("path: ../pictures\ntrain: images/train\nnames: [cat, dog]\n")
    assert len(Yolo(str(tmp_path / "config/mine.yaml"), "train")) == 1
    with pytest.raises(DataError, match=r"no '.*data\.yaml'\. Set data\.root .*The folder has mine\.yaml"):
        Yolo(str(tmp_path / "config"), "train")


def test_the_paths_that_roboflow_writes(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX]}, train="../images/train")
    assert len(Yolo(root, "train")) == 1


def test_missing_files_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no '.*nowhere'\. Set data\.root to data\.yaml"):
        Yolo(str(tmp_path / "nowhere"), "train")
    root = write(tmp_path, {"a.jpg": [BOX]}, empty=None)
    with pytest.raises(
        DataError, match=r"no split 'tran' in '.*data\.yaml'\. Did you mean 'train'\? Valid: train, val"
    ):
        Yolo(root, "tran")
    with pytest.raises(DataError, match=r"images/val' does not exist\. .*Set data\.train and data\.val"):
        Yolo(root, "val")
    with pytest.raises(DataError, match=r"The key 'empty' in '.*' is None, which is no split\. Give it a folder"):
        Yolo(root, "empty")
    (tmp_path / "images/val").mkdir()
    with pytest.raises(DataError, match=r"images/val' holds no pictures"):
        Yolo(root, "val")
    (tmp_path / "none.txt").touch()
    with pytest.raises(DataError, match="has no images"):
        Yolo(write(tmp_path, {}, train="none.txt"), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat\ntrain: x", r"data\.yaml:2: the YAML cannot be parsed .*Mend the file"),
        ("- cat", "does not hold keys and values"),
        ("train: x", "The key 'names' in .* must be a list of class names"),
        ("names: {a: b}", "The key 'names'"),
        ("names: [cat]\nnc: 2", "nc is 2, but names has 1 classes"),
        ("names: [cat, cat]", "class name 'cat' stands twice"),
    ],
)
def test_malformed_yaml(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        Yolo(str(tmp_path), "train")


def test_no_label_file_at_all_is_an_error(tmp_path):
    root = write(tmp_path, {"a.jpg": None, "b.jpg": None})
    with pytest.raises(
        DataError, match=r"None of the 2 images .* has a label file: '.*a\.jpg', say, needs '.*labels/train/a\.txt'"
    ):
        Yolo(root, "train")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("1 0.5 0.5 0.2", "malformed line", "has 4 columns"),
        ("1 0.5 0.5 0.2 0.2 0.9", "malformed line", "has 6 columns"),
        ("1 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "malformed line", "has 8 columns"),
        ("dog 0.5 0.5 0.2 0.2", "malformed line", "'dog' is not a number"),
        ("1 0.5 O.5 0.2 0.2", "malformed line", "'O.5' is not a number"),
        ("2 0.5 0.5 0.2 0.2", "class out of range", "the class 2 is not in '.*data.yaml', which has 0: cat"),
        ("-1 0.5 0.5 0.2 0.2", "class out of range", "the class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "class out of range", "the class 0.5"),
        ("nan 0.5 0.5 0.2 0.2", "class out of range", "the class nan"),
        ("1 nan 0.5 0.2 0.2", "not a number", "not a finite number"),
        ("1 40 30 20 20", "not a fraction", "40 is far above 1; .*80 x 60 here, not pixels"),
        ("1 0.5 0.5 0 0.2", "empty box", "of width 0"),
        ("1 1.5 0.5 0.2 0.2", "box outside the image", "lies outside"),
    ],
)
def test_broken_lines_under_each_policy(tmp_path, line, kind, message):
    root = write(tmp_path, {"a.jpg": [BOX, "", line]})
    with pytest.raises(
        DataError, match=rf"1 x {kind}.*labels/train/a\.txt:3: .*{message}.*set data\.broken to 'repair'"
    ):
        Yolo(root, "train")
    for policy in ("skip", "repair"):
        data = Yolo(root, "train", broken=policy)
        assert len(data.target(0)) == 1
        assert [(p.kind, p.action) for p in data.problems.found] == [(kind, "left out the box")]


@pytest.mark.parametrize(
    ("line", "repaired"), [("1 0.9 0.5 0.4 0.5", [56, 15, 80, 45]), ("1 0.5 0.5 -0.25 0.5", [30, 15, 50, 45])]
)
def test_repaired_boxes(tmp_path, line, repaired):
    root = write(tmp_path, {"a.jpg": [line]})
    data = Yolo(root, "train", broken="repair")
    assert np.allclose(data.target(0).boxes, [repaired], atol=1e-4)
    assert len(Yolo(root, "train", broken="skip").target(0)) == 0


def test_a_coordinate_at_1_0021_is_rounding(tmp_path):
    data = Yolo(write(tmp_path, {"a.jpg": ["1 0.9021 0.5 0.2 0.5"]}), "train")
    assert data.target(0).boxes[0, 2] == 80
    assert data.problems.rounded == 1
    assert data.problems.found == []


def test_lines_that_stand_twice_count_once_under_every_policy(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX, "1 0.50 0.5 0.25 0.5"]})
    for policy in ("fail", "skip", "repair"):
        data = Yolo(root, "train", broken=policy)
        assert len(data.target(0)) == 1
        assert [(p.kind, p.message) for p in data.problems.found] == [
            ("duplicate line", "the line is the same as line 1")
        ]


def test_broken_pictures(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX], "b.jpg": [BOX]})
    (tmp_path / "images/train/a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 x unreadable image.*a\.jpg' is empty \(0 bytes\)"):
        Yolo(root, "train")
    assert len(Yolo(root, "train", broken="skip")) == 1
    (tmp_path / "list.txt").write_text("images/train/b.jpg\nimages/train/none.jpg\nimages/train/b.jpg")
    root = write(tmp_path, {}, train="list.txt")
    with pytest.raises(
        DataError, match=r"1 x missing image, 1 x duplicate image\).*list\.txt:2: .*none\.jpg' does not exist"
    ):
        Yolo(root, "train")
