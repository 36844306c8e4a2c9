"""Batches from a data set, by worker processes, reproducible whatever their number.

The random state of an image's augmentation is made from (seed, epoch, image) alone, with the choice of the images
that it is mixed with, so no two workers can repeat one another, and a resumed run sees the images it would have seen.
The size of a batch is made from (seed, epoch, number of the batch).
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
    """Which image to read, and how.

    Args:
        epoch: of which its augmentation is.
        image: its index in the data set.
        size: (height, width) of the input; None for the usual one.
    """

    epoch: int
    image: int
    size: tuple[int, int] | None = None


def collate(items: Sequence[Fitted], fit: Fit) -> Batch:
    """One batch of images that `fit` made. Either all of them have proposals or none has."""
    images, sizes, targets, metas, proposals = zip(*items)
    return Batch(fit.batch(images), sizes, targets, metas, None if proposals[0] is None else proposals)


def _collate_read(items: Sequence[Fitted | DataError], fit: Fit) -> Packed | DetkitError:
    """One batch, or the error of an image that could not be read, or of shared memory that is full."""
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
                f"({' '.join(str(error).split())}). Give it more (docker run --shm-size=8g), lower train.batch_size or "
                f"train.workers, or set train.workers to 0."
            )
    return packed


def batches(loader: "DataLoader[Any]") -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        DataError: an image could not be read. It comes from the worker as a value: raised there, it would arrive
            here with the worker's traceback for its message.
        WriteError: the shared memory is full.
    """
    for batch in loader:
        if isinstance(batch, DetkitError):
            raise batch
        yield batch.unpack()


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Turn the error of a worker process that has ended into one that says what to do.

    DataLoader raises it wherever the program is at that moment, not only where it waits for a batch.

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
            "happens when memory or shared memory runs out. Lower train.workers, train.batch_size or train.cache_gb. A "
            "training goes on from its last whole epoch with --resume RUN."
        ) from None


def _end_worker(error: BaseException, batch: Any) -> None:
    """End a worker process that cannot send a batch: its queue would drop it, and the program wait for it for ever."""
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
    """Shuffled batches of `batch_size` for this process; set `sampler.epoch` before each pass.

    Args:
        plain_from_epoch: from this epoch on images are only fitted, not augmented.
        unmixed_from_epoch: from this epoch on they are not mixed (mosaic, mixup), but still augmented otherwise.
        sizes: (height, width) of the inputs that each batch's is drawn from; empty for always that of `fit`.
        per_class: so many images of one class stand together in a batch; None for any.
        rank, world_size: this process among those that share an epoch.
        pin: in page-locked memory, from which a GPU takes them without waiting.

    Raises:
        ConfigError: the data do not say of each image which one class it has, but `per_class` is given.
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
    """Every image once, in order; the last batch may be smaller. `pin` as in `training_loader`."""
    return _loader(_EvaluationReader(dataset, fit), fit, None, batch_size, workers, pin)


class EpochSampler(Sampler[Key]):
    """The key of every image in random order, filled up to whole batches from the front of the order.

    Whole batches keep batch norm away from a batch of one and every process in step; no image is left out. The
    images of a batch have one size, the same in all processes.
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
        order = self._order(random)
        sizes: list[tuple[int, int] | None] = [None] * self.batches
        if self.sizes:
            sizes = [self.sizes[choice] for choice in random.integers(len(self.sizes), size=self.batches)]
        for position, index in enumerate(order):
            yield Key(self.epoch, int(index), sizes[position // self.batch_size])

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """The images of this process in their order."""
        order = np.resize(random.permutation(self.count), len(self) * self.world_size)
        return order[self.rank :: self.world_size]


class ClassSampler(EpochSampler):
    """Batches of P classes with `per_class` images each: P x K of metric learning (Hermans et al. 2017, section 2).

    Every image is in every epoch, in a new group of its class. A class whose images do not fill its last group, and
    an epoch whose groups do not fill its last batch, are filled up from the front. A class stands in as many batches,
    and as seldom twice in one, as its number of images allows.

    Args:
        labels: the class of each image.
        per_class: K; `batch_size` is a multiple of it.
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
        # Dealt like cards, the groups of one class go to different batches.
        order = dealt.reshape(-1, batches, self.per_class).transpose(1, 0, 2).reshape(batches, self.batch_size)
        order = order[random.permutation(batches)]
        return order[self.rank :: self.world_size].ravel()


def image_labels(dataset: Dataset) -> list[int]:
    """The one class of each image.

    Raises:
        ConfigError: an image has none, or several.
    """
    labels = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        if target.image_labels is None or len(target.image_labels) != 1:
            raise ConfigError(
                "'train.per_class' puts images of one class together, but the data do not say of each image which "
                f"one class it has (image {dataset.image_id(index)!r}). Set it to null, or use data of format folder."
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
        """Whether the images of an epoch are mixed with others (mosaic, mixup)."""
        unmixed = self.unmixed_from_epoch is not None and epoch >= self.unmixed_from_epoch
        return self.augment is not None and bool(self.augment.mixes) and not unmixed and not self._is_plain(epoch)

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch

    def _at(self, size: tuple[int, int] | None, plain: bool) -> tuple[Fit, Augment | None]:
        """What fits and augments images to `size`, built once."""
        if (size, plain) not in self._built:
            fit = self.fit if size is None else self.fit.at(size)
            augment = None if plain else self.augment
            if augment is None and fit.resize == "crop":
                # To be cut at random is no augmentation that could be left out.
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

    # Worker processes are the parallelism. In the parent, because a forked worker that finds OpenCV's pool of
    # threads waits for ever for threads that only the parent has.
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
