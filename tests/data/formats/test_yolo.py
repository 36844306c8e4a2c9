import numpy as np
import pytest
import yaml
from PIL import Image

from detkit.data.formats.yolo import Yolo
from detkit.errors import DataError


def write(root, labels, split="train", **changes):
    """A YOLO folder of 80 x 60 images; `labels` gives the lines of each, None for no label file."""
    root.mkdir(parents=True, exist_ok=True)
    for name, lines in labels.items():
        image = root / "images" / split / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((60, 80, 3), 90, dtype=np.uint8)).save(image)
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
    with pytest.raises(DataError, match=r"1 x no mask.*a\.txt:1: the line is a box, but the head needs polygons"):
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
    with pytest.raises(DataError, match=r"data\.class_names lists 'cow'.*data\.yaml"):
        Yolo(root, "train", class_names=("cow",))
    data = Yolo(root, "train", class_names=("cat",), other_classes="drop")
    assert data.target(0).labels.tolist() == [0]
    assert data.problems.found == []
    assert "1 x object of a class that data.class_names does not list: left out" in data.problems.summary()


def test_classes_of_one_name_are_merged_on_request(tmp_path):
    lines = ["0 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.2 0.3", "2 0.5 0.5 0.2 0.4", "3 0.5 0.5 0.2 0.4"]
    root = write(tmp_path, {"a.jpg": lines[:3]}, names=["cat", "dog", "cat"])
    with pytest.raises(DataError, match=r"class name 'cat' is listed twice.*, or set data\.merge_classes to true"):
        Yolo(root, "train")
    data = Yolo(root, "train", merge_classes=True)
    assert (data.classes.names, data.classes.raw_ids) == (("cat", "dog"), (0, 1))
    assert data.target(0).labels.tolist() == [0, 1, 0]
    root = write(tmp_path, {"a.jpg": lines}, names=["cat", "dog", "cat"])
    with pytest.raises(DataError, match="1 x class out of range"):
        Yolo(root, "train", merge_classes=True, class_names=("cat",), other_classes="drop")


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
    write(tmp_path / "images", {"a.jpg": [BOX]})
    (tmp_path / "config").mkdir()
    (tmp_path / "config/mine.yaml").write_text("path: ../images\ntrain: images/train\nnames: [cat, dog]\n")
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
    with pytest.raises(
        DataError, match=r"The key 'empty' in '.*' is 'null', which is not a valid split\. Set it to a folder"
    ):
        Yolo(root, "empty")
    (tmp_path / "images/val").mkdir()
    with pytest.raises(DataError, match=r"images/val' contains no images"):
        Yolo(root, "val")
    (tmp_path / "none.txt").touch()
    with pytest.raises(DataError, match="has no images"):
        Yolo(write(tmp_path, {}, train="none.txt"), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat\ntrain: x", r"data\.yaml' is not valid YAML: .*line 2, column 6.*Fix it"),
        ("- cat", "is not a mapping"),
        ("train: x", "The key 'names' in .* must be a list of class names"),
        ("names: {a: b}", "The key 'names'"),
        ("names: [cat]\nnc: 2", "nc is 2, but names has 1 classes"),
        ("names: [cat, cat]", "class name 'cat' is listed twice"),
    ],
)
def test_malformed_yaml(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        Yolo(str(tmp_path), "train")


def test_no_label_file_at_all_is_an_error(tmp_path):
    root = write(tmp_path, {"a.jpg": None, "b.jpg": None})
    with pytest.raises(
        DataError, match=r"has 2 images, but none has a label file: '.*a\.jpg', for example, needs '.*train/a\.txt'"
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
        ("1 40 30 20 20", "not a fraction", "40 is far above 1; .*here 80 x 60, not pixels"),
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


def test_broken_images(tmp_path):
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


def kinds(data):
    return sorted((problem.kind, problem.action) for problem in data.problems.found if not problem.harmless)


def test_every_label_file_is_accounted_for(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX], "sub/b.jpg": [BOX], "c.jpg": None})
    labels = tmp_path / "labels/train"
    for name in ("gone", "sub/gone", "other/gone", "photo", "empty"):
        (labels / name).parent.mkdir(exist_ok=True)
        (labels / f"{name}.txt").write_text("" if name == "empty" else BOX)
    (tmp_path / "images/train/photo.heic").write_bytes(b"x")
    (labels / "c.TXT").write_text(BOX)
    (labels / "wide.txt").write_bytes(BOX.encode("utf-16"))
    (labels / "classes.txt").write_text("cat\ndog\n")
    (labels / "notes.txt").write_text("labelled in 2024 by hand\n")
    with pytest.raises(
        DataError, match=r"7 problems \(5 x label file without an image, 1 x .*c\.TXT: its suffix must be \.txt"
    ):
        Yolo(root, "train")
    data = Yolo(root, "train", broken="skip")
    assert len(data) == 3
    assert kinds(data) == [
        ("image of an unsupported format", "left out the image"),
        ("label file with another suffix", "left out the label file"),
        *[("label file without an image", "left out the label file")] * 5,
    ]
    (image,) = (problem for problem in data.problems.found if problem.kind.startswith("image"))
    assert image.where == str(tmp_path / "images/train/photo.heic")
    assert any(line.startswith("1 x images of unsupported formats") for line in data.problems.counts())
    assert "the suffix '.heic' is not supported (supported: .apng" in image.message


def test_labels_of_another_split_or_of_a_list_are_not_missing_an_image(tmp_path):
    write(tmp_path, {"a.jpg": [BOX], "b.jpg": [BOX]})
    write(tmp_path, {"c.jpg": [BOX]}, split="val")
    (tmp_path / "list.txt").write_text("images/train/a.jpg\n")
    root = write(tmp_path, {}, listed="list.txt", all="images")
    assert [len(Yolo(root, split)) for split in ("train", "val", "listed", "all")] == [2, 1, 1, 3]


def test_images_beside_their_labels_with_other_text_files(tmp_path):
    folder = tmp_path / "obj"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (80, 60)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(BOX)
    for name, text in {"README": "Version 1 of 2", "train": "obj/a.jpg\nobj/b.jpg", "classes": "0\n1\n"}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "a.json").write_text("{}")
    root = write(tmp_path, {}, train="obj")
    assert len(Yolo(root, "train")) == 2
    (folder / "b.jpg").unlink()
    (folder / "b.json").write_text("{}")
    with pytest.raises(DataError, match=r"1 x label file without an image.*obj/b\.txt: there is no image 'b\.\*' in"):
        Yolo(root, "train")


def test_links_are_followed_once(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX], "b.jpg": [BOX]})
    for kind in ("images", "labels"):
        (tmp_path / kind / "train/up").symlink_to("..")
        (tmp_path / kind / "train/itself").symlink_to(".")
    data = Yolo(root, "train")
    assert (len(data), data.problems.unlabelled, kinds(data)) == (2, 0, [])
    assert "2 x links to folders that are already searched: skipped" in data.problems.counts()
    # The folders themselves may be links.
    (tmp_path / "images").rename(tmp_path / "store")
    (tmp_path / "images").symlink_to("store")
    assert len(Yolo(root, "train").target(0)) == 1


def test_two_images_of_one_label_file(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX], "a.png": [BOX], "b.jpg": None, "b.png": None})
    with pytest.raises(
        DataError, match=r"1 x label file of two images.*a\.png: its label file '.*a\.txt' is also that of"
    ):
        Yolo(root, "train")
    assert len(Yolo(root, "train", broken="skip")) == 3


def test_darknets_lists(tmp_path, monkeypatch):
    write(tmp_path / "data", {"a.jpg": [BOX], "b.jpg": [BOX], "c.jpg": [BOX], "d.jpg": [BOX]})
    (tmp_path / "data/lists").mkdir()
    lines = [
        "data/images/train/a.jpg",  # from the folder in which Darknet was run
        "images\\train\\b.jpg",
        str(tmp_path / "data/images/train/c.jpg"),
        "../images/train/d.jpg",  # from the list's folder
    ]
    (tmp_path / "data/lists/train.txt").write_bytes("\r\n".join(lines).encode())
    root = write(tmp_path / "data", {}, train="lists/train.txt")
    monkeypatch.chdir(tmp_path)
    data = Yolo(root, "train")
    assert [data.image_id(i) for i in range(4)] == [f"images/train/{name}.jpg" for name in "abcd"]
    assert [len(data.target(i)) for i in range(4)] == [1] * 4
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"1 x missing image.*train\.txt:1"):
        Yolo(root, "train")


def test_an_image_listed_under_two_spellings_is_a_duplicate(tmp_path):
    write(tmp_path, {"a.jpg": [BOX]})
    (tmp_path / "list.txt").write_text("images/train/a.jpg\nimages/../images/train/./a.jpg\n")
    with pytest.raises(DataError, match=r"1 x duplicate image.*list\.txt:2"):
        Yolo(write(tmp_path, {}, train="list.txt"), "train")


@pytest.mark.parametrize("line", ["x" * 300 + ".jpg", "a\0b.jpg", "..", ".", "/", "images", "~nobody/a.jpg"])
def test_hostile_lines_of_a_list_are_named(tmp_path, line):
    write(tmp_path, {"a.jpg": [BOX]})
    (tmp_path / "list.txt").write_text(f"images/train/a.jpg\n{line}\n")
    root = write(tmp_path, {}, train="list.txt")
    with pytest.raises(DataError, match=r"1 x (missing|unreadable) image.*list\.txt:2"):
        Yolo(root, "train")
    assert len(Yolo(root, "train", broken="skip")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 300, "no split 'train'"),
        ("a\0b", "is not a valid split"),
        ("", "is '', which is not a valid split"),
        ("null", "is 'null', which is not a valid split"),
        ([], "is not a valid split"),
        (["images/train", 3.5], "3.5' does not exist"),
        ([["images/train"]], "is not a valid split"),
        ({"a": "images/train"}, "is not a valid split"),
        ("../../..", "no image|has no images|contains no|label file"),
    ],
)
def test_splits_that_name_nothing(tmp_path, source, message):
    root = write(tmp_path / "a/b/c/d", {"a.jpg": None}, train=source)
    with pytest.raises(DataError, match=message):
        Yolo(root, "train")


def test_paths_that_windows_wrote(tmp_path):
    write(tmp_path, {"a.jpg": [BOX]})
    for source in ("..\\images\\train", "images\\train", ".\\images\\train\\", ["images\\train"]):
        assert len(Yolo(write(tmp_path, {}, train=source), "train")) == 1
    (tmp_path / "config").mkdir()
    (tmp_path / "config/data.yaml").write_text("path: ..\\\ntrain: images\\train\nnames: [cat, dog]\n")
    assert len(Yolo(str(tmp_path / "config"), "train")) == 1


@pytest.mark.parametrize("value", ["", "~", "null"])
def test_a_path_that_is_null_is_the_folder_of_the_file(tmp_path, value):
    write(tmp_path, {"a.jpg": [BOX]})
    (tmp_path / "data.yaml").write_text(f"path: {value}\ntrain: images/train\nval:\nnames: [cat, dog]\n")
    assert len(Yolo(str(tmp_path), "train")) == 1
    with pytest.raises(DataError, match=r"The key 'val' in .* is '', which is not a valid split"):
        Yolo(str(tmp_path), "val")


def test_the_path_may_be_absolute_or_in_the_home_folder_and_must_exist(tmp_path, monkeypatch):
    write(tmp_path / "home/data", {"a.jpg": [BOX]})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (str(tmp_path / "home/data"), "~/data"):
        root = write(tmp_path / "config", {}, path=path)
        data = Yolo(root, "train")
        assert data.image_id(0) == "images/train/a.jpg"
    for path in ("../nowhere", "a\0b", "~nobody/x"):
        with pytest.raises(DataError, match=r"The key 'path' in '.*' is the folder '.*', which does not exist"):
            Yolo(write(tmp_path / "config", {}, path=path), "train")


def test_what_is_no_split_is_not_offered_as_one(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX]}, nc=2, download="https://example.org/x.zip", path=".")
    for key in ("download", "nc", "path", "names"):
        with pytest.raises(DataError, match=f"The key '{key}' in .* which is not a valid split"):
            Yolo(root, key)
    with pytest.raises(DataError, match=r"no split 'test'.*Valid: train, val\. "):
        Yolo(root, "test")


def test_a_list_of_folders_and_what_folders_hide_are_named(tmp_path):
    root = write(tmp_path, {"a.jpg": [BOX]})
    (tmp_path / "images/train/b.jpg").symlink_to("nowhere")
    counts = Yolo(root, "train").problems.counts()
    assert "1 x broken links: skipped" in counts
    (tmp_path / "list.txt").write_text("images/train\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: list.txt\n")
    for policy in ("fail", "repair"):
        with pytest.raises(DataError, match=r"missing image.*list\.txt:1: The image '.*train' does not exist"):
            Yolo(root, "train", policy)
