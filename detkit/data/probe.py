"""Detection of augmentations that fail: on a synthetic image before training, and with the image's name during it."""

import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detkit.data.points import single_transforms
from detkit.errors import ConfigError, DataError

SIZES = ((96, 128), (1024, 1280))
"""(height, width) of the synthetic images; an augmentation must work on one of them."""
REASON_LENGTH = 300


def check_usable(parts: Sequence[Any]) -> None:
    """Check that augmentations do not fail and return images of (H, W, 3) uint8.

    Crops may fail here, since that depends on the size of each image.

    Args:
        parts: transforms and compositions of albumentations; those of detkit are not tried.

    Raises:
        ConfigError: naming the first that fails.
    """
    from albumentations.augmentations.crops.transforms import BaseCrop

    for part in single_transforms(parts):
        if part.p == 0 or type(part).__module__.startswith("detkit."):
            continue
        for size in SIZES:
            error = _try(part, size)
            if error is None:
                break
        else:
            if not isinstance(part, BaseCrop):
                raise ConfigError(
                    f"The augmentation {_name(part)} cannot be used: {error}. Remove it or change its options."
                )


def failure(error: Exception, source: str, size: tuple[int, int]) -> DataError:
    """Create the error for a pipeline that failed on an image of (height, width) `size`, naming the augmentation."""
    from albumentations import BasicTransform

    name = "pipeline"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(part := frame.f_locals.get("self"), BasicTransform):
            name = _name(part)
    return DataError(
        f"The augmentation {name} failed on the image '{source}' ({size[1]} x {size[0]} pixels): {_reason(error)}. "
        f"Change its options so that it works on images of this size, or remove it."
    )


def check_result(result: Mapping[str, Any], counts: Mapping[str, int], size: tuple[int, int] | None = None) -> None:
    """Check the result of a pipeline.

    Args:
        result: image, bboxes (N, 6) with the index of each in the fifth column, masks, keypoints.
        counts: the numbers of input bboxes, masks and keypoints.
        size: required (height, width) of the image, or None for any.

    Raises:
        ValueError: with the reason as part of a sentence.
    """
    image = result["image"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        form = f"{tuple(image.shape)} {image.dtype}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"it returns an image of {form}, but it must stay (height, width, 3) uint8; conversion and normalisation "
            f"follow after all augmentations"
        )
    if size is not None and image.shape[:2] != size:
        raise ValueError(
            f"the image became {image.shape[1]} x {image.shape[0]} pixels instead of {size[1]} x {size[0]}"
        )
    boxes = np.asarray(result["bboxes"])
    numbers = boxes[:, 4] if len(boxes) and boxes.ndim == 2 and boxes.shape[1] == 6 else boxes.ravel()[:0]
    if len(numbers) != len(boxes) or not np.isin(numbers, np.arange(counts["bboxes"])).all():
        raise ValueError("it changes more than the four coordinates of boxes, so their classes are lost")
    for name in counts.keys() - {"bboxes"}:
        if len(result[name]) != counts[name]:
            raise ValueError(f"it turns {counts[name]} {name} into {len(result[name])}")


def _try(part: Any, size: tuple[int, int]) -> str | None:
    """Return why a transform fails on a synthetic image; None if it works."""
    import albumentations as A

    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    boxes = np.array([[0.1, 0.1, 0.6, 0.5, 0, 0], [0.5, 0.5, 0.9, 0.9, 1, 0]]) * [width, height, width, height, 1, 1]
    probability, part.p = part.p, 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = A.Compose([part], bbox_params=A.BboxParams("pascal_voc"), seed=0)
            result = pipeline(image=image, bboxes=boxes, mask=np.zeros(size, dtype=np.uint8))
        check_result(result, {"bboxes": len(boxes)})
    # Albumentations, OpenCV and other libraries raise errors of any class.
    except Exception as error:
        return _reason(error)
    finally:
        part.p = probability
    return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= REASON_LENGTH else f"{text[: REASON_LENGTH - 3]}..."


def _name(part: Any) -> str:
    return type(part).__name__.lstrip("_")
