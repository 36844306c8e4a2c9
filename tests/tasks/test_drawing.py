"""Images: what is drawn where, in which colours, and what is left untouched."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.errors import DetkitError
from detkit.structures import Detections, Target
from detkit.tasks.drawing import MASK_OPACITY, compare, draw_detections, draw_targets, grid, write_image

RED = (230, 25, 75)  # of label 0
GREEN = (60, 180, 75)  # of label 1
GREY = 128


def blank(height: int = 480, width: int = 640) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def detections_at(*boxes: tuple[int, ...], labels: list[int] | None = None, names: tuple[str, ...] = ()) -> Detections:
    labels_ = torch.tensor(labels or [0] * len(boxes))
    return Detections(torch.tensor(boxes).float(), torch.full((len(boxes),), 0.93), labels_, class_names=names)


def drawn(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that are no longer blank."""
    return (image != GREY).any(2)


def has_color(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (image == color).all(2)


def test_boxes_and_labels_have_the_colour_of_their_class_in_rgb() -> None:
    found = detections_at((100, 100, 200, 200), (300, 300, 400, 400), labels=[0, 1], names=("cat", "dog"))
    image = draw_detections(blank(), found)
    assert has_color(image, RED)[150, 100]
    assert has_color(image, GREEN)[350, 300]
    # The label stands right above its box.
    assert has_color(image, RED)[85:99, 100:160].any()
    assert not drawn(image)[210:275].any()


def test_the_image_given_is_untouched() -> None:
    image = blank()
    found = detections_at((10, 10, 600, 400))
    target = Target(found.boxes, found.labels)
    for picture in (
        draw_detections(image, found),
        draw_targets(image, target, ["cat"]),
        draw_detections(image, Detections.empty()),
        draw_targets(image, Target.empty(), []),
        grid([image], 1),
    ):
        assert not np.shares_memory(picture, image)
        picture[:] = 0
    assert not drawn(image).any()


def test_a_read_only_or_strided_image_is_drawn_too() -> None:
    image = np.full((640, 480, 3), GREY, dtype=np.uint8).transpose(1, 0, 2)
    image.setflags(write=False)
    assert drawn(draw_detections(image, detections_at((10, 10, 600, 400)))).any()


@pytest.mark.parametrize("box", [(0, 0, 640, 480), (600, 0, 640, 30), (0, 460, 30, 480), (639, 479, 640, 480)])
def test_labels_and_lines_stay_inside_the_image(box: tuple[int, ...]) -> None:
    # The text is as wide in the middle of the image, where nothing can be cut off.
    names = ("a rather long name",)
    middle = has_color(draw_detections(blank(), detections_at((300, 200, 301, 201), names=names)), RED).sum()
    at_border = has_color(draw_detections(blank(), detections_at(box, names=names)), RED)
    assert at_border.sum() > 0.9 * middle
    if box == (0, 0, 640, 480):
        assert at_border[:, 0].mean() > 0.9
        assert at_border[:, -1].mean() > 0.9
        assert at_border[-1].mean() > 0.9


def test_lines_and_text_grow_with_the_image() -> None:
    def shares(scale: int) -> float:
        image = draw_detections(
            blank(480 * scale, 640 * scale), detections_at((100 * scale, 100 * scale, 300 * scale, 300 * scale))
        )
        return float(drawn(image).mean())

    # Lines of the same width in both would cover a sixth of the share.
    assert shares(6) == pytest.approx(shares(1), rel=0.4)


def test_scores_can_be_left_out() -> None:
    found = detections_at((100, 100, 400, 400), names=("cat",))
    with_scores, without = (
        drawn(draw_detections(blank(), found)),
        drawn(draw_detections(blank(), found, show_scores=False)),
    )
    assert with_scores.sum() > without.sum()


def test_the_best_score_is_on_top() -> None:
    boxes = torch.tensor([[100.0, 100, 300, 300]] * 2)
    for scores in ([0.9, 0.5], [0.5, 0.9]):
        best = int(np.argmax(scores))
        image = draw_detections(blank(), Detections(boxes, torch.tensor(scores), torch.tensor([0, 1])))
        assert has_color(image, (RED, GREEN)[best])[200, 100]


def test_ignored_targets_show_their_corners_only() -> None:
    box = torch.tensor([[100.0, 100, 400, 400]])
    label, flag = torch.tensor([0]), torch.tensor([True])
    plain = draw_targets(blank(), Target(box, label), ["cat"])
    for ignored in (Target(box, label, crowd=flag), Target(box, label, difficult=flag)):
        marked = draw_targets(blank(), ignored, ["cat"])
        assert has_color(plain, RED)[250, 100]
        assert has_color(marked, RED)[395, 100]
        assert not drawn(marked)[250, 100]
        # "cat (crowd)" is longer than "cat".
        assert has_color(marked, RED)[90].sum() > has_color(plain, RED)[90].sum()


def with_masks(*boxes: tuple[int, int, int, int]) -> tuple[Detections, np.ndarray]:
    """Objects of one class, the first with the best score; the mask of each is the middle of its box, (N, H, W)."""
    masks = np.zeros((len(boxes), 480, 640), dtype=bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top + 20 : bottom - 20, left + 20 : right - 20] = True
    found = replace(detections_at(*boxes), scores=torch.linspace(0.9, 0.1, len(boxes)), masks=torch.from_numpy(masks))
    return found, masks


def mixed(color: tuple[int, int, int]) -> np.ndarray:
    """What becomes of the grey ground below a mask."""
    return np.round(MASK_OPACITY * np.array(color) + (1 - MASK_OPACITY) * GREY)


def test_each_object_with_a_mask_has_a_colour_of_its_own() -> None:
    found, masks = with_masks((50, 100, 250, 300), (300, 100, 500, 300))
    image = draw_detections(blank(), found)
    for index, color in enumerate((RED, GREEN)):
        inside = image[masks[index]]
        assert (np.abs(inside - mixed(color)) <= 1).all(axis=1).mean() > 0.9
        # Its outline, its box and its label have the full colour.
        left = 50 + 250 * index
        assert has_color(image, color)[200, [left, left + 20]].all()
        assert has_color(image, color)[85:99, left : left + 40].any()
        # Inside of the box, outside of the mask, the image is as it was.
        assert not drawn(image)[120:280, left + 5 : left + 15].any()


def test_the_best_object_keeps_its_colour_when_others_go() -> None:
    found, _ = with_masks((50, 100, 250, 300), (300, 100, 500, 300), (520, 100, 620, 300))
    for count in (1, 2, 3):
        assert has_color(draw_detections(blank(), found[torch.arange(count)]), RED)[200, 70]


def test_target_and_detections_show_masks_side_by_side() -> None:
    found, masks = with_masks((50, 100, 250, 300), (300, 100, 500, 300))
    target = Target(found.boxes, found.labels, masks=found.masks)
    image = compare(blank(), found, target, ["cat"])[-480:]
    for half in (image[:, :640], image[:, -640:]):
        assert drawn(half)[masks.any(0)].all()


def test_ignored_masks_are_outlines_only() -> None:
    found, masks = with_masks((50, 100, 250, 300), (300, 100, 500, 300))
    target = Target(found.boxes, found.labels, crowd=torch.tensor([True, False]), masks=found.masks)
    image = draw_targets(blank(), target, ["cat"])
    assert drawn(image)[200, 70]
    assert not drawn(image)[150:250, 100:200].any()
    assert drawn(image)[masks[1]].all()


def test_empty_masks_and_no_masks_are_drawn() -> None:
    found, _ = with_masks((50, 100, 250, 300))
    nothing = replace(found, masks=torch.zeros(1, 480, 640, dtype=torch.bool))
    assert has_color(draw_detections(blank(), nothing), RED)[200, 50]
    assert not drawn(draw_detections(blank(), nothing))[150:250, 60:240].any()
    assert not drawn(draw_detections(blank(), found[torch.zeros(0, dtype=torch.int64)])).any()


def test_masks_of_another_size_are_refused() -> None:
    found, _ = with_masks((50, 100, 250, 300))
    with pytest.raises(ValueError, match=r"the masks are \(480, 640\), but the image is \(480, 600\)"):
        draw_detections(blank(480, 600), found)


def test_eighty_classes_have_eighty_colours_that_depend_on_the_label_alone() -> None:
    colors = {}
    for label in range(80):
        colors[label] = tuple(draw_detections(blank(), detections_at((100, 100, 400, 400), labels=[label]))[250, 100])
    assert len(set(colors.values())) == 80
    both = draw_detections(blank(), detections_at((100, 100, 200, 200), (300, 100, 400, 200), labels=[79, 21]))
    assert tuple(both[150, 100]) == colors[79]
    assert tuple(both[150, 300]) == colors[21]


def test_names_beyond_ascii_are_drawn_each_differently() -> None:
    images = [
        draw_detections(blank(), detections_at((100, 100, 400, 400), names=(name,))) for name in ("é", "ß", "Ж", "Ω")
    ]
    for index, image in enumerate(images):
        assert all((image != other).any() for other in images[:index])


def test_a_name_that_no_font_has_becomes_the_number_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    private_use = "\U0010fffd"  # no font has a glyph for it
    with caplog.at_level(logging.WARNING):
        odd = draw_detections(blank(), detections_at((100, 100, 400, 400), names=(private_use,)))
    assert "No font" in caplog.text
    np.testing.assert_array_equal(odd, draw_detections(blank(), detections_at((100, 100, 400, 400), names=("0:",))))


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (300, 8)])
def test_tiny_images_and_many_objects_are_drawn(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    corner = torch.tensor(rng.uniform(0, max(size), (200, 2))).float()
    found = Detections(torch.cat([corner, corner + 5], 1), torch.rand(200), torch.randint(50, (200,)))
    assert draw_detections(blank(*size), found).shape == (*size, 3)


def test_compare_has_the_target_on_the_left() -> None:
    found = detections_at((300, 300, 400, 400), labels=[1])
    target = Target(torch.tensor([[300.0, 300, 400, 400]]), torch.tensor([0]))
    image = compare(blank(), found, target, ["cat", "dog"])
    assert image.shape[0] > 480
    assert image.shape[1] > 1280
    assert has_color(image[:, :640], RED).any()
    assert not has_color(image[:, :640], GREEN).any()
    assert has_color(image[:, -640:], GREEN).any()
    assert not has_color(image[:, -640:], RED).any()


def test_grid_keeps_every_pixel_of_images_of_different_sizes() -> None:
    images = [np.full((20 + 10 * k, 60 - 10 * k, 3), 50 * (k + 1), dtype=np.uint8) for k in range(5)]
    sheet = grid(images, 3)
    assert sheet.shape == (2 * 64, 3 * 64, 3)
    for k, image in enumerate(images):
        row, column = divmod(k, 3)
        cell = sheet[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        assert has_color(cell, (50 * (k + 1),) * 3).sum() == image.shape[0] * image.shape[1]
    assert grid(images[:2], 8).shape[1] == 2 * 64


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".JPG", ".jpeg", ".webp"])
def test_a_written_image_reads_back_in_rgb(tmp_path: Path, suffix: str) -> None:
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[:] = (200, 100, 30)
    path = tmp_path / "made" / f"image{suffix}"
    write_image(path, image)
    np.testing.assert_allclose(np.asarray(Image.open(path).convert("RGB"), dtype=int), image, atol=4)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DetkitError, match=r"image\.xyz: the suffix '\.xyz' is not a supported image format"):
        write_image(tmp_path / "image.xyz", blank())
    with pytest.raises(DetkitError, match="the suffix '' is not a supported image format"):
        write_image(tmp_path / "image", blank())
    (tmp_path / "file").write_text("")
    with pytest.raises(DetkitError, match=r"file' cannot be written: File exists"):
        write_image(tmp_path / "file" / "image.png", blank())


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros((5, 5), dtype=np.uint8), np.zeros((5, 5, 3)), np.zeros((3, 5, 5), dtype=np.uint8)):
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
            draw_detections(wrong, Detections.empty())
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
            write_image(tmp_path / "a.png", wrong)
    with pytest.raises(ValueError, match="at least one column"):
        grid([], 2)
    with pytest.raises(ValueError, match="at least one column"):
        grid([blank()], 0)


def test_many_labels_stay_at_their_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving labels apart takes time that grows with the square of their number."""
    import supervision

    moved = []
    original = supervision.RichLabelAnnotator.__init__

    def record(self: Any, *arguments: Any, **options: Any) -> None:
        moved.append(options["smart_position"])
        original(self, *arguments, **options)

    monkeypatch.setattr(supervision.RichLabelAnnotator, "__init__", record)
    for count in (100, 101):
        boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(count, 1)
        found = Detections(boxes, torch.full((count,), 0.5), torch.zeros(count, dtype=torch.int64))
        draw_detections(np.zeros((60, 60, 3), dtype=np.uint8), found)
    assert moved == [True, False]
