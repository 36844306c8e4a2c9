"""Data sets that wrap and modify another data set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from detkit.data.dataset import Dataset
from detkit.structures import ClassList, Sample, Target


class DatasetWrapper(Dataset):
    """A data set that forwards everything to another one; subclasses modify parts of it.

    Args:
        dataset: the wrapped data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.classes, self.problems = dataset.classes, dataset.problems
        self.fields, self.flip_pairs = dataset.fields, dataset.flip_pairs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]

    def target(self, index: int) -> Target:
        return self.dataset.target(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.dataset.size(index)

    def image_id(self, index: int) -> int | str:
        return self.dataset.image_id(index)

    def source(self, index: int) -> str:
        return self.dataset.source(index)

    def fingerprint(self) -> dict[str, Any]:
        return self.dataset.fingerprint()

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes. A copy under construction has no `dataset` yet.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)


class Relabelled(DatasetWrapper):
    """A data set with its classes in another order; raw ids are kept.

    Args:
        dataset: the wrapped data set.
        names: the names of all its classes, in the order of the new labels.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        super().__init__(dataset)
        old = dataset.classes
        raw_ids = dict(zip(old.names, old.raw_ids))
        self.classes = ClassList(tuple(names), tuple(raw_ids[name] for name in names))
        # New label by old label; other values of semantic maps, such as IGNORED_PIXEL, are kept.
        self._labels = torch.arange(max(256, len(old)))
        self._labels[: len(old)] = torch.tensor([self.classes.names.index(name) for name in old.names])

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return replace(sample, target=self._relabelled(sample.target))

    def target(self, index: int) -> Target:
        return self._relabelled(self.dataset.target(index))

    def _relabelled(self, target: Target) -> Target:
        image_labels, semantic = target.image_labels, target.semantic
        return replace(
            target,
            labels=self._labels[target.labels],
            image_labels=None if image_labels is None else self._labels[image_labels].sort().values,
            semantic=None if semantic is None else self._labels[semantic.long()].to(torch.uint8),
        )


def in_order(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Reorder the classes of a data set to `names`, if it has exactly these classes."""
    same = dataset.classes.names == tuple(names) or set(dataset.classes.names) != set(names)
    return dataset if same else Relabelled(dataset, names)
