"""Masks on their way: run lengths, augmentation, fitting, and from the network's patches back to the source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as reference
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detkit.data.formats.coco import Coco
from detkit.data.masks import _drawable, area, decode, encode, rle_from_polygons, tight_box
from detkit.data.transforms import Augment, Fit, undo
from detkit.structures import Detections, Meta, Sample, Target

PEDESTRIANS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pennfudan"


def test_run_lengths_equal_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = rng.integers(1, 12, 2)
        mask = rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 0.9, 1])
        mask[:, : rng.integers(0, width)] &= rng.random() < 0.5
        rle = encode(mask)
        expected = reference.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert rle == {"size": [height, width], "counts": expected["counts"].decode()}
        assert area(rle) == mask.sum()
        assert (decode([rle, rle], (height, width)) == mask).all()


@pytest.mark.parametrize("seed", range(4))
def test_polygons_equal_pycocotools_as_far_out_as_the_longer_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        longer, points = max(height, width), int(rng.integers(3, 12))
        polygons = rng.uniform(-longer, 2 * longer, (2, 2 * points)).tolist()
        expected = reference.merge(reference.frPyObjects(polygons, height, width))
        assert rle_from_polygons(polygons, (height, width)) == expected


@pytest.mark.parametrize("distance", [500, 1e4, 1e6])
def test_polygons_far_out_are_cut_before_they_are_drawn(distance: float) -> None:
    """Their memory would grow with the distance; the pixels are those of the part within the image."""
    far = [-distance, 20.0, distance, 20.0, distance, 40.0, -distance, 40.0]
    mask = decode([rle_from_polygons([far], (60, 80))], (60, 80))[0]
    assert mask[20:40].all()
    assert mask.sum() == 20 * 80
    assert max(map(abs, _drawable(far, (60, 80)))) <= 160
    # A frame around the image, as two turns in opposite directions: nothing of the image is inside.
    outer = [-distance, -distance, distance, -distance, distance, distance, -distance, distance]
    inner = [-9.0, -9.0, -9.0, 90.0, 90.0, 90.0, 90.0, -9.0]
    frame = [*outer, *outer[:2], *inner, *inner[:2], *outer[:2]]
    assert area(rle_from_polygons([frame], (60, 80))) == 0
    # A triangle whose corners are far away in all directions, and one that lies outside.
    triangle = [-distance, -distance, distance, -distance, 40.0, distance]
    assert area(rle_from_polygons([triangle], (60, 80))) == 4800
    outside = [distance, -distance, distance, distance, distance - 99, 0.0]
    assert area(rle_from_polygons([outside], (60, 80))) == 0


def test_a_slanted_edge_far_out_stays_within_a_pixel() -> None:
    """y = x / 2 + 10, between points a hundred widths away."""
    mask = decode([rle_from_polygons([[-8000.0, -3990, 8000, 4010, 8000, 9000, -8000, 9000]], (60, 80))], (60, 80))[0]
    rows, columns = np.mgrid[:60, :80] + 0.5
    below = rows - (columns / 2 + 10)
    assert mask[below > 1].all()
    assert not mask[below < -1].any()


def pedestrians() -> Coco:
    if not PEDESTRIANS.is_dir():
        pytest.skip(f"needs the shared data {PEDESTRIANS}")
    return Coco(str(PEDESTRIANS), "val", masks=True, images="images/{split}")


def with_painted_masks(sample: Sample) -> Sample:
    """The first three objects alone, each as white pixels of its own channel: what is drawn where a mask must be."""
    target = sample.target[torch.arange(min(3, len(sample.target)))]
    image = np.zeros((*sample.size, 3), dtype=np.uint8)
    image[..., : len(target)] = target.masks.numpy().transpose(1, 2, 0) * 255
    labels = torch.arange(len(target))  # the channel, to know it again
    boxes = torch.tensor([tight_box(mask.numpy()) for mask in target.masks])
    return Sample(image, Target(boxes, labels, masks=target.masks), sample.meta)


@pytest.mark.parametrize("name", ["flip", "zoom_crop", "iou_crop", "expand"])
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_masks_of_pedestrians_stay_with_their_boxes_and_pixels(name: str, resize: str) -> None:
    data = pedestrians()
    fit = Fit((240, 320), resize)
    augment = Augment([{"name": name, **({"fill": [0, 0, 0]} if name == "expand" else {})}], fit)
    objects = 0
    for seed in range(len(data)):
        image, _, target, *_ = fit(augment(with_painted_masks(data[seed]), seed))
        assert target.masks.shape[1:] == image.shape[1:]
        for channel, box, mask in zip(target.labels.tolist(), target.boxes, target.masks):
            painted = image[channel] > 0.5
            assert (painted & mask).sum() > 0.9 * (painted | mask).sum() - 10
            objects += 1
            found = tight_box(mask.numpy())
            if found is None:
                continue  # the crop left of the object only what lies in its box, but not in its mask
            inside = torch.tensor(found) - box
            assert inside[:2].min() > -2
            assert inside[2:].max() < 2
            # A crop does not leave boxes tight: the widest part of an object may be gone.
            if name in ("flip", "expand"):
                assert inside.abs().max() < 2
    assert objects > 30


def patched(boxes: torch.Tensor, seed: int = 0) -> Detections:
    patches = torch.rand(len(boxes), 14, 14, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return Detections(boxes, torch.linspace(1, 0.5, len(boxes)), labels, mask_patches=patches)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_patches_become_masks_of_the_source(resize: str) -> None:
    source = (90, 150)
    matrix = Fit((64, 96), resize).matrix(source)
    found = patched(torch.tensor([[10.0, 5.0, 40.0, 30.0], [0.0, 0.0, 60.0, 38.0], [30.0, 20.0, 31.0, 20.5]]))
    undone = undo(found, Meta("id", "image", source, matrix))
    assert undone.mask_patches is None
    assert undone.masks.shape == (3, *source)
    assert undone.masks.any(2).any(1)[:2].all()
    expected = paste_masks_in_image(found.mask_patches[:, None], undone.boxes, source)[:, 0] > 0.5
    assert torch.equal(undone.masks, expected)


def test_a_patch_keeps_its_place_where_its_box_is_cut() -> None:
    found = Detections(
        torch.tensor([[-40.0, 10.0, 40.0, 50.0]]),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int64),
        # The right half is the object: nearly all that is left in the image.
        mask_patches=torch.cat([torch.zeros(1, 28, 14), torch.ones(1, 28, 14)], dim=2),
    )
    undone = undo(found, Meta("id", "image", (60, 80)))
    assert undone.boxes.tolist() == [[0, 10, 40, 50]]
    assert undone.masks[0, 12:48, 2:38].all()


def test_no_detections_have_masks_of_the_source_all_the_same() -> None:
    undone = undo(patched(torch.zeros(0, 4)), Meta("id", "image", (60, 80)))
    assert undone.masks.shape == (0, 60, 80)
    assert undo(Detections.empty(), Meta("id", "image", (60, 80))).masks is None


def test_patches_go_with_their_detections() -> None:
    found = patched(torch.rand(4, 4))
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, False, True])):
        assert torch.equal(found[index].mask_patches, found.mask_patches[index])
        assert found[index].masks is None
    assert found.to("meta").mask_patches.device.type == "meta"
    with pytest.raises(ValueError, match=r"mask_patches must be \(4, 14, 14\) torch.float32"):
        Detections(found.boxes, found.scores, found.labels, mask_patches=torch.zeros(3, 14, 14))
    with pytest.raises(ValueError, match="mask_patches must be"):
        Detections(found.boxes, found.scores, found.labels, mask_patches=torch.zeros(4, 14, 13))
