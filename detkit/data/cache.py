"""Cache of decoded images in memory or on disk, of limited size and shared by all reading processes."""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from detkit.data.dataset import Dataset
from detkit.data.dataset_wrapper import DatasetWrapper
from detkit.errors import ConfigError, WriteError
from detkit.structures import Meta, Sample

Storage = Literal["memory", "disk"]


def with_cache(
    train_set: Dataset, val_set: Dataset, storage: Storage, bound: int, folder: Path
) -> tuple[Dataset, Dataset, str]:
    """Wrap both data sets so that each image is decoded once, within a bound; also return a line for the report.

    Training images are cached first, in the order of the data set.

    Args:
        bound: maximum bytes of both together.
        folder: for the file on disk, which is unnamed and disappears when the last reading process ends.

    Raises:
        ConfigError: not enough memory is available.
        WriteError: not enough memory or disk space is available.
    """
    sizes = [[dataset.size(index) for index in range(len(dataset))] for dataset in (train_set, val_set)]
    cached, taken = [], 0
    for dataset, of_split in zip((train_set, val_set), sizes):
        cache = ImageCache(of_split, bound - taken, storage, folder)
        taken += cache.bytes
        cached.append(CachedDataset(dataset, cache))
    counts = [
        f"{each.cache.count:,} of {len(each):,} images for {name}"
        for each, name in zip(cached, ("training", "validation"))
    ]
    beyond = sum(len(each) - each.cache.count for each in cached)
    line = f"{storage}, {taken / 1e9:.2f} GB: {' and '.join(counts)}, decoded once"
    if beyond:
        needed = sum(height * width * 3 for of_split in sizes for height, width in of_split)
        line += f"; the other {beyond:,} are decoded each time (all images need {needed / 1e9:.2f} GB)"
    return cached[0], cached[1], line


class CachedDataset(DatasetWrapper):
    """A wrapper whose images come from `cache` once any process has read them.

    Targets are not cached: the data set creates them each time.
    """

    def __init__(self, dataset: Dataset, cache: "ImageCache") -> None:
        super().__init__(dataset)
        self.cache = cache

    def __getitem__(self, index: int) -> Sample:
        if index not in self.cache:
            return self.dataset[index]
        image = self.cache.get(index)
        if image is None:
            sample = self.dataset[index]
            self.cache.put(index, sample.image)
            return sample
        meta = Meta(self.dataset.image_id(index), self.dataset.source(index), self.dataset.size(index))
        return Sample(image, self.dataset.target(index), meta)


class ImageCache:
    """Images by index in a memory-mapped file: first a flag byte for each image, then the pixels.

    Args:
        sizes: (height, width) of each image.
        bound: maximum bytes; images are included in order, skipping those that would exceed it.
        storage: memory shared by the processes, or an unnamed file in `folder`.

    Attributes:
        count: number of images that fit.
        bytes: size of the file.

    Raises:
        ConfigError: not enough memory is available.
        WriteError: not enough memory or disk space is available.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], bound: int, storage: Storage, folder: Path) -> None:
        self._sizes = list(sizes)
        self._offsets = np.full(len(sizes), -1, dtype=np.int64)
        end = len(sizes)
        for index, (height, width) in enumerate(sizes):
            if end + height * width * 3 <= bound:
                self._offsets[index], end = end, end + height * width * 3
        self.count = int((self._offsets >= 0).sum())
        self.bytes = end if self.count else 0
        self._file = _open_unnamed(storage, max(1, self.bytes), folder)
        self._map = mmap.mmap(self._file.fileno(), max(1, self.bytes))

    def __contains__(self, index: int) -> bool:
        """Return whether an image fits into the cache."""
        return bool(self._offsets[index] >= 0)

    def get(self, index: int) -> np.ndarray | None:
        """Return a copy of the image `index`, (H, W, 3) uint8; None if it is not stored yet."""
        with self._locked(index):
            if not self._map[index]:
                return None
        return self._pixels(index).copy()

    def put(self, index: int, image: np.ndarray) -> None:
        """Store an image. Several processes may do so at once, since they write the same content."""
        self._pixels(index)[:] = image
        with self._locked(index):
            self._map[index] = 1

    @contextmanager
    def _locked(self, index: int) -> Iterator[None]:
        """Lock the flag byte of an image, so that pixels written before its release by another process are visible."""
        import fcntl  # not on Windows

        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index)

    def _pixels(self, index: int) -> np.ndarray:
        height, width = self._sizes[index]
        flat = np.frombuffer(self._map, np.uint8, height * width * 3, int(self._offsets[index]))
        return flat.reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers get the open file and map it themselves.
        state = {name: value for name, value in self.__dict__.items() if name not in ("_file", "_map")}
        return state | {"_file": reduction.DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = os.fdopen(state["_file"].detach(), "r+b")
        self._map = mmap.mmap(self._file.fileno(), max(1, self.bytes))


def _open_unnamed(storage: Storage, size: int, folder: Path) -> BinaryIO:
    """Create an unnamed file of `size` bytes."""
    if os.name == "nt":
        raise ConfigError("'train.cache' is only available on Linux and macOS. Set it to null.")
    remedy = "Lower train.cache_gb, or set train.cache to"
    try:
        if storage == "memory":
            available = _available_memory()
            if available is not None and size > available:
                raise ConfigError(
                    f"'train.cache' memory needs {size / 1e9:.2f} GB, but {available / 1e9:.2f} GB are free. {remedy} "
                    "disk or null."
                )
            if hasattr(os, "memfd_create"):
                file: BinaryIO = os.fdopen(os.memfd_create("images"), "r+b")
            else:
                # The system keeps it in memory as long as there is enough.
                file = tempfile.TemporaryFile()  # noqa: SIM115
            file.truncate(size)
            return file
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk would kill the process later
        else:
            file.truncate(size)
        return file
    except OSError as error:
        raise WriteError(
            f"'train.cache' {storage} needs {size / 1e9:.2f} GB{f' in {str(folder)!r}' if storage == 'disk' else ''}, "
            f"which are not available ({error.strerror}). {remedy} null."
        ) from None


def _available_memory() -> int | None:
    """Return the bytes available without swapping; None if the system does not report it."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
