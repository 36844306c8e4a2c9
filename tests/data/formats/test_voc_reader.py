from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.formats.voc import Voc
from detkit.errors import DataError
from detkit.registry import datasets

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"


def obj(name, *box, extra=""):
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object>\n<name>{name}</name>{extra}<bndbox>{tags}</bndbox></object>\n"


def write(root, images, split="train", size=(60, 80), declared=None):
    """A VOC folder; `images` gives the <object> elements of each id."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    height, width = declared or size
    for image_id, objects in images.items():
        Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8)).save(root / "JPEGImages" / f"{image_id}.jpg")
        size_tag = f"<size><width>{width}</width><height>{height}</height></size>"
        head = f"<annotation>\n<filename>elsewhere.jpg</filename>\n{size_tag}"
        (root / "Annotations" / f"{image_id}.xml").write_text(f"{head}\n{''.join(objects)}</annotation>", "utf-8")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images) + "\n", "utf-8")
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


def test_a_sample_carries_its_image_and_meta(tmp_path):
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


def test_objects_of_other_classes_are_dropped_on_request(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9), obj("cat", 1, 1, 9, 9), obj("dog", 1, 1, 5, 5)]})
    with pytest.raises(DataError, match=r"2 x unknown class.* set data\.other_classes to 'drop'"):
        Voc(root, "train", class_names=("cat",))
    data = Voc(root, "train", class_names=("cat",), other_classes="drop")
    assert data.target(0).labels.tolist() == [0]
    assert data.problems.summary() == (
        "no problems\n  2 x object of a class that data.class_names does not list: left out"
    )


def test_splits_agree_on_classes_and_an_image_without_objects_stays(tmp_path):
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
    assert "1 x box outside the image by a rounding error: clipped" in data.problems.summary()


def test_absent_truncated_and_empty_images(tmp_path):
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
    image = tmp_path / "JPEGImages/a.png"
    Image.fromarray(noise).save(image)
    content = image.read_bytes()
    image.write_bytes(content[:2000] + bytes(50) + content[2050:])
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
    with pytest.raises(DataError, match=r"2 problems .*train\.txt:3: the image 'a' is already listed in line 1"):
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


def test_a_size_that_is_absent_or_zero_is_taken_from_the_image(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]}, declared=(0, 0))
    assert Voc(root, "train").size(0) == (60, 80)


def test_an_image_annotated_before_its_exif_rotation(tmp_path):
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
    with pytest.raises(DataError, match="the class name 'dog' is listed twice"):
        Voc(root, "train", class_names=("dog", "dog"))


def test_it_is_built_from_a_config(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]})
    data = datasets.build({"name": "voc", "root": root, "class_names": ["cat", "dog"]}, "data", split="train")
    assert data.target(0).labels.tolist() == [1]


HEAD = "<annotation><size><width>80</width><height>60</height></size>"
BOMB = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "lol"}">' for i in range(10))
XXE = '<!ENTITY secret SYSTEM "file:///etc/passwd">'
HOSTILE = {
    "billion laughs": (f"<!DOCTYPE a [{BOMB}]>{HEAD}{obj('&e9;', 1, 1, 9, 9)}</annotation>", "the entity 'e0'"),
    "external entity": (f"<!DOCTYPE a [{XXE}]>{HEAD}{obj('&secret;', 1, 1, 9, 9)}</annotation>", "the entity 'secret'"),
    "external parameter": (
        f'<!DOCTYPE a [<!ENTITY % x SYSTEM "http://x/y">%x;]>{HEAD}{obj("&z;", 1, 1, 9, 9)}</annotation>',
        "the entity 'x'",
    ),
    "undeclared entity": (
        f'<!DOCTYPE a SYSTEM "a.dtd">{HEAD}{obj("&z;", 1, 1, 9, 9)}</annotation>',
        "the entity 'z'",
    ),
    "deep": ("<annotation>" + "<object>" * 100_000, "nested more than 64 deep"),
    "long": (f"<annotation><a>{'x ' * 9_000_000}</a></annotation>", "more than 16,777,216 bytes"),
    "no element": ("", "no element found"),
    "other root": ("<annotations><image><box/></image></annotations>", "its root is <annotations>"),
    "two sizes": (f"{HEAD}<size><width>9</width></size></annotation>", "<annotation> has 2 <size>"),
    "two widths": ("<annotation><size><width>8</width><width>9</width></size></annotation>", "<size> has 2 <width>"),
    "control character": (HEAD + obj("a\x1bb", 1, 1, 9, 9) + "</annotation>", "invalid token"),
    "NUL": (HEAD + obj("a\0b", 1, 1, 9, 9) + "</annotation>", "cannot be parsed"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_xml_is_one_named_problem(tmp_path, kind):
    content, reason = HOSTILE[kind]
    root = write(tmp_path, {"a": [], "b": [obj("dog", 1, 1, 9, 9)]})
    (tmp_path / "Annotations/a.xml").write_text(content, "utf-8")
    with pytest.raises(DataError, match=rf"1 problem \(1 x malformed XML\).*a\.xml:\d+: .*{reason}"):
        Voc(root, "train")
    assert len(Voc(root, "train", broken="skip")) == 1


ENCODINGS = [
    ("gbk", "GBK", "multi-byte encodings are not supported.*save it as UTF-8"),
    ("gbk", "UTF-8", "not well-formed.*save it as UTF-8"),
    ("latin-1", None, "save it as UTF-8"),
    ("utf-8", "klingon", "unknown encoding"),
    ("utf-8", "utf-16", "encoding"),
    ("utf-8", "base64", "cannot be parsed"),
    ("utf-8", "undefined", "cannot be parsed"),
    ("utf-8", "utf-7", "cannot be parsed"),
    ("utf-8", "idna", "cannot be parsed"),
    ("utf-16", "utf-16", None),
    ("utf-8-sig", "utf-8", None),
    ("latin-1", "iso-8859-1", None),
    ("cp1252", "windows-1252", None),
]


@pytest.mark.parametrize(("encoding", "declared", "reason"), ENCODINGS)
def test_encodings_are_read_or_named_with_their_count(tmp_path, encoding, declared, reason):
    root = write(tmp_path, {"a": [], "b": []})
    first = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    name = "狗" if encoding == "gbk" else "für"
    for image_id in "ab":
        content = f"{first}{HEAD}{obj(name, 1, 1, 9, 9)}</annotation>".encode(encoding)
        (tmp_path / f"Annotations/{image_id}.xml").write_bytes(content)
    if reason is None:
        assert len(Voc(root, "train").target(0)) == 1
    else:
        for policy in ("skip", "repair"):
            with pytest.raises(
                DataError, match=rf"no image left\. Fix the files: 2 x malformed XML: .*a\.xml.*{reason}"
            ):
                Voc(root, "train", broken=policy)


FAULTY_OBJECTS = {
    "polygon as text": ("<object><name>dog</name><bndbox>1,1 9,1 9,9</bndbox></object>", "the text '1,1 9,1 9,9'"),
    "rotated box": (
        "<object><name>dog</name><robndbox><cx>4</cx></robndbox></object>",
        "<object> has no <bndbox>, but <robndbox>",
    ),
    "two boxes": (obj("dog", 1, 1, 9, 9).replace("</object>", "<bndbox/></object>"), "<object> has 2 <bndbox>"),
    "two names": (obj("dog", 1, 1, 9, 9, extra="<name>cat</name>"), "<object> has 2 <name>"),
    "two edges": (obj("dog", 1, 1, 9, 9).replace("</xmin>", "</xmin><xmin>2</xmin>"), "<bndbox> has 2 <xmin>"),
    "a line break": (obj("dog\ncat", 1, 1, 9, 9), "one line of printable text"),
    "an escape": (obj("dog&#x9b;31m", 1, 1, 9, 9), "one line of printable text"),
    "no text": (obj(" ", 1, 1, 9, 9), "one line of printable text"),
    "a hexadecimal number": (obj("dog", "0x1", 1, 9, 9), "'0x1' is not a number"),
    "an underscore": (obj("dog", "1_0", 1, 9, 9), "'1_0' is not a number"),
    "a comma": (obj("dog", "1,5", 1, 9, 9), "'1,5' is not a number"),
    "no number": (obj("dog", "", 1, 9, 9), "'' is not a number"),
    "too large": (obj("dog", "1e400", 1, 9, 9), "not a finite number"),
    "a long text": (obj("dog", "9" * 5000, 1, 9, 9), "not a finite number"),
    "difficult": (obj("dog", 1, 1, 9, 9, extra="<difficult>2</difficult>"), "<difficult> must be 0 or 1"),
    "a rotation": (obj("dog", 1, 1, 9, 9, extra="<rotation>left</rotation>"), "'left' is not a number"),
    "an infinite rotation": (obj("dog", 1, 1, 9, 9, extra="<rotation>1e999</rotation>"), "finite number of degrees"),
    "a list of objects": (f"<objects>{obj('dog', 1, 1, 9, 9)}</objects>", "<objects> holds a <bndbox>"),
    "another letter case": (obj("dog", 1, 1, 9, 9).replace("object", "Object"), "<Object> holds a <bndbox>"),
}


@pytest.mark.parametrize("kind", FAULTY_OBJECTS)
def test_faulty_objects_are_named_and_the_others_stay(tmp_path, kind):
    element, reason = FAULTY_OBJECTS[kind]
    root = write(tmp_path, {"a": [obj("dog", 2, 2, 19, 19), element]})
    with pytest.raises(DataError, match=rf"1 problem .*a\.xml:\d+ \(object 2, '.*'\): .*{reason}"):
        Voc(root, "train")
    data = Voc(root, "train", broken="repair")
    assert data.target(0).boxes.tolist() == [[1, 1, 19, 19]]
    assert data.classes.names == ("dog",)


@pytest.mark.parametrize("text", ["640 px", "1e400", "nan", "-80", "80.5", "0x50"])
def test_a_size_that_is_no_number_is_counted(tmp_path, text):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]}, declared=(60, text))
    data = Voc(root, "train")
    assert data.size(0) == (60, 80)
    assert "1 x size in an XML file that is not a number: read from the image" in data.problems.summary()


@pytest.mark.parametrize("text", ["", "0", " 80 ", "80.0"])
def test_a_size_that_is_absent_or_sound_is_not(tmp_path, text):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9)]}, declared=(60, text))
    assert Voc(root, "train").problems.summary() == "no problems"


@pytest.mark.parametrize(("degrees", "expected"), [("90", [15, 5, 35, 45]), ("180.0", [5, 15, 45, 35]), ("0", None)])
def test_a_rotated_box_becomes_the_upright_one_around_it(tmp_path, degrees, expected):
    pair = f"<attribute><name>rotation</name><value>{degrees}</value></attribute>"
    other = "<attribute><name>occluded</name><value>x</value></attribute>"
    extra = f"<attributes>{other}{pair}</attributes>"
    root = write(tmp_path, {"a": [obj("dog", 6, 16, 45, 35, extra=extra)]})
    data = Voc(root, "train")
    assert data.target(0).boxes[0].tolist() == pytest.approx(expected or [5, 15, 45, 35])
    counted = "1 x rotated box: replaced by the upright box around it" in data.problems.summary()
    assert counted == (degrees == "90")
    assert data.problems.found == []


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG" if path.suffix == ".png" else "JPEG")


def xml(path, filename="elsewhere.jpg", name="dog"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{HEAD}<filename>{filename}</filename>{obj(name, 2, 2, 19, 19)}</annotation>", "utf-8")


def listed(root, *lines):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_bytes("\n".join(lines).encode())
    return str(root)


# images, the path of the XML file and its <filename>, the id in the list, and the file that is the image
FOUND = {
    "sub-folders": (["sub/a.jpg", "a.jpg"], "sub/a", "a.jpg", "sub/a", "sub/a.jpg"),
    "flat next to sub-folders": (["sub/a.jpg", "a.jpg"], "a", "a.jpg", "a", "a.jpg"),
    "deep": (["x/y/z/a.png"], "x/y/z/a", "", "x/y/z/a", "x/y/z/a.png"),
    "image in a sub-folder alone": (["sub/a.jpg"], "a", "", "a", "sub/a.jpg"),
    "annotation in a sub-folder alone": (["a.jpg"], "sub/a", "", "a", "a.jpg"),
    "dotted id": (["sub/a.jpg"], "sub/a", "", "./sub//a.jpg", "sub/a.jpg"),
    "filename between two endings": (["a.jpg", "a.png"], "a", "a.png", "a", "a.png"),
    "path between two endings": (["a.jpg", "a.png"], "a", "C:\\data\\a.png", "a", "a.png"),
    "filename with another ending": (["a.png"], "a", "a.jpg", "a", "a.png"),
    "filename without ending": (["b.png"], "a", "b", "a", "b.png"),
    "filename alone": (["b.png"], "a", "b.png", "a", "b.png"),
    "filename with a folder": (["sub/b.png", "other/b.png"], "a", "sub/b.png", "a", "sub/b.png"),
    "dots in the name": (["a.v1.2.jpg"], "a.v1.2", "", "a.v1.2", "a.v1.2.jpg"),
    "capital letters in the ending": (["a.JPG"], "a", "", "a", "a.JPG"),
    "a file beside it": (["a.txt", "a.jpg", ".a.png"], "a", "", "a", "a.jpg"),
    "an ending that is not known": (["a.img"], "a", "", "a", "a.img"),
    "a second and third column": (["a b.jpg"], "a b", "", "a b\t-1 0", "a b.jpg"),
    "ending and column": (["a.jpg"], "a", "", "a.jpg 1", "a.jpg"),
    "byte order mark and Windows line ends": (["a.jpg"], "a", "", "\ufeffa\r\n\r", "a.jpg"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_image_of_an_id_is_found(tmp_path, kind):
    images, annotation, filename, line, expected = FOUND[kind]
    for seed, name in enumerate(images):
        image(tmp_path / "JPEGImages" / name, seed)
    xml(tmp_path / f"Annotations/{annotation}.xml", filename)
    data = Voc(listed(tmp_path, line), "train")
    assert len(data) == 1
    assert Path(data.source(0)) == tmp_path / "JPEGImages" / expected
    assert data.problems.summary() == "no problems"


UNCLEAR = {
    "two endings": (["a.jpg", "a.png"], ["a"], "ambiguous image", "may be any of .*a.jpg', .*a.png'"),
    "two sub-folders": (["x/a.jpg", "y/a.jpg"], ["a"], "ambiguous image", "x/a.jpg', .*y/a.jpg'"),
    "two annotations": (["a.jpg"], ["x/a", "y/a"], "ambiguous annotation", "x/a.xml', .*y/a.xml'"),
    "none": (["b.jpg"], ["a", "b"], "missing image", "a.jpg' does not exist"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_an_image_that_is_not_clear_is_a_problem(tmp_path, kind):
    images, annotations, problem, message = UNCLEAR[kind]
    for seed, name in enumerate(images):
        image(tmp_path / "JPEGImages" / name, seed)
    for name in annotations:
        xml(tmp_path / f"Annotations/{name}.xml", filename="b.jpg")  # copied from another image
    with pytest.raises(DataError, match=rf"1 problem \(1 x {problem}\).*{message}"):
        Voc(listed(tmp_path, "a"), "train")


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "..", "sub/../../a", "../Annotations/a"])
def test_an_id_that_leads_out_of_the_data_is_refused(tmp_path, line):
    image(tmp_path / "JPEGImages/b.jpg")
    xml(tmp_path / "Annotations/b.xml")
    root = listed(tmp_path, line, "b")
    with pytest.raises(
        DataError, match=r"1 x path out of the data.*train\.txt:1: the id '.*' refers to a file outside"
    ):
        Voc(root, "train")
    assert len(Voc(root, "train", broken="skip")) == 1


@pytest.mark.parametrize("line", ["# a comment", "a" * 300, "a\0b", "ghost 1"])
def test_an_id_without_annotation_is_named(tmp_path, line):
    image(tmp_path / "JPEGImages/b.jpg")
    xml(tmp_path / "Annotations/b.xml")
    root = listed(tmp_path, line, "", "  ", "b")
    with pytest.raises(DataError, match=r"has 1 problem \(1 x (missing annotation|malformed XML)\)"):
        Voc(root, "train")
    assert len(Voc(root, "train", broken="skip")) == 1


def test_annotations_that_no_list_names_are_counted(tmp_path):
    root = write(tmp_path, {"a": [], "b": []}, split="val")
    write(tmp_path, {"c": [], "d": []}, split="train")
    for name in "efg":
        xml(tmp_path / f"Annotations/{name}.xml", name="cat")
    (tmp_path / "Annotations/._a.xml").write_bytes(b"\0\1")  # which macOS leaves about
    data = Voc(root, "train")
    assert "3 x annotation file that is not listed in ImageSets/Main: not used (first: " in data.problems.summary()
    assert data.problems.found == []


def test_folders_that_link_in_a_circle_end(tmp_path):
    image(tmp_path / "JPEGImages/sub/a.jpg")
    xml(tmp_path / "Annotations/sub/a.xml")
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder / "sub/loop").symlink_to(tmp_path / folder)
    assert Voc(listed(tmp_path, "sub/a"), "train").problems.summary() == "no problems"


def test_exchanged_sides_are_named_and_repaired_where_all_boxes_fit(tmp_path):
    objects = {"a": [obj("dog", 1, 1, 70, 50)], "b": [obj("dog", 1, 1, 50, 70)], "c": []}
    root = write(tmp_path, objects, declared=(80, 60))
    for name in "abc":
        (tmp_path / f"JPEGImages/{name}.jpg").unlink()
        image(tmp_path / f"JPEGImages/{name}.png", ord(name))
    for policy in ("fail", "skip"):
        with pytest.raises(DataError, match=r"3 (x|problems).*width and height are swapped") as error:
            Voc(root, "train", broken=policy)
        assert "Exif" not in str(error.value)
    data = Voc(root, "train", broken="repair")
    assert [data.image_id(index) for index in range(len(data))] == ["a", "c"]
    assert data.target(0).boxes.tolist() == [[0, 0, 70, 50]]
    assert [problem.action for problem in data.problems.found] == [
        "repaired: used the size of the image, which all boxes fit",
        "left out the image",
        "repaired: used the size of the image, which all boxes fit",
    ]


def test_an_object_that_stands_twice_counts_once(tmp_path):
    root = write(tmp_path, {"a": [obj("dog", 1, 1, 9, 9), obj("cat", 1, 1, 9, 9), obj("dog", 1, 1, 9, 9)]})
    data = Voc(root, "train")
    assert len(data.target(0)) == 2
    assert "1 x duplicate object: left out the box (first: " in data.problems.summary()


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
