"""Training images decoded at a fraction of their sides: the same images and ground truth, only smaller."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detkit.config import InputOptions
from detkit.data import dataset as reading
from detkit.data.augment.warping import RandomWarp, warp_points
from detkit.data.cache import with_cache
from detkit.data.formats.coco import Coco
from detkit.data.formats.crops import Crops
from detkit.data.formats.semantic_masks import MaskFolders
from detkit.data.formats.shapes import Shapes
from detkit.data.image import is_jpeg, read_image
from detkit.data.jpeg_scaling import ReducedDataset, reduction_of, with_reduced_decoding
from detkit.data.transforms import Augment, Fit
from detkit.engine.train import train
from detkit.errors import DataError

EXIF_ORIENTATION = 0x0112
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
BOXES = [(16, 24, 144, 120), (160, 40, 304, 200), (32, 160, 128, 224)]
SIZE = (240, 320)
INPUT = InputOptions(size=(60, 80))  # a quarter: 1/2 leaves twice as many pixels along each axis


def photograph(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: blurred noise, as in a photograph stronger in brightness than in colour."""
    random = np.random.default_rng(0)
    image = torch.full((3, height, width), 128.0)
    for channels, strength in ((1, 90.0), (3, 30.0)):
        noise = torch.from_numpy(random.uniform(-strength, strength, (1, channels, height // 8, width // 8)))
        image = image + F.interpolate(noise, (height, width), mode="bicubic")[0]
    return image.clamp(0, 255).permute(1, 2, 0).round().numpy().astype(np.uint8)


def averaged(pixels: np.ndarray, reduction: int) -> np.ndarray:
    """The mean of each square of pixels, those at the edge filled up with its pixels."""
    height, width = pixels.shape[:2]
    rows, columns = -height % reduction, -width % reduction
    whole = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge").astype(float)
    squares = whole.reshape(whole.shape[0] // reduction, reduction, whole.shape[1] // reduction, reduction, 3)
    return squares.mean((1, 3))


def painted(size: tuple[int, int] = SIZE) -> np.ndarray:
    """A black image whose three objects have colours of their own."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for colour, (left, top, right, bottom) in zip(COLOURS, BOXES):
        image[top:bottom, left:right] = colour
    return image


def coco(root: Path, name: str = "a.jpg", size: tuple[int, int] = SIZE, split: str = "train", **options: Any) -> Coco:
    """A data set of one painted image, with masks and points; of points, each object's corners."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    Image.fromarray(painted(size)).save(root / split / name, quality=95, subsampling=0)
    annotations = [
        {
            "id": number,
            "image_id": 5,
            "category_id": 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": 1000.0 * number,
            "iscrowd": 0,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            "keypoints": [left, top, 2, right, bottom, 1],
        }
        for number, (left, top, right, bottom) in enumerate(BOXES, start=1)
    ]
    content = {
        "images": [{"id": 5, "file_name": name, "height": size[0], "width": size[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing", "keypoints": ["start", "end"]}],
    }
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return Coco(str(root), split, **options)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("size", [(160, 240), (161, 247), (167, 233)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_reduced_jpeg_is_about_the_mean_of_the_pixels(
    tmp_path: Path, reduction: int, size: tuple[int, int], options: dict[str, Any]
) -> None:
    Image.fromarray(photograph(*size)).save(tmp_path / "a.jpg", quality=95, **options)
    expected = averaged(read_image(tmp_path / "a.jpg"), reduction)
    found = read_image(tmp_path / "a.jpg", reduction)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1
    # Even one pixel of the whole image to the side, it would be another.
    moved = averaged(np.roll(read_image(tmp_path / "a.jpg"), 1, axis=1), reduction)
    assert np.abs(found - moved).mean() > 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(photograph(160, 240)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found, expected = read_image(tmp_path / "a.jpg", 4), averaged(read_image(tmp_path / "a.jpg"), 4)
    assert np.abs(found - expected).mean() < 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_are_reduced_too(tmp_path: Path, mode: str) -> None:
    Image.fromarray(photograph(160, 240)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    found, expected = read_image(tmp_path / "a.jpg", 2), averaged(read_image(tmp_path / "a.jpg"), 2)
    assert np.abs(found - expected).mean() < 1


def test_other_formats_keep_their_size(tmp_path: Path) -> None:
    pixels = photograph(64, 96)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 8), pixels)
    assert not is_jpeg(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    assert not is_jpeg(tmp_path / "b.jpg"), "the name decided"
    with pytest.raises(DataError, match=r"none\.jpg' cannot be read \(No such file"):
        is_jpeg(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("size", "fit", "zoom", "expected"),
    [
        ((400, 800), Fit((100, 200)), 1.0, 2),
        ((399, 800), Fit((100, 200)), 1.0, 2),  # of which a half is 200 rows, rounded up
        ((398, 800), Fit((100, 200)), 1.0, 1),
        ((400, 798), Fit((100, 200)), 1.0, 1),
        ((800, 1600), Fit((100, 200)), 1.0, 4),
        ((1600, 3200), Fit((100, 200)), 1.0, 8),
        ((9000, 9000), Fit((100, 200)), 1.0, 8),
        ((800, 1600), Fit((100, 200)), 2.0, 4),
        ((800, 1600), Fit((100, 200)), 2.1, 2),
        ((800, 1600), Fit((100, 200)), 4.1, 1),
        ((9000, 9000), Fit((100, 200)), float("inf"), 1),
        ((400, 100), Fit((100, 100), "letterbox"), 1.0, 2),
        ((100, 390), Fit((100, 100), "letterbox"), 1.0, 1),
        ((400, 600), Fit((100, 300), "short_side"), 1.0, 2),
        ((400, 3000), Fit((100, 300), "short_side"), 1.0, 4),
        ((4000, 4000), Fit((100, 100), "crop"), 1.0, 1),
    ],
)
def test_twice_the_input_and_what_is_cut_out_is_left(
    size: tuple[int, int], fit: Fit, zoom: float, expected: int
) -> None:
    assert reduction_of(size, fit, zoom) == expected


def test_the_largest_of_several_inputs_counts(tmp_path: Path) -> None:
    data = coco(tmp_path, size=(512, 1024))
    for largest, expected in ((1.0, (128, 256)), (2.0, (256, 512)), (2.5, (512, 1024))):
        options = InputOptions(size=(64, 128), multi_scale=(0.5, largest))
        assert with_reduced_decoding(data, options, ())[0].size(0) == expected


@pytest.mark.parametrize("size", [SIZE, (239, 319), (253, 327)])
def test_target_stays_with_its_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    whole = coco(tmp_path, size=size, masks=True, points=True)
    reduced, line = with_reduced_decoding(whole, INPUT, ())
    assert line == "1 of 1 training images at reduced size (1/2: 1), since the input is much smaller"
    sample, original = reduced[0], whole[0]
    assert sample.size == reduced.size(0) == sample.meta.size == (-(-size[0] // 2), -(-size[1] // 2))
    assert (sample.meta.image_id, sample.meta.source) == (5, original.meta.source)
    assert np.array_equal(sample.meta.matrix, np.eye(3))  # type: ignore[arg-type]
    assert torch.equal(sample.target.boxes, original.target.boxes / 2)
    assert torch.equal(sample.target.area, original.target.area / 4)
    assert torch.equal(sample.target.points, original.target.points / 2)  # type: ignore[operator, arg-type]
    assert torch.equal(sample.target.visible, original.target.visible)  # type: ignore[arg-type]
    assert torch.equal(sample.target.labels, original.target.labels)
    for channel, (mask, box) in enumerate(zip(sample.target.masks, sample.target.boxes.int())):  # type: ignore[arg-type]
        left, top, right, bottom = box.tolist()
        expected = np.zeros(sample.size, dtype=bool)
        expected[top:bottom, left:right] = True
        assert np.array_equal(mask.numpy(), expected)
        assert np.array_equal(sample.image[..., channel] > 127, expected)
    again = reduced.target(0)
    assert torch.equal(again.boxes, sample.target.boxes)
    assert torch.equal(again.masks, sample.target.masks)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_target_is_at_most_a_pixel_off_where_exif_data_turn_odd_sizes(tmp_path: Path, reduction: int) -> None:
    whole = coco(tmp_path, size=(233, 315))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    Image.fromarray(painted((233, 315))[::-1, ::-1]).save(tmp_path / "train/a.jpg", exif=exif, quality=95)
    sample = ReducedDataset(whole, np.array([reduction], dtype=np.uint8))[0]
    for channel, box in enumerate(sample.target.boxes.numpy()):
        rows, columns = np.nonzero(sample.image[..., channel] > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(seen - box).max() <= 1.5


def test_a_semantic_map_stays_with_its_pixels(tmp_path: Path) -> None:
    for folder in ("images/train", "masks/train"):
        (tmp_path / folder).mkdir(parents=True)
    labels = np.zeros((253, 327), dtype=np.uint8)
    for label, (left, top, right, bottom) in enumerate(BOXES, start=1):
        labels[top:bottom, left:right] = label
    labels[:8] = 255
    Image.fromarray(painted((253, 327))).save(tmp_path / "images/train/a.jpg", quality=95, subsampling=0)
    Image.fromarray(labels).save(tmp_path / "masks/train/a.png")
    whole = MaskFolders(str(tmp_path), "train", ("none", "a", "b", "c"))
    sample = with_reduced_decoding(whole, INPUT, ())[0][0]
    assert sample.size == (127, 164)
    semantic = sample.target.semantic
    assert semantic is not None
    assert (semantic[:4] == 255).all()
    for channel in range(3):
        assert np.array_equal((semantic == channel + 1).numpy(), sample.image[..., channel] > 127)


def test_what_is_small_no_jpeg_or_no_file_stays_as_it_is(tmp_path: Path) -> None:
    jpeg, png = coco(tmp_path / "jpeg"), coco(tmp_path / "png", name="a.png")
    drawn = Shapes("train", 4, 2, 256)
    crops = Crops("train", {"name": "coco", "root": str(tmp_path / "jpeg")})
    for dataset, options in [
        (png, INPUT),
        (jpeg, InputOptions(size=(120, 80))),
        (jpeg, InputOptions(size=(60, 80), resize="crop")),
        (jpeg, InputOptions(size=(64, 64), multi_scale=(0.5, 2.0))),
        (drawn, INPUT),
        (crops, InputOptions(size=(10, 10))),
    ]:
        assert with_reduced_decoding(dataset, options, ()) == (dataset, "")


def test_a_class_that_reads_in_a_way_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Inverted(Coco):
        def __getitem__(self, index: int) -> Any:
            raise NotImplementedError

    coco(tmp_path)
    inverted = Inverted(str(tmp_path), "train")
    assert with_reduced_decoding(inverted, INPUT, ()) == (inverted, "")


def test_augmentations_that_do_not_say_how_far_they_zoom_leave_images_whole(tmp_path: Path) -> None:
    data = coco(tmp_path)
    for part in ("RandomCrop", "GaussianBlur"):
        options = {"height": 40, "width": 40} if part == "RandomCrop" else {}
        augment = [{"name": "flip"}, {"name": "albumentations", "transform": part, "options": options}]
        stretched = with_reduced_decoding(data, INPUT, augment)
        if part == "RandomCrop":
            assert stretched[0] is data
            assert stretched[1].startswith("full size, although 1 of 1 training images are much larger than the input")
        else:  # after the resize
            assert isinstance(stretched[0], ReducedDataset)
        assert with_reduced_decoding(data, InputOptions(size=(60, 80), resize="short_side"), augment)[0] is data


@pytest.mark.parametrize(
    ("part", "tight"),
    [
        ({"name": "flip", "vertical": 0.5}, True),
        ({"name": "expand"}, True),
        ({"name": "zoom_crop", "min_scale": 0.4, "probability": 1.0}, True),
        ({"name": "iou_crop", "min_scale": 0.3}, True),
        ({"name": "random_resized_crop"}, True),
        ({"name": "random_resized_crop", "area": [0.3, 0.5], "ratio": [0.9, 1.1]}, False),
        ({"name": "perspective", "rotation": 0, "translation": 0, "shear": 0, "perspective": 0}, True),
    ],
)
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (200, 600)])
def test_no_part_of_an_image_becomes_larger_than_an_augmentation_says(
    part: dict[str, Any], tight: bool, size: tuple[int, int]
) -> None:
    augment = Augment([part], Fit((100, 100)))
    bound = augment.largest_zoom(size)
    assert augment.largest_zoom(size) >= 1
    # The channels of the image are its coordinates: how fast they change says how large it has become.
    rows, columns = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]), indexing="ij")
    image = np.stack([rows, columns, np.full(size, 255.0)], axis=-1).round().astype(np.uint8)
    largest = 0.0
    for seed in range(300):
        augment.pipeline.set_random_seed(seed)
        found = augment.pipeline(image=image, bboxes=np.zeros((0, 5)), proposals=np.zeros((0, 5)))["image"].astype(int)
        inside = found[..., 2] > 250
        for axis in (0, 1):
            values = found[..., axis][inside]
            share = (values.max() - values.min()) / 255
            seen = np.ptp(np.nonzero(inside)[axis]) / 99
            largest = max(largest, seen / share)
    assert largest <= 1.05 * bound
    assert not tight or size[0] * 2 < size[1] or largest >= 0.7 * bound


@pytest.mark.parametrize("seed", range(10))
def test_a_homography_enlarges_nothing_more_than_it_says(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = (int(random.integers(50, 400)), int(random.integers(50, 400)))
    warp = RandomWarp("perspective", 180.0, 0.1, (0.5, 1.5), random.uniform(0, 20), random.uniform(0, 0.3))
    grid = np.stack(np.meshgrid(np.linspace(0, size[1], 9), np.linspace(0, size[0], 9)), -1).reshape(-1, 2)
    largest = 0.0
    for _ in range(200):
        matrix = warp.draw(random, size, size)
        step = 1e-4
        across, down = (
            (warp_points(grid + np.array(shift), matrix) - warp_points(grid, matrix)) / step
            for shift in ((step, 0.0), (0.0, step))
        )
        largest = max(largest, np.linalg.norm(np.stack([across, down], -1), 2, axis=(1, 2)).max())
    assert 0.4 * warp.largest_zoom(size) < largest <= warp.largest_zoom(size) * 1.0001


def test_zooms_multiply_and_mixes_have_theirs() -> None:
    fit = Fit((100, 100))
    assert Augment([], fit).largest_zoom((300, 300)) == 1
    both = [{"name": "iou_crop", "min_scale": 0.5}, {"name": "mixup", "scale": [0.5, 1.5]}]
    assert Augment(both, fit).largest_zoom((300, 300)) == pytest.approx(3)
    assert Augment([{"name": "mosaic", "scale": [0.1, 2.0]}], fit).largest_zoom((300, 300)) == 1


def test_a_cache_keeps_reduced_images_for_training_and_whole_ones_for_validation(tmp_path: Path) -> None:
    train_set, val_set = coco(tmp_path), coco(tmp_path, split="val")
    reduced = with_reduced_decoding(train_set, INPUT, ())[0]
    cached, cached_val, _ = with_cache(reduced, val_set, "memory", 10**6, tmp_path)
    for _ in range(2):
        assert np.array_equal(cached[0].image, reduced[0].image)
        assert cached[0].meta.size == (120, 160)
        assert torch.equal(cached[0].target.boxes, reduced.target(0).boxes)
        assert np.array_equal(cached_val[0].image, val_set[0].image)
        assert cached_val[0].meta.size == SIZE


def test_broken_and_changed_images_are_named(tmp_path: Path) -> None:
    whole = coco(tmp_path)
    reduced = with_reduced_decoding(whole, INPUT, ())[0]
    path = tmp_path / "train/a.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    messages = []
    for dataset in (whole, reduced):
        with pytest.raises(DataError, match=r"a\.jpg' cannot be decoded.*Set data\.broken to 'skip'") as caught:
            dataset[0]
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    Image.fromarray(painted()).save(path, format="png")
    with pytest.raises(DataError, match=r"a\.jpg' was 320 x 240 pixels .* has changed .*now 320 x 240 .* at 1/2\)"):
        reduced[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_training_reads_reduced_images_and_validation_whole_ones(
    tiny: Any, tmp_path: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        coco(tmp_path, size=(256, 320), split=split)
    read: list[tuple[str, int]] = []
    original = reading.read_image

    def recorded(path: str, reduction: int) -> np.ndarray:
        read.append((Path(path).parent.name, reduction))
        return original(path, reduction)

    monkeypatch.setattr(reading, "read_image", recorded)
    data = f"{{name: coco, root: {tmp_path}, allow_leaks: true}}"  # both splits have the same image
    train(tiny("--data", data, "--train.reduced_decoding", str(wanted), "--train.epochs", "1"))
    assert set(read) == {("train", 2 if wanted else 1), ("val", 1)}
    assert ("decoding   1 of 1 training images" in capsys.readouterr().out) == wanted
