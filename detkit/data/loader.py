"""Batches from a data set, by worker processes, reproducible whatever their number.

The random state of a picture's augmentation is made from (seed, epoch, picture) alone, with the choice of the pictures
that it is mixed with, so no two workers can repeat one another, and a resumed run sees the pictures it would have seen.
The size of a batch is made from (seed, epoch, number of the batch).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from detkit.data.dataset import Dataset
from detkit.data.transforms import Augment, Fit, Fitted
from detkit.errors import DataError
from detkit.types import Batch


class Key(NamedTuple):
    """Which picture to read, and how.

    Args:
        epoch: of which its augmentation is.
        picture: its index in the data set.
        size: (height, width) of the input; None for the usual one.
    """

    epoch: int
    picture: int
    size: tuple[int, int] | None = None


def collate(items: Sequence[Fitted], fit: Fit) -> Batch:
    """One batch of pictures that `fit` made. Either all of them have proposals or none has."""
    images, sizes, targets, metas, proposals = zip(*items)
    return Batch(fit.batch(images), sizes, targets, metas, None if proposals[0] is None else proposals)


def _collate_read(items: Sequence[Fitted | DataError], fit: Fit) -> Batch | DataError:
    """One batch, or the error of a picture that could not be read."""
    fitted = []
    for item in items:
        if isinstance(item, DataError):
            return item
        fitted.append(item)
    return collate(fitted, fit)


def batches(loader: "DataLoader[Any]") -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        DataError: a picture could not be read. It comes from the worker as a value: raised there, it would arrive
            here with the worker's traceback for its message.
    """
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def training_loader(
    dataset: Dataset,
    fit: Fit,
    augment: Augment | None,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    plain_from_epoch: int | None = None,
    unmixed_from_epoch: int | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DataLoader[Any], "EpochSampler"]:
    """Shuffled batches of `batch_size` for this process; set `sampler.epoch` before each pass.

    Args:
        plain_from_epoch: from this epoch on pictures are only fitted, not augmented.
        unmixed_from_epoch: from this epoch on they are not mixed (mosaic, mixup), but still augmented otherwise.
        sizes: (height, width) of the inputs that each batch's is drawn from; empty for always that of `fit`.
        rank, world_size: this process among those that share an epoch.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed, rank, world_size, sizes)
    reader = _TrainingReader(dataset, fit, augment, seed, plain_from_epoch, unmixed_from_epoch)
    return _loader(reader, fit, sampler, batch_size, workers), sampler


def evaluation_loader(dataset: Dataset, fit: Fit, *, batch_size: int, workers: int) -> DataLoader[Any]:
    """Every picture once, in order; the last batch may be smaller."""
    return _loader(_EvaluationReader(dataset, fit), fit, None, batch_size, workers)


class EpochSampler(Sampler[Key]):
    """The key of every picture in random order, filled up to whole batches from the front of the order.

    Whole batches keep batch norm away from a batch of one and every process in step; no picture is left out. The
    pictures of a batch have one size, the same in all processes.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.sizes = sizes
        self.epoch = 0

    @property
    def batches(self) -> int:
        """Batches of one epoch, in each process."""
        return -(-self.count // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(random.permutation(self.count), len(self) * self.world_size)
        sizes: list[tuple[int, int] | None] = [None] * self.batches
        if self.sizes:
            sizes = [self.sizes[choice] for choice in random.integers(len(self.sizes), size=self.batches)]
        for position, index in enumerate(order[self.rank :: self.world_size]):
            yield Key(self.epoch, int(index), sizes[position // self.batch_size])


@dataclass
class _TrainingReader(TorchDataset[Fitted | DataError]):
    dataset: Dataset
    fit: Fit
    augment: Augment | None
    seed: int
    plain_from_epoch: int | None
    unmixed_from_epoch: int | None
    _at_size: dict[tuple[int, int], tuple[Fit, Augment | None]] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Fitted | DataError:
        fit, augment = self._at(key.size)
        plain = self.plain_from_epoch is not None and key.epoch >= self.plain_from_epoch
        unmixed = self.unmixed_from_epoch is not None and key.epoch >= self.unmixed_from_epoch
        try:
            sample = self.dataset[key.picture]
            if augment is not None and not plain:
                seed = np.random.SeedSequence([self.seed, key.epoch, key.picture]).generate_state(1)[0]
                sample = augment(sample, int(seed), None if unmixed else self.dataset)
        except DataError as error:
            return error
        return fit(sample)

    def _at(self, size: tuple[int, int] | None) -> tuple[Fit, Augment | None]:
        """What fits and augments pictures to `size`, built once."""
        if size is None:
            return self.fit, self.augment
        if size not in self._at_size:
            self._at_size[size] = self.fit.at(size), None if self.augment is None else self.augment.at(size)
        return self._at_size[size]


@dataclass
class _EvaluationReader(TorchDataset[Fitted | DataError]):
    dataset: Dataset
    fit: Fit

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Fitted | DataError:
        try:
            return self.fit(self.dataset[index])
        except DataError as error:
            return error


def _loader(
    reader: TorchDataset[Fitted | DataError], fit: Fit, sampler: Sampler[Key] | None, batch_size: int, workers: int
) -> DataLoader[Any]:
    import cv2

    # Worker processes are the parallelism. In the parent, because a forked worker that finds OpenCV's pool of
    # threads waits for ever for threads that only the parent has.
    cv2.setNumThreads(0)
    return DataLoader(
        reader,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate_read, fit=fit),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0 and sampler is not None,
    )
