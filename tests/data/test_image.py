import numpy as np
import pytest
from PIL import Image

from detkit.data.image import check_image, image_size, read_image, rgb_uint8
from detkit.data.sources import find_images
from detkit.errors import DataError

EXIF_ORIENTATION = 0x0112


def gradient(height=24, width=40):
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width)
    values[..., 1] = np.linspace(0, 255, height)[:, None]
    return values


def save_rotated(path, values, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(values).save(path, exif=exif, quality=95)


def test_colours_are_rgb(tmp_path):
    values = gradient()
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), values)
    assert image_size(str(tmp_path / "a.png")) == (24, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation_is_applied(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    values = gradient()
    save_rotated(path, values, 6)
    upright = np.rot90(values, k=-1)
    assert image_size(path) == check_image(path, decode=True) == (40, 24)
    assert np.abs(read_image(path).astype(int) - upright).max() < 12


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_size_agrees_with_pixels_for_every_orientation(tmp_path, orientation):
    save_rotated(tmp_path / "a.jpg", gradient(), orientation)
    assert read_image(tmp_path / "a.jpg").shape[:2] == image_size(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in {"CMYK", "YCbCr"} else "a.png")
    Image.fromarray(np.full((8, 9, 3), 255, dtype=np.uint8)).convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.shape == (8, 9, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() > 250


def test_alpha_is_dropped_not_blended(tmp_path):
    values = np.full((4, 4, 4), 200, dtype=np.uint8)
    values[..., 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 200).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif' has float32 pixels from 0\.5 .*Convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_a_pillow_image_is_converted_too():
    image = Image.fromarray(gradient()).convert("L")
    assert rgb_uint8(image).shape == (24, 40, 3)
    assert image.mode == "L"


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    for name, message in [
        ("none.jpg", r"none\.jpg' does not exist\. Give the path"),
        ("empty.jpg", r"empty\.jpg' is empty \(0 bytes\)\. Get a whole copy"),
        ("text.jpg", r"text\.jpg' is not a picture .* Convert it"),
    ]:
        for read in (read_image, image_size):
            with pytest.raises(DataError, match=message):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_truncated_pictures_are_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}' .*(cut off|not a picture).*(whole copy|Convert)"):
        check_image(path, decode=True)
    if suffix in {"jpg", "png"}:  # found without a decode of every file
        with pytest.raises(DataError, match="cut off"):
            check_image(path, decode=False)


def test_zeros_after_the_end_of_a_jpeg_are_harmless(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient()).save(path)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert check_image(path, decode=False) == (24, 40)


def test_a_decompression_bomb_is_refused_with_the_limit(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((2000, 2000), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(DataError, match=r"a\.png' has more than 2 million pixels.*Cut it into tiles"):
        read_image(tmp_path / "a.png")


def test_find_images_in_a_file_folder_or_pattern(tmp_path):
    for name in ("10.jpg", "2.JPG", "sub dir/ü 1.png", "notes.txt", "._2.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ["2.JPG", "10.jpg", "sub dir/ü 1.png"]
    assert find_images(str(tmp_path / "10.jpg")) == [tmp_path / "10.jpg"]
    assert find_images(str(tmp_path / "**" / "*.png")) == [tmp_path / "sub dir" / "ü 1.png"]


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"The folder '.*' holds no pictures\. .*\.jpeg"):
        find_images(tmp_path)
    with pytest.raises(DataError, match=r"no match for the pattern, '.*\*\.png'"):
        find_images(str(tmp_path / "*.png"))
