"""Augmentations that fail: refused when they are built where that can be known, named with their image where not."""

from collections.abc import Iterator
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch

from detkit.data.formats.shapes import Shapes
from detkit.data.loader import batches, training_loader
from detkit.data.probe import check_usable
from detkit.data.transforms import Augment, Fit
from detkit.errors import ConfigError, DataError
from detkit.registry import augmentations
from detkit.structures import Meta, Sample, Target

FIT = Fit((32, 48))


def sample(size: tuple[int, int] = (40, 60), masks: bool = False) -> Sample:
    boxes = torch.tensor([[5.0, 5, 30, 30], [20, 10, 50, 35]])
    given = torch.ones(2, *size, dtype=torch.bool) if masks else None
    return Sample(
        np.zeros((*size, 3), np.uint8), Target(boxes, torch.tensor([0, 1]), masks=given), Meta(1, "a.jpg", size)
    )


def own(transform: str, **options: Any) -> dict[str, Any]:
    return {"name": "albumentations", "transform": transform, "options": {"p": 1.0, **options}}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            own("Normalize"),
            r"image of \([0-9, ]+3\) float32, but .*normalisation follow after all augmentations.*Remove it",
        ),
        (own("Normalize", p=0.01), "float32"),
        (own("ToFloat"), "float32"),
        (own("FromFloat"), "float16"),
        (own("ToTensorV2"), r"image of \(3, [0-9, ]+\) torch\.uint8"),
        (own("ToGray", num_output_channels=1), r"image of \([0-9]+, [0-9]+\) uint8"),
        (own("FDA"), "fda_metadata"),
        (own("HistogramMatching"), "hm_metadata"),
        (own("Mosaic"), "mosaic_metadata"),
        (own("CoarseDropout3D"), "volume"),
    ],
)
@pytest.mark.parametrize("resize", ["stretch", "short_side"])
def test_what_cannot_work_is_refused_when_it_is_built(part: dict[str, Any], message: str, resize: Any) -> None:
    with pytest.raises(ConfigError, match=rf"The augmentation {part['transform']} cannot be used: .*{message}"):
        Augment([{"name": "flip"}, part], Fit((32, 48), resize))


def test_what_is_never_applied_may_stay() -> None:
    assert Augment([own("Normalize", p=0.0)], FIT)(sample(), 0).image.dtype == np.uint8


def test_what_is_inside_a_composition_is_tried_too() -> None:
    with pytest.raises(ConfigError, match="The augmentation ToFloat"):
        check_usable([A.OneOf([A.Blur(), A.Sequential([A.ToFloat(p=0.1)])], p=0.2)])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (own("RandomCrop", height=64, width=64), "Crop size .* exceeds image dimensions"),
        (own("CenterCrop", height=41, width=10), "Crop size .* exceeds image dimensions"),
        (own("Crop", x_max=2000, y_max=2000), "equal or smaller than image sizes"),
        (own("RandomCropNearBBox"), "cropping_bbox"),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_a_crop_that_an_image_is_too_small_for_is_named_with_the_image(
    part: dict[str, Any], message: str, masks: bool
) -> None:
    augment = Augment([part], FIT)
    with pytest.raises(
        DataError,
        match=rf"The augmentation {part['transform']} failed on the image 'a\.jpg' \(60 x 40 pixels\): .*{message}",
    ):
        augment(sample(masks=masks), 0)


def test_a_crop_works_on_images_that_are_large_enough() -> None:
    part = own("RandomCrop", height=2000, width=3000)
    result = Augment([part], FIT)(
        Sample(np.zeros((2100, 3100, 3), np.uint8), Target.empty(), Meta(1, "b", (2100, 3100))), 0
    )
    assert result.size == (32, 48)


@pytest.mark.parametrize(
    "part",
    [
        own("RandomRotate90"), own("RandomGridShuffle"), own("PadIfNeeded", min_height=64, min_width=64), own("CLAHE"),
        own("RandomResizedCrop", size=[20, 20]), own("ToGray"), own("CoarseDropout"), own("GridDropout"),
    ],
)  # fmt: skip
def test_others_work_as_before(part: dict[str, Any]) -> None:
    result = Augment([part], FIT)(sample(masks=part["transform"] != "RandomGridShuffle"), 0)
    assert (result.size, result.image.dtype) == ((32, 48), np.uint8)


class Odd(A.DualTransform):
    """Works on made-up images, which are colourful, and fails on black ones."""

    def __init__(self, fault: str) -> None:
        super().__init__(p=1.0)
        self.fault, self.black = fault, False

    def apply(self, img: np.ndarray, **params: Any) -> Any:
        self.black = not img.any()
        if not self.black:
            return img
        if self.fault == "error":
            raise ZeroDivisionError("by\n zero" + 1000 * "!")
        return {"float": img.astype(np.float32), "grey": img[..., 0], "list": [1]}.get(self.fault, img)

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        if self.fault == "columns" and self.black:
            return bboxes[:, :4]
        return bboxes * 1.0 + (0.0 if self.fault != "numbers" or not self.black else [0, 0, 0, 0, 7, 0])

    def apply_to_mask(self, mask: np.ndarray, **params: Any) -> np.ndarray:
        return mask

    def apply_to_masks(self, masks: np.ndarray, **params: Any) -> np.ndarray:
        return masks[:1] if self.fault == "masks" else masks


@pytest.fixture
def odd() -> Iterator[None]:
    augmentations.register("odd")(lambda fault: Odd(fault))
    yield
    del augmentations._parts["odd"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", r"pixels\): by zero!{100}"),
        ("float", "float32"),
        ("grey", "must stay|dimension|channel"),
        ("list", "object|shape|list"),
        ("columns", "index|column|coordinates"),
        ("numbers", "changes more than the four coordinates of boxes"),
        ("masks", "turns 2 masks into 1"),
    ],
)
def test_a_transform_of_a_plugin_that_fails_later_is_named(odd: None, fault: str, message: str) -> None:
    augment = Augment([{"name": "odd", "fault": fault}], FIT)
    with pytest.raises(
        DataError, match=rf"augmentation \w+ failed on the image 'a\.jpg' \(60 x 40.*{message}"
    ) as error:
        augment(sample(masks=True), 0)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_arrives_from_a_worker_as_it_is(workers: int) -> None:
    dataset = Shapes("train", train_count=4, size=48)
    augment = Augment([own("RandomCrop", height=64, width=64)], FIT)
    loader, _ = training_loader(dataset, FIT, augment, batch_size=2, workers=workers, seed=0)
    with pytest.raises(DataError) as error:
        list(batches(loader))
    assert str(error.value).startswith("The augmentation RandomCrop failed on the image 'shapes")
    assert "Traceback" not in str(error.value)


def test_trying_changes_no_random_choice_and_happens_once() -> None:
    parts = [own("RandomRotate90", p=0.5), own("GaussNoise", p=0.5), {"name": "flip"}]
    tried, untried = Augment(parts, FIT), Augment(parts, FIT, tried=True)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    given = Sample(image, sample().target, Meta(1, "a.jpg", (40, 60)))
    for seed in range(20):
        one, two = tried(given, seed), untried(given, seed)
        assert np.array_equal(one.image, two.image)
        assert torch.equal(one.target.boxes, two.target.boxes)
    assert [part.p for part in tried.pipeline.transforms[:1]] == [0.5]
