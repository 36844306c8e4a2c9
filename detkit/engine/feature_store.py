"""Storage of a frozen backbone's feature maps, so that later epochs read no images and run only the neck and head."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from detkit.config import Experiment
from detkit.data.loader import Key, batches
from detkit.errors import ConfigError, WriteError
from detkit.io.files import make_folder
from detkit.model import Model
from detkit.structures import Batch, Meta, Target

FOLDER = "features"


def check_storable(experiment: Experiment) -> None:
    """Check that with `train.store_features` the feature maps of an image are the same in every epoch.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    options, fitting = experiment.train, experiment.input
    if not options.store_features:
        return
    reason = ""
    if options.freeze != "all":
        reason = f"train.freeze is {options.freeze}, so its feature maps change. Set train.freeze to all"
    elif experiment.augment:
        reason = "the images are augmented differently in each epoch. Set augment to []"
    elif fitting.multi_scale is not None:
        reason = "with input.multi_scale the input size changes. Set input.multi_scale to null"
    elif fitting.resize not in ("stretch", "letterbox"):
        reason = f"with input.resize {fitting.resize} the maps of images differ in size. Set it to stretch or letterbox"
    elif options.devices > 1:
        reason = f"each of {options.devices} processes would get other images in every epoch. Set train.devices to 1"
    if reason:
        raise ConfigError(
            f"'train.store_features' reuses the feature maps that the backbone computes in the first epoch, but "
            f"{reason}, or train.store_features to false."
        )


@contextmanager
def feature_stores(
    experiment: Experiment, run: Path, train_count: int, val_count: int
) -> Iterator[tuple["FeatureStore | None", "FeatureStore | None"]]:
    """Create the stores of training and validation images, or None without `train.store_features`; deleted afterwards.

    Args:
        run: the run's folder, for the temporary files.
    """
    if not experiment.train.store_features:
        yield None, None
        return
    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    make_folder(folder)
    try:
        yield FeatureStore(folder / "train", train_count), FeatureStore(folder / "val", val_count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _ImageRecord:
    """The data of an image in a batch, besides its pixels."""

    size: tuple[int, int]
    target: Target
    meta: Meta
    proposals: Tensor | None


class FeatureStore:
    """The backbone's feature maps of all images of a split, unchanged, in one file per level.

    The files are memory-mapped: as fast as memory if it is large enough, otherwise limited by the disk. Targets, with
    their masks, and proposals are kept in memory.

    Args:
        path: prefix of the file names.
        count: number of images of the split.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self._image_files: list[_ImageRecord | None] = [None] * count
        self._levels: list[Tensor] = []
        self._channels_last: list[bool] = []
        self._input_size = (0, 0)

    def batches(
        self, loader: "DataLoader[Any]", model: Model, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Iterator[Batch]:
        """Iterate over the batches of a loader with feature maps.

        If the store contains all images, the maps come from the store; otherwise the images are read and their maps
        are stored.

        Args:
            autocast: creates the context in which the backbone runs.

        Raises:
            DataError: an image could not be read.
            WriteError: there is not enough disk space.
        """
        numbers = [key.image if isinstance(key, Key) else key for key in loader.sampler]
        device = model.mean.device
        if all(self._image_files[number] is not None for number in numbers):
            # A DataLoader, so that the random generator advances as without a store.
            yield from DataLoader(
                _Keys(),
                batch_size=loader.batch_size,
                sampler=loader.sampler,
                collate_fn=partial(self._stored, device=device),
            )
            return
        remaining = iter(numbers)
        for batch in batches(loader):
            moved = batch.to(device)
            with torch.no_grad(), autocast():
                features = tuple(model.maps(moved.images))
            self._put(list(islice(remaining, len(batch))), batch, features)
            yield replace(moved, features=features)

    def _put(self, numbers: Sequence[int], batch: Batch, features: tuple[Tensor, ...]) -> None:
        if not self._levels:
            self._allocate(features)
            self._input_size = (batch.images.shape[2], batch.images.shape[3])
        for position, number in enumerate(numbers):
            if self._image_files[number] is not None:
                continue  # repeated to fill the last batch
            for level, channels_last, maps in zip(self._levels, self._channels_last, features):
                one = maps[position]
                level[number].copy_(one.permute(1, 2, 0) if channels_last else one)
            proposals = None if batch.proposals is None else batch.proposals[position].clone()
            # Copies, since views would keep the whole batch in memory.
            target = batch.targets[position].copy()
            self._image_files[number] = _ImageRecord(batch.sizes[position], target, batch.metas[position], proposals)

    def _stored(self, keys: Sequence[Key | int], device: torch.device) -> Batch:
        """Create a batch of stored images. Its unused pixels take no memory; they are on `device` already, since moving
        them would allocate it."""
        numbers = [key.image if isinstance(key, Key) else key for key in keys]
        images = [image for number in numbers if (image := self._image_files[number]) is not None]
        features = []
        for level, channels_last in zip(self._levels, self._channels_last):
            maps = level[torch.tensor(numbers)]
            features.append(maps.permute(0, 3, 1, 2) if channels_last else maps)
        proposals = tuple(image.proposals for image in images if image.proposals is not None)
        return Batch(
            torch.zeros((), device=device).expand(len(numbers), 3, *self._input_size),
            tuple(image.size for image in images),
            tuple(image.target for image in images),
            tuple(image.meta for image in images),
            proposals if len(proposals) == len(images) else None,
            tuple(features),
        )

    def _allocate(self, features: tuple[Tensor, ...]) -> None:
        """Create the files for maps of the given shapes, types and memory formats."""
        for number, maps in enumerate(features):
            channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
            shape = maps.shape[1:]
            if channels_last:
                shape = torch.Size((shape[1], shape[2], shape[0]))
            size = (self.count, *shape)
            path = self.path.with_name(f"{self.path.name}_{number}.bin")
            _reserve(path, math.prod(size) * maps.element_size())
            with torch.inference_mode(False):
                level = torch.from_file(str(path), shared=True, size=math.prod(size), dtype=maps.dtype).view(size)
            self._levels.append(level)
            self._channels_last.append(channels_last)


class _Keys(TorchDataset[Any]):
    """A data set that returns its keys."""

    def __getitem__(self, key: Any) -> Any:
        return key


def _reserve(path: Path, size: int) -> None:
    """Create a file with `size` bytes of allocated disk space: a full disk would kill the process later.

    Raises:
        WriteError: there is not enough disk space.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise WriteError(
            f"The stored features need {size / 1e9:.2f} GB in '{path}', which are not available ({error.strerror}). "
            "Free some space, set 'runs' to another disk, use fewer 'levels' of the backbone or a smaller input.size, "
            "or set train.store_features to false."
        ) from None
