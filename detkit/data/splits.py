"""The data sets that an experiment's `data` names: one class, two splits."""

from typing import Any, Literal

from detkit.data.dataset import Dataset
from detkit.errors import ConfigError, DataError
from detkit.registry import datasets, option_names

Split = Literal["train", "val"]


def open_split(data: dict[str, Any], split: Split, needs: frozenset[str]) -> Dataset:
    """The data set of one split.

    Args:
        data: `name` of a format, its options, and optionally what the splits `train` and `val` are called there.
        needs: the fields of Target that the head reads.

    Raises:
        ConfigError: an option is unknown.
        DataError: the data are broken, or lack a field that the head needs.
    """
    options = {key: value for key, value in data.items() if key not in ("train", "val")}
    injected: dict[str, Any] = {"split": str(data.get(split, split))}
    if "name" in options:
        # What costs time or memory to read is read only for a head that needs it.
        known = option_names(datasets.get(options["name"]))
        injected |= {name: name in needs for name in ("masks", "points", "semantic") if name in known}
    dataset: Dataset = datasets.build(options, "data", ("train", "val"), **injected)
    # Proposals are not the data set's: detkit.proposals adds them.
    if missing := needs - dataset.fields - {"proposals"}:
        raise DataError(
            f"The head needs {', '.join(sorted(missing))}, which the data set '{options['name']}' of split "
            f"'{injected['split']}' does not have (it has {', '.join(sorted(dataset.fields))}). Use data that has them "
            "(masks: COCO's segmentations, YOLO's polygons; semantic: these, or the formats masks and "
            "voc_segmentation), or another head."
        )
    if not len(dataset):
        raise DataError(
            f"The split '{injected['split']}' of data '{options['name']}' has no pictures. Check data.{split}. "
            f"{dataset.problems.summary()}"
        )
    return dataset


def open_train_and_val(data: dict[str, Any], needs: frozenset[str], open_set: bool = False) -> tuple[Dataset, Dataset]:
    """Both splits; they must agree on the classes, but for a head of an open set."""
    if data.get("train", "train") == data.get("val", "val"):
        raise ConfigError(
            f"'data.train' and 'data.val' both name the split '{data.get('train', 'train')}': scores on pictures that "
            "were trained on say nothing. Give different splits."
        )
    train, val = open_split(data, "train", needs), open_split(data, "val", needs)
    if train.classes != val.classes and not open_set:
        raise DataError(
            f"The splits disagree on the classes: training has {train.classes}; validation has {val.classes}. "
            "Name them once with data.class_names."
        )
    return train, val
