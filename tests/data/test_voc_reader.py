from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.voc import Voc
from detkit.errors import DataError
from detkit.registry import datasets

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def obj(name, *box, extra=""):
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object>\n<name>{name}</name>{extra}<bndbox>{tags}</bndbox></object>\n"


def write(root, pictures, split="train", size=(60, 80), declared=None):
    """A VOC folder; `pictures` gives the <object> elements of each id."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    height, width = declared or size
    for image_id, objects in pictures.items():
        Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8)).save(root / "JPEGImages" / f"{image_id}.jpg")
        size_tag = f"<size><width>{width}</width><height>{height}</height></size>"
        head = f"<annotation>\n<filename>elsewhere.jpg</filename>\n{size_tag}"
        (root / "Annotations" / f"{image_id}.xml").write_text(f"{head}\n{''.join(objects)}</annotation>", "utf-8")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(pictures) + "\n", "utf-8")
    return str(root)


def test_only_the_left_and_top_edges_lose_one(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 80, 60), obj("cat", 10.5, 20, 30, 40)]})
    data = Voc(root, "train")
    target = data.target(0)
    assert target.boxes.tolist() == [[0, 0, 80, 60], [9.5, 19, 30, 40]]
    assert data.classes.names == ("cat", "dog")
    assert target.labels.tolist() == [1, 0]
    assert data.fields == {"boxes", "labels", "image_labels"}
    assert data.problems.summary() == "no problems"


def test_a_sample_carries_its_picture_and_meta(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 2, 2, 9, 9)]})
    sample = Voc(root, "train")[0]
    assert sample.image.shape == (60, 80, 3)
    assert sample.meta.image_id == "a"
    assert sample.meta.source.endswith("a.jpg")
    assert sample.meta.size == (60, 80)
    assert np.array_equal(sample.meta.matrix, np.eye(3))


def test_difficult_objects_are_marked_and_parts_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    root = write(
        tmp_path, {"a": [obj("dog", 1, 1, 9, 9, extra="<difficult>1</difficult>"), obj("dog", 1, 1, 5, 5, extra=part)]}
    )
    data = Voc(root, "train")
    assert data.target(0).difficult.tolist() == [True, False]
    assert data.classes.names == ("dog",)


def test_writing_into_a_target_leaves_the_data_alone(tmp_path):
    data = Voc(write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]}), "train")
    data.target(0).boxes.zero_()
    assert data.target(0).boxes.tolist() == [[0, 0, 9, 9]]


def test_splits_agree_on_classes_and_a_picture_without_objects_stays(tmp_path):
    write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)], "b": []})
    root = write(tmp_path, {"c": [obj("cat", 1, 1, 9, 9)]}, split="val")
    train, val = Voc(root, "train"), Voc(root, "val")
    assert train.classes == val.classes
    assert train.classes.names == ("cat", "dog")
    assert [len(train.target(i)) for i in range(len(train))] == [1, 0]


def test_ids_with_spaces_unicode_endings_and_a_second_column(tmp_path):
    root = write(tmp_path, {"photo 1": [], "zwölf": [], "c": [], "d": []})
    (tmp_path / "ImageSets/Main/train.txt").write_text("photo 1\nzwölf\nc  -1\nd.jpg\n\n", "utf-8")
    data = Voc(root, "train", class_names=("dog",))
    assert [data[i].meta.image_id for i in range(4)] == ["photo 1", "zwölf", "c", "d"]


def test_missing_folders_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere' does not exist\. Set data\.root to a folder with .*JPEGImages"):
        Voc(str(tmp_path / "nowhere"), "train")
    with pytest.raises(DataError, match=r"has no folder 'Annotations'\. Set data\.root"):
        Voc(str(tmp_path), "train")
    root = write(tmp_path, {"a": []})
    with pytest.raises(
        DataError, match=r"no split 'trian': .*trian\.txt' does not exist\. Did you mean 'train'\? .*data\.train"
    ):
        Voc(root, "trian")


def test_an_empty_split_is_an_error(tmp_path):
    root = write(tmp_path, {})
    with pytest.raises(DataError, match=r"train\.txt' lists no images\. Write one id"):
        Voc(root, "train")
    (tmp_path / "ImageSets/Main/train.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.txt' is not UTF-8 text .*Save it as UTF-8"):
        Voc(root, "train")


def test_an_unknown_class_names_file_line_and_neighbour(tmp_path):
    root = write(tmp_path, {"a": [obj("dgo", 1, 1, 9, 9), obj("dog", 1, 1, 9, 9)]})
    with pytest.raises(
        DataError, match=r"a\.xml:4 \(object 1, 'dgo'\): the class 'dgo' is not .* Did you mean 'dog'\?.*data\.broken"
    ):
        Voc(root, "train", class_names=("cat", "dog"))
    data = Voc(root, "train", broken="skip", class_names=("cat", "dog"))
    assert data.target(0).labels.tolist() == [1]
    assert [problem.kind for problem in data.problems.found] == ["unknown class"]


def test_malformed_xml_names_its_line(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)], "b": [obj("dog", 1, 1, 9, 9)]})
    (tmp_path / "Annotations/a.xml").write_text("<annotation>\n<object>\n</annotation>")
    with pytest.raises(
        DataError, match=r"1 problem \(1 x malformed XML\).*a\.xml:3: .*mismatched tag.*Fix the files, or set"
    ):
        Voc(root, "train")
    data = Voc(root, "train", broken="repair")
    assert len(data) == 1
    assert data.problems.found[0].action == "left out the image"


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ("<object>\n<name>dog</name></object>", "<object> has no <bndbox>"),
        ("<object>\n<name>dog</name><bndbox><xmin>1</xmin></bndbox></object>", "<bndbox> has no <ymin>"),
        (obj("dog", 1, "x", 9, 9), "'x' is not a number"),
        ("<object><bndbox></bndbox></object>", "<object> has no <name>"),
    ],
)
def test_malformed_objects_name_file_and_line(tmp_path, element, message):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9), element]})
    with pytest.raises(DataError, match=rf"a\.xml:6 \(object 2, '.*'\): {message}\. Fix"):
        Voc(root, "train")
    data = Voc(root, "train", broken="skip")
    assert len(data.target(0)) == 1
    assert len(data.problems.found) == 1


# width 80, height 60; what remains under "repair" after the conversion to 0-based pixels
BOXES = [
    ((-20, 5, 30, 40), "box outside the image", [0, 4, 30, 40]),
    ((10, 5, 120, 40), "box outside the image", [9, 4, 80, 40]),
    ((100, 5, 120, 40), "box outside the image", None),
    ((30, 5, 10, 40), "inverted box", [9, 4, 30, 40]),
    ((30, 40, 10, 500), "inverted box", [9, 39, 30, 60]),
    ((10, 5, 10, 40), "empty box", None),
    ((10, 5, "nan", 40), "not a number", None),
    ((10, 5, "inf", 40), "not a number", None),
]


@pytest.mark.parametrize(("box", "kind", "repaired"), BOXES)
def test_broken_boxes_under_each_policy(tmp_path, box, kind, repaired):
    root = write(tmp_path, {"a": [obj("dog", *box), obj("dog", 1, 1, 9, 9)]})
    with pytest.raises(
        DataError, match=rf"1 problem \(1 x {kind}\).*a\.xml:4 \(object 1, 'dog'\).*set data\.broken to 'repair'"
    ):
        Voc(root, "train")
    skipped = Voc(root, "train", broken="skip")
    assert skipped.target(0).boxes.tolist() == [[0, 0, 9, 9]]
    assert [(p.kind, p.action) for p in skipped.problems.found] == [(kind, "left out the box")]
    mended = Voc(root, "train", broken="repair")
    assert mended.target(0).boxes.tolist() == [*([repaired] if repaired else []), [0, 0, 9, 9]]
    assert mended.problems.found[0].action.startswith("repaired" if repaired else "left out the box")


def test_an_overshoot_by_rounding_is_clipped_and_counted(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 0, -1, 82, 61.5)]})
    data = Voc(root, "train")
    assert data.target(0).boxes.tolist() == [[0, 0, 80, 60]]
    assert data.problems.rounded == 1
    assert "1 x box over the edge by a rounding error: clipped" in data.problems.summary()


def test_absent_truncated_and_empty_pictures(tmp_path):
    root = write(tmp_path, {name: [obj("dog", 1, 1, 9, 9)] for name in "abcd"})
    (tmp_path / "JPEGImages/a.jpg").unlink()
    (tmp_path / "JPEGImages/b.jpg").write_bytes((tmp_path / "JPEGImages/b.jpg").read_bytes()[:-200])
    (tmp_path / "JPEGImages/c.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"3 problems \(2 x unreadable image, 1 x missing image\).*a\.xml: .*a\.jpg' does not exist"
    ):
        Voc(root, "train")
    for policy in ("skip", "repair"):
        data = Voc(root, "train", broken=policy)
        assert [data[i].meta.image_id for i in range(len(data))] == ["d"]
        assert "2 x unreadable image: left out the image" in data.problems.summary()


def test_damage_in_the_middle_is_found_before_training_unless_the_policy_is_to_fail(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)], "b": []})
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    (tmp_path / "JPEGImages/a.jpg").unlink()
    picture = tmp_path / "JPEGImages/a.png"
    Image.fromarray(noise).save(picture)
    content = picture.read_bytes()
    picture.write_bytes(content[:2000] + bytes(50) + content[2050:])
    data = Voc(root, "train")
    with pytest.raises(DataError, match=r"a\.png' cannot be decoded.*Set data\.broken to 'skip'"):
        data[0]
    assert len(Voc(root, "train", broken="skip")) == 1


def test_no_image_left_is_an_error(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]})
    (tmp_path / "JPEGImages/a.jpg").unlink()
    with pytest.raises(
        DataError,
        match=r"has no image left\. Fix the files: 1 x missing image: .* \(first: .*a\.xml: .*does not exist",
    ):
        Voc(root, "train", broken="skip")


def test_a_missing_annotation_and_a_repeated_id(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]})
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"2 problems .*train\.txt:3: the image 'a' stands in line 1 already"):
        Voc(root, "train")
    data = Voc(root, "train", broken="skip")
    assert len(data) == 1
    assert [problem.kind for problem in data.problems.found] == ["duplicate image", "missing annotation"]


def test_sizes_that_disagree(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 200, 50)], "b": []}, declared=(100, 200))
    with pytest.raises(DataError, match=r"a\.xml: the annotations say 200 x 100 pixels, the image 'a\.jpg' is 80 x 60"):
        Voc(root, "train")
    with pytest.raises(DataError, match="no image left"):
        Voc(root, "train", broken="skip")
    data = Voc(root, "train", broken="repair")
    assert data.target(0).boxes.tolist() == [[0, 0, 80, 50]]
    assert data.size(0) == (60, 80)


def test_a_size_that_is_absent_or_zero_is_taken_from_the_picture(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]}, declared=(0, 0))
    assert Voc(root, "train").size(0) == (60, 80)


def test_a_picture_annotated_before_its_exif_rotation(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)], "b": []}, declared=(60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((60, 80, 3), dtype=np.uint8)).save(tmp_path / "JPEGImages/a.jpg", exif=exif)
    with pytest.raises(DataError, match="its size before its Exif rotation"):
        Voc(root, "train")
    assert len(Voc(root, "train", broken="repair")) == 1
    root = write(tmp_path / "upright", {"a": [obj("dog", 1, 41, 60, 80)]}, declared=(80, 60))
    Image.fromarray(np.zeros((60, 80, 3), dtype=np.uint8)).save(tmp_path / "upright/JPEGImages/a.jpg", exif=exif)
    data = Voc(root, "train")
    assert data[0].image.shape == (80, 60, 3)
    assert data.target(0).boxes.tolist() == [[0, 40, 60, 80]]


def test_a_class_listed_twice_is_an_error(tmp_path):
    root = write(tmp_path, {"a": []})
    with pytest.raises(DataError, match="the class name 'dog' stands twice"):
        Voc(root, "train", class_names=("dog", "dog"))


def test_it_is_built_from_a_config(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]})
    data = datasets.build({"name": "voc", "root": root, "class_names": ["cat", "dog"]}, "data", split="train")
    assert data.target(0).labels.tolist() == [1]


@pytest.mark.skipif(not BCCD.is_dir(), reason="no ../shared/data/bccd")
@pytest.mark.parametrize(
    ("split", "images", "boxes", "broken"),
    [("train", 205, 2804, "BloodImage_00343.xml:50"), ("val", 87, 1137, "BloodImage_00338.xml:158")],
)
def test_the_blood_cells_have_one_broken_box_in_each_split(split, images, boxes, broken):
    with pytest.raises(DataError, match=rf"1 problem \(1 x empty box\).*{broken}"):
        Voc(str(BCCD), split)
    data = Voc(str(BCCD), split, broken="repair")
    assert data.classes.names == ("Platelets", "RBC", "WBC")
    assert len(data) == images
    assert sum(len(data.target(i)) for i in range(images)) == boxes
    assert [problem.kind for problem in data.problems.found] == ["empty box"]
    assert data[0].image.shape == (480, 640, 3)
