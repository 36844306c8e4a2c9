"""What a frozen backbone gives, computed once and kept: later epochs read no image and run the neck and head only."""

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
    """Refuse `train.store_features` where the backbone's maps of an image are not the same in every epoch.

    Raises:
        ConfigError: saying why, and what to change.
    """
    options, fitting = experiment.train, experiment.input
    if not options.store_features:
        return
    reason = ""
    if options.freeze != "all":
        reason = f"train.freeze is {options.freeze}, so that the backbone's maps change. Set train.freeze to all"
    elif experiment.augment:
        reason = "each epoch augments images anew. Set augment to []"
    elif fitting.multi_scale is not None:
        reason = "inputs of many sizes give other maps each time. Set input.multi_scale to null"
    elif fitting.resize not in ("stretch", "letterbox"):
        reason = (
            f"under input.resize {fitting.resize} the maps of an image are not of one size. Set it to stretch or "
            "letterbox"
        )
    elif options.devices > 1:
        reason = f"each of {options.devices} processes would see other images in every epoch. Set train.devices to 1"
    if reason:
        raise ConfigError(
            f"'train.store_features' keeps what the backbone gives for each image from the first epoch on, but "
            f"{reason}, or train.store_features to false."
        )


@contextmanager
def feature_stores(
    experiment: Experiment, run: Path, train_count: int, val_count: int
) -> Iterator[tuple["FeatureStore | None", "FeatureStore | None"]]:
    """The stores of training and validation images, None without `train.store_features`; gone afterwards.

    Args:
        run: the run's folder, in which their files lie meanwhile.
    """
    if not experiment.train.store_features:
        yield None, None
        return
    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    make_folder(folder)
    try:
        yield FeatureStore(folder / "train", train_count), FeatureStore(folder / "val", val_count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _ImageRecord:
    """What a batch says of one image besides its pixels."""

    size: tuple[int, int]
    target: Target
    meta: Meta
    proposals: Tensor | None


class FeatureStore:
    """The backbone's maps of all images of a split, exactly as computed, in a file for each level.

    The files are mapped into memory: fast as memory where it is large enough, and no more than disk where it is not.
    Targets, with their masks, and proposals are kept in memory.

    Args:
        path: what the names of the files begin with.
        count: images of the split.
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
        """The batches of a loader with the backbone's maps: from the store, if it has all their images; otherwise the
        images are read, and what they give is put into the store.

        Args:
            autocast: within what it gives the backbone runs.

        Raises:
            DataError: an image could not be read.
            WriteError: there is not enough space on the disk.
        """
        numbers = [key.image if isinstance(key, Key) else key for key in loader.sampler]
        device = model.mean.device
        if all(self._image_files[number] is not None for number in numbers):
            # Of DataLoader's own class, so that the stream of random numbers is spent as without a store.
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
                continue  # batches are filled up from the front
            for level, channels_last, maps in zip(self._levels, self._channels_last, features):
                one = maps[position]
                level[number].copy_(one.permute(1, 2, 0) if channels_last else one)
            proposals = None if batch.proposals is None else batch.proposals[position].clone()
            # Copies, else the memory of the whole batch would stay.
            target = batch.targets[position].copy()
            self._image_files[number] = _ImageRecord(batch.sizes[position], target, batch.metas[position], proposals)

    def _stored(self, keys: Sequence[Key | int], device: torch.device) -> Batch:
        """The batch of images that the store has. Its pixels, which nothing reads, take no memory; they lie on
        `device` since the way there would give them some."""
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
        """Make the files, for maps of the shape, type and order in memory of these."""
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
    """Gives back what it is asked for."""

    def __getitem__(self, key: Any) -> Any:
        return key


def _reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes whose place on the disk is certain: a full disk, met later, would kill the process.

    Raises:
        WriteError: there is no such space.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise WriteError(
            f"The features to be stored take {size / 1e9:.2f} GB in '{path}', which are not available "
            f"({error.strerror}). Free some space, set 'runs' to another disk, take fewer 'levels' of the backbone or "
            "a smaller input.size, or set train.store_features to false."
        ) from None
