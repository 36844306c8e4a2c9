"""Decoding of large training JPEGs at 1/2, 1/4 or 1/8 of their size, which is faster: a 12-megapixel JPEG takes 65 ms
at full size and 40, 33 and 28 ms at reduced size, and all later steps take less time, too.

The rule: along each axis the reduced image has at least twice the resolution of the input, and enough resolution that
no crop of an augmentation must be upsampled. It depends only on size and format.

This is optional, because reduced images are averages, while evaluation and prediction downsample full images without
smoothing and so keep their noise, which a network trained on reduced images has not seen. With noise of 10 grey levels
at 2560 x 1920 pixels, decoded at a quarter, the mAP of a pretrained RetinaNet fell from 0.393 to 0.306 (a small SSD
from random weights went from 0.462 to 0.472; one seed each).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.config import InputOptions
from detkit.data.dataset import Dataset, FileDataset
from detkit.data.dataset_wrapper import DatasetWrapper
from detkit.data.image import is_jpeg
from detkit.data.points import point_rule
from detkit.data.transforms import Augment, Fit
from detkit.structures import Meta, Sample, Target

REDUCTIONS = (8, 4, 2)
"""Divisors of the size at which libjpeg decodes fast."""
MARGIN = 2.0
"""Minimum ratio of the reduced image's resolution to the input's, so that the input is as sharp as one resized from the
full image."""


def with_reduced_decoding(
    dataset: Dataset, options: InputOptions, augment: Sequence[Mapping[str, Any]]
) -> tuple[Dataset, str]:
    """Wrap the training data to decode large JPEGs at reduced size; also return a line for the report, or "".

    Data sets that are not FileDatasets, or read images in their own way, are returned unchanged.

    Args:
        dataset: the training data.
        options: the input options.
        augment: the augmentations; one without `largest_zoom`, such as albumentations' own, whose options may be in
            pixels, disables the reduction.

    Raises:
        ConfigError: an augmentation is unknown.
        DataError: an image cannot be read.
    """
    # The last of several sizes is the largest along both axes.
    fit = Fit((options.training_sizes or (options.size,))[-1], options.resize)
    if not isinstance(dataset, FileDataset) or type(dataset).__getitem__ is not FileDataset.__getitem__:
        return dataset, ""
    large = [index for index in range(len(dataset)) if reduction_of(dataset.size(index), fit) > 1]
    with ThreadPoolExecutor(max_workers=16) as pool:
        jpegs = [index for index, found in zip(large, pool.map(is_jpeg, map(dataset.source, large))) if found]
    if not jpegs:
        return dataset, ""
    built = Augment(augment, fit, points=point_rule(dataset))
    reductions = np.ones(len(dataset), dtype=np.uint8)
    for index in jpegs:
        size = dataset.size(index)
        reductions[index] = reduction_of(size, fit, built.largest_zoom(size))
    counts = Counter(reductions[reductions > 1].tolist())
    if not counts:
        if math.isfinite(built.largest_zoom(fit.size)):
            return dataset, ""
        return dataset, (
            f"full size, although {len(jpegs):,} of {len(dataset):,} training images are much larger than the input: "
            "the zoom of an augmentation is unknown"
        )
    shares = ", ".join(f"1/{reduction}: {counts[reduction]:,}" for reduction in sorted(counts))
    line = (
        f"{counts.total():,} of {len(dataset):,} training images at reduced size ({shares}), since the input is much "
        "smaller"
    )
    return ReducedDataset(dataset, reductions), line


def reduction_of(size: tuple[int, int], fit: Fit, zoom: float = 1.0) -> int:
    """Return the divisor, 1, 2, 4 or 8, by which an image of (height, width) `size` may be reduced in decoding.

    Args:
        size: (height, width) of the image.
        fit: the resize to the input.
        zoom: the largest magnification of an augmentation relative to `fit`.
    """
    needed = [max(MARGIN, zoom) * side for side in fit.inner_size(size)]
    for reduction in REDUCTIONS:
        if all(math.ceil(side / reduction) >= least for side, least in zip(size, needed)):
            return reduction
    return 1


class ReducedDataset(DatasetWrapper):
    """A data set, some of whose JPEGs are decoded at reduced size.

    Sizes, meta and targets are in pixels of the reduced images. (If sides are not multiples of the divisor, targets of
    images with an Exif rotation are off by less than one pixel.)

    Args:
        dataset: the wrapped data set.
        reductions: 1, 2, 4 or 8 for each image; above 1 only for JPEGs.
    """

    dataset: FileDataset

    def __init__(self, dataset: FileDataset, reductions: np.ndarray) -> None:
        super().__init__(dataset)
        self._reductions = reductions

    def __getitem__(self, index: int) -> Sample:
        reduction = int(self._reductions[index])
        if reduction == 1:
            return self.dataset[index]
        meta = Meta(self.image_id(index), self.source(index), self.size(index))
        return Sample(self.dataset.image(index, reduction), self.target(index), meta)

    def target(self, index: int) -> Target:
        target, reduction = self.dataset.target(index), int(self._reductions[index])
        if reduction == 1:
            return target
        return replace(
            target,
            boxes=target.boxes / reduction,
            area=target.area / reduction**2,
            masks=None if target.masks is None else _thinned(target.masks, reduction),
            points=None if target.points is None else target.points / reduction,
            semantic=None if target.semantic is None else _thinned(target.semantic, reduction),
        )

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.dataset.size(index)
        reduction = int(self._reductions[index])
        return -(-height // reduction), -(-width // reduction)


def _thinned(pixels: Tensor, reduction: int) -> Tensor:
    """Subsample (..., H, W) to (..., ceil(H / reduction), ceil(W / reduction)): the central pixel of each square, or
    the edge if the last squares are cut off before it."""
    middle = reduction // 2
    for axis in (-1, -2):
        side = pixels.shape[axis]
        every = [slice(None)] * pixels.ndim
        every[axis] = slice(middle, None, reduction)
        edge = pixels.narrow(axis, side - 1, 1 if 0 < side % reduction <= middle else 0)
        pixels = torch.cat([pixels[tuple(every)], edge], dim=axis)
    return pixels
