"""Training images decoded at a half, a quarter or an eighth of their sides, where they are much larger than the
network's input: a JPEG of 12 megapixels takes 65 ms whole, 40, 33 and 28 ms so, and what follows a part of its time.

The rule: along each axis the smaller image has at least twice as many pixels as the input gives to the whole of it,
and so many that no part of it that an augmentation may cut out must be enlarged. Size and format alone decide.

It is for the user to choose, because the smaller images are averages, while evaluation and prediction shrink whole
ones without smoothing and so keep their noise: a network trained on the former and run on the latter meets noise that
it has not seen. With noise of 10 grey levels at 2560 x 1920 pixels, read at a quarter, a pretrained RetinaNet fell from
mAP 0.393 to 0.306 that way (a small SSD, from random weights, went from 0.462 to 0.472; one seed each).
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
"""What libjpeg decodes fast, as divisors of the sides."""
MARGIN = 2.0
"""Pixels of the smaller image, along each axis, for one of the input: it must be halved at least, so that the input
is as sharp as one made of the whole image."""


def with_reduced_decoding(
    dataset: Dataset, options: InputOptions, augment: Sequence[Mapping[str, Any]]
) -> tuple[Dataset, str]:
    """The same training data, large JPEGs smaller; and a line about it for people, empty where there is nothing to say.

    Data that are no images in files, or that read them in a way of their own, stay as they are.

    Args:
        options: of the network's input.
        augment: augmentations; one that does not say how far it zooms in (`largest_zoom`), as albumentations' own do
            not, whose options may be in pixels, leaves images as they are.

    Raises:
        ConfigError: an augmentation is unknown.
        DataError: an image cannot be read.
    """
    # Of several sizes the last is the largest, along both axes.
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
            f"whole, though {len(jpegs):,} of {len(dataset):,} training images are much larger than the input: an "
            "augmentation does not say how far it zooms in"
        )
    shares = ", ".join(f"1/{reduction}: {counts[reduction]:,}" for reduction in sorted(counts))
    line = (
        f"{counts.total():,} of {len(dataset):,} training images at a fraction of their sides ({shares}), as the "
        "input is much smaller"
    )
    return ReducedDataset(dataset, reductions), line


def reduction_of(size: tuple[int, int], fit: Fit, zoom: float = 1.0) -> int:
    """The divisor of the sides, 1, 2, 4 or 8, at which an image of (height, width) `size` may be decoded.

    Args:
        fit: to the input.
        zoom: how many times larger an augmentation may show a part of it than `fit` shows the whole.
    """
    needed = [max(MARGIN, zoom) * side for side in fit.inner_size(size)]
    for reduction in REDUCTIONS:
        if all(math.ceil(side / reduction) >= least for side, least in zip(size, needed)):
            return reduction
    return 1


class ReducedDataset(DatasetWrapper):
    """Another data set, some of whose JPEGs are decoded at a fraction of their sides.

    It is as if the files held the smaller images: sizes, meta and ground truth are in pixels of these. (Where sides are
    no multiples of the divisor, ground truth of an image that Exif data turn is off by less than one of them.)

    Args:
        dataset: the other one.
        reductions: 1, 2, 4 or 8 for each image; above 1 for JPEGs only.
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
    """(..., H, W) as (..., ceil(H / reduction), ceil(W / reduction)): the pixel in the middle of each square; where the
    last squares are cut off before that, the edge."""
    middle = reduction // 2
    for axis in (-1, -2):
        side = pixels.shape[axis]
        every = [slice(None)] * pixels.ndim
        every[axis] = slice(middle, None, reduction)
        edge = pixels.narrow(axis, side - 1, 1 if 0 < side % reduction <= middle else 0)
        pixels = torch.cat([pixels[tuple(every)], edge], dim=axis)
    return pixels
