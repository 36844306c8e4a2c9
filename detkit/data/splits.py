"""Opening of the training and validation splits of an experiment's `data`."""

from typing import Any, Literal

from detkit.data.dataset import Dataset
from detkit.data.dataset_wrapper import in_order
from detkit.data.duplicates import identical
from detkit.errors import ConfigError, DataError, counted
from detkit.registry import datasets, option_names

Split = Literal["train", "val"]
SPLIT_KEYS = ("train", "val", "allow_leaks")
"""Keys of an experiment's `data` that are not options of its format."""


def open_split(data: dict[str, Any], split: Split, needs: frozenset[str]) -> Dataset:
    """Open the data set of one split.

    Args:
        data: `name` of a format, its options, and SPLIT_KEYS with the names of the splits.
        needs: the fields of Target that the head reads.

    Raises:
        ConfigError: an option is unknown, or class_names is empty.
        DataError: the data are broken, or lack a field that the head needs.
    """
    options = {key: value for key, value in data.items() if key not in SPLIT_KEYS}
    if options.get("class_names") in ([], ()):
        raise ConfigError("'data.class_names' is empty. List some classes, or leave it out to use all.")
    injected: dict[str, Any] = {"split": str(data.get(split, split))}
    if "name" in options:
        # Read expensive fields only if the head needs them.
        known = option_names(datasets.get(options["name"]))
        injected |= {name: name in needs for name in ("masks", "points", "semantic") if name in known}
    dataset: Dataset = datasets.build(options, "data", SPLIT_KEYS, **injected)
    # Proposals are added by detkit.data.proposals.
    if missing := needs - dataset.fields - {"proposals"}:
        raise DataError(
            f"The head needs {', '.join(sorted(missing))}, which the data set '{options['name']}' of split "
            f"'{injected['split']}' does not have (it has {', '.join(sorted(dataset.fields))}). Use data that has them "
            "(masks: COCO's segmentations, YOLO's polygons; semantic: the same, or the formats masks and "
            "voc_segmentation), or another head."
        )
    if not len(dataset):
        raise DataError(
            f"The split '{injected['split']}' of data '{options['name']}' has no images. Check data.{split}. "
            f"{dataset.problems.summary()}"
        )
    return dataset


def open_train_and_val(data: dict[str, Any], needs: frozenset[str], open_set: bool = False) -> tuple[Dataset, Dataset]:
    """Open both splits, with the labels of the first; see `check_splits` for the requirements."""
    check_names(data)
    train, val = open_split(data, "train", needs), open_split(data, "val", needs)
    check_splits(train, val, data, open_set)
    return train, in_order(val, train.classes.names)


def check_names(data: dict[str, Any]) -> None:
    """Check that training and validation are different splits, unless `data.allow_leaks` is true.

    Raises:
        ConfigError: the names are the same, or `data.allow_leaks` is neither true nor false.
    """
    if not isinstance(data.get("allow_leaks", False), bool):
        raise ConfigError(f"'data.allow_leaks' must be true or false, but is {data['allow_leaks']!r}.")
    if data.get("train", "train") == data.get("val", "val") and not data.get("allow_leaks"):
        raise ConfigError(
            f"'data.train' and 'data.val' both name the split '{data.get('train', 'train')}': scores on training "
            "images are meaningless. Give different splits, or set data.allow_leaks to true if this is intended."
        )


def check_splits(train: Dataset, val: Dataset, data: dict[str, Any], open_set: bool = False) -> None:
    """Check that the splits have the same classes, except for an open-set head, and share no images.

    Raises:
        DataError: naming the classes or images.
    """
    of_train, of_val = train.classes.names, val.classes.names
    if set(of_train) != set(of_val) and not open_set:
        only_train = ", ".join(name for name in of_train if name not in of_val) or "none"
        only_val = ", ".join(name for name in of_val if name not in of_train) or "none"
        both = ", ".join(name for name in of_train if name in of_val)
        choice = f", or choose the common ones: data.class_names: [{both}] and data.other_classes: drop" if both else ""
        raise DataError(
            f"The splits disagree on the classes. Only in training: {only_train}; only in validation: {only_val}. "
            f"Declare the same classes in the files of both{choice}."
        )
    if data.get("allow_leaks"):
        return
    files = _files(train)
    border, paths = len(files), [*files, *_files(val)]
    if leaks := identical(paths, border):
        count = sum(position >= border for group in leaks for position in group)
        first, last = paths[leaks[0][0]], paths[leaks[0][-1]]
        copy = "" if first == last else f", which has the same content as '{first}'"
        raise DataError(
            f"{counted(count, 'image')} of the validation split {'is' if count == 1 else 'are'} in the training split "
            f"too, so the scores would be too high: '{last}'{copy}, for example. Remove them from one of the splits, "
            f"or set data.allow_leaks to true."
        )


def _files(dataset: Dataset) -> list[str]:
    """Return the files of the images; for crops, those of the full images."""
    while isinstance(inner := getattr(dataset, "dataset", None), Dataset):
        dataset = inner
    return [dataset.source(index) for index in range(len(dataset))]
