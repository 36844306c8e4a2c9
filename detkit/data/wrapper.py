"""A data set that adds something to another."""

from typing import Any

from detkit.data.dataset import Dataset
from detkit.types import Sample, Target


class DatasetWrapper(Dataset):
    """Another data set; a subclass changes what it gives, and everything else is that data set's.

    Args:
        dataset: the other one.
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
        # Only asked for what this class has not; a copy under construction has nothing to look into yet.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)
