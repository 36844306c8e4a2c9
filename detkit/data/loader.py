"""Batches from a data set by worker processes, reproducible for any number of them.

The random state of an image's augmentation, including the choice of images to mix, depends only on (seed, epoch,
image), so workers do not repeat each other, and a resumed run gets the images that it would have got. The input size of
a batch depends on (seed, epoch, number of the batch).
"""

import multiprocessing.queues
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from detkit.data.dataset import Dataset
from detkit.data.points import point_rule
from detkit.data.shared_batches import Packed, pack
from detkit.data.transforms import Augment, Fit, Fitted
from detkit.errors import ConfigError, DataError, DetkitError, WriteError
from detkit.structures import Batch


class Key(NamedTuple):
    """An image to read.

    Args:
        epoch: the epoch of its augmentation.
        image: its index in the data set.
        size: (height, width) of the input; None for the default.
    """

    epoch: int
    image: int
    size: tuple[int, int] | None = None


def collate(items: Sequence[Fitted], fit: Fit) -> Batch:
    """Combine images resized by `fit` to a batch. Either all or none of them have proposals."""
    images, sizes, targets, metas, proposals = zip(*items)
    return Batch(fit.batch(images), sizes, targets, metas, None if proposals[0] is None else proposals)


def _collate_read(items: Sequence[Fitted | DataError], fit: Fit) -> Packed | DetkitError:
    """Create a batch, or return the error of an unreadable image or of full shared memory."""
    fitted = []
    for item in items:
        if isinstance(item, DataError):
            return item
        fitted.append(item)
    packed = pack(collate(fitted, fit))
    if get_worker_info() is not None:
        try:
            packed.share()
        except RuntimeError as error:
            return WriteError(
                f"The shared memory of this machine (/dev/shm) has no room for a batch of {packed.nbytes / 1e6:.0f} MB "
                f"({' '.join(str(error).split())}). Increase it (docker run --shm-size=8g), lower train.batch_size or "
                f"train.workers, or set train.workers to 0."
            )
    return packed


def batches(loader: "DataLoader[Any]") -> Iterator[Batch]:
    """Iterate over the batches of a loader.

    Raises:
        DataError: an image could not be read. Workers return it as a value: if raised there, its message would contain
            the worker's traceback.
        WriteError: the shared memory is full.
    """
    for batch in loader:
        if isinstance(batch, DetkitError):
            raise batch
        yield batch.unpack()


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Replace the error of a worker process that has ended by one with a remedy.

    DataLoader raises it anywhere in the program, not only while waiting for a batch.

    Raises:
        DetkitError: a worker was killed, or could not send its batch.
    """
    try:
        yield
    except RuntimeError as error:
        text = f"{error.__cause__ or ''} {error}"
        if "DataLoader worker" not in text:
            raise
        killed = re.search(r"killed by signal: ([^.]+)\.", text)
        raise DetkitError(
            f"A process that reads images {f'was killed by the system ({killed[1]})' if killed else 'has ended'}, as "
            "happens when memory or shared memory runs out. Lower train.workers, train.batch_size or train.cache_gb. "
            "Continue a training from its last complete epoch with --resume RUN."
        ) from None


def _end_worker(error: BaseException, batch: Any) -> None:
    """Exit a worker process that cannot send a batch, which its queue would drop while the program waits for it."""
    print(f"detkit: a batch cannot be sent: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(1)


def _start_worker(number: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


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
    per_class: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin: bool = False,
) -> tuple[DataLoader[Any], "EpochSampler"]:
    """Create a loader of shuffled batches for this process; set `sampler.epoch` before each pass.

    Args:
        plain_from_epoch: epoch from which images are not augmented.
        unmixed_from_epoch: epoch from which images are not mixed (mosaic, mixup), but still augmented otherwise.
        sizes: (height, width) candidates for the input size of each batch; empty to always use that of `fit`.
        per_class: images of each class in a batch; None for random batches.
        rank, world_size: index of this process and number of processes that share an epoch.
        pin: use pinned memory, from which copies to a GPU are asynchronous.

    Raises:
        ConfigError: `per_class` is given, but some image does not have exactly one class.
    """
    if per_class is None:
        sampler = EpochSampler(len(dataset), batch_size, seed, rank, world_size, sizes)
    else:
        sampler = ClassSampler(image_labels(dataset), per_class, batch_size, seed, rank, world_size, sizes)
    reader = _TrainingReader(dataset, fit, augment, seed, plain_from_epoch, unmixed_from_epoch)
    return _loader(reader, fit, sampler, batch_size, workers, pin), sampler


def evaluation_loader(
    dataset: Dataset, fit: Fit, *, batch_size: int, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Create a loader of all images in order; the last batch may be smaller. `pin` as in `training_loader`."""
    return _loader(_EvaluationReader(dataset, fit), fit, None, batch_size, workers, pin)


class EpochSampler(Sampler[Key]):
    """Keys of all images in random order, repeated from the start of the order to fill the last batch.

    Complete batches avoid a batch of one, which breaks batch norm, and keep all processes in step; no image is left
    out. The images of a batch have the same input size, in all processes.
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
        """Number of batches per epoch in each process."""
        return -(-self.count // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = self._order(random)
        sizes: list[tuple[int, int] | None] = [None] * self.batches
        if self.sizes:
            sizes = [self.sizes[choice] for choice in random.integers(len(self.sizes), size=self.batches)]
        for position, index in enumerate(order):
            yield Key(self.epoch, int(index), sizes[position // self.batch_size])

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """The images of this process in order."""
        order = np.resize(random.permutation(self.count), len(self) * self.world_size)
        return order[self.rank :: self.world_size]


class ClassSampler(EpochSampler):
    """Batches of P classes with `per_class` images each: P x K sampling (Hermans et al. 2017, section 2).

    Every image occurs in every epoch, in a new group of its class. The last group of a class and the last batch of an
    epoch are filled by repetition. The groups of a class are spread over as many batches as possible.

    Args:
        labels: the class of each image.
        per_class: K, a divisor of `batch_size`.
    """

    def __init__(
        self,
        labels: Sequence[int],
        per_class: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(len(labels), batch_size, seed, rank, world_size, sizes)
        self.labels, self.per_class = np.asarray(labels), per_class
        self._groups = int(sum(-(-np.bincount(self.labels) // per_class)))

    @property
    def batches(self) -> int:
        return -(-self._groups * self.per_class // (self.batch_size * self.world_size))

    def _order(self, random: np.random.Generator) -> np.ndarray:
        groups = []
        for label in random.permutation(np.unique(self.labels)):
            images = random.permutation(np.flatnonzero(self.labels == label))
            count = -(-len(images) // self.per_class)
            groups.append(np.resize(images, (count, self.per_class)))
        batches = self.batches * self.world_size
        dealt = np.resize(np.concatenate(groups), (self.batch_size // self.per_class * batches, self.per_class))
        # Distributed round-robin, so that the groups of one class are in different batches.
        order = dealt.reshape(-1, batches, self.per_class).transpose(1, 0, 2).reshape(batches, self.batch_size)
        order = order[random.permutation(batches)]
        return order[self.rank :: self.world_size].ravel()


def image_labels(dataset: Dataset) -> list[int]:
    """Return the class of each image.

    Raises:
        ConfigError: an image has no class or several.
    """
    labels = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        if target.image_labels is None or len(target.image_labels) != 1:
            raise ConfigError(
                "'train.per_class' needs exactly one class for each image, but the image "
                f"{dataset.image_id(index)!r} does not have that. Set it to null, or use data of format folder."
            )
        labels.append(int(target.image_labels))
    return labels


@dataclass
class _TrainingReader(TorchDataset[Fitted | DataError]):
    dataset: Dataset
    fit: Fit
    augment: Augment | None
    seed: int
    plain_from_epoch: int | None
    unmixed_from_epoch: int | None
    _built: dict[tuple[tuple[int, int] | None, bool], tuple[Fit, Augment | None]] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Fitted | DataError:
        fit, augment = self._at(key.size, self._is_plain(key.epoch))
        try:
            sample = self.dataset[key.image]
            if augment is not None:
                seed = np.random.SeedSequence([self.seed, key.epoch, key.image]).generate_state(1)[0]
                sample = augment(sample, int(seed), self.dataset if self.mixes(key.epoch) else None)
        except DataError as error:
            return error
        return fit(sample)

    def mixes(self, epoch: int) -> bool:
        """Return whether the images of an epoch are mixed with others (mosaic, mixup)."""
        unmixed = self.unmixed_from_epoch is not None and epoch >= self.unmixed_from_epoch
        return self.augment is not None and bool(self.augment.mixes) and not unmixed and not self._is_plain(epoch)

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch

    def _at(self, size: tuple[int, int] | None, plain: bool) -> tuple[Fit, Augment | None]:
        """Return the resize and the augmentation for an input of `size`, built once."""
        if (size, plain) not in self._built:
            fit = self.fit if size is None else self.fit.at(size)
            augment = None if plain else self.augment
            if augment is None and fit.resize == "crop":
                # Random cropping is not an optional augmentation.
                augment = Augment((), fit, points=point_rule(self.dataset))
            elif augment is not None and size is not None:
                augment = augment.at(size)
            self._built[size, plain] = fit, augment
        return self._built[size, plain]


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
    reader: TorchDataset[Fitted | DataError],
    fit: Fit,
    sampler: Sampler[Key] | None,
    batch_size: int,
    workers: int,
    pin: bool,
) -> DataLoader[Any]:
    import cv2

    # Worker processes are the parallelism. Set in the parent, because a forked worker with OpenCV's thread pool waits
    # forever for threads that exist only in the parent.
    cv2.setNumThreads(0)
    return DataLoader(
        reader,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate_read, fit=fit),
        pin_memory=pin,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0 and sampler is not None,
    )
