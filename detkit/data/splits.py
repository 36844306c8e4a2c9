"""The data sets that an experiment's `data` names: one class, two splits."""

from typing import Any, Literal

from detkit.data.dataset import Dataset
from detkit.data.dataset_wrapper import in_order
from detkit.data.duplicates import identical
from detkit.errors import ConfigError, DataError, counted
from detkit.registry import datasets, option_names

Split = Literal["train", "val"]
OF_SPLITS = ("train", "val", "allow_leaks")
"""Keys of an experiment's `data` that are not options of its format."""


def open_split(data: dict[str, Any], split: Split, needs: frozenset[str]) -> Dataset:
    """The data set of one split.

    Args:
        data: `name` of a format, its options, and those of OF_SPLITS: what the splits are called there.
        needs: the fields of Target that the head reads.

    Raises:
        ConfigError: an option is unknown, or class_names is empty.
        DataError: the data are broken, or lack a field that the head needs.
    """
    options = {key: value for key, value in data.items() if key not in OF_SPLITS}
    if options.get("class_names") in ([], ()):
        raise ConfigError("'data.class_names' lists no class. List some, or leave it out to take all.")
    injected: dict[str, Any] = {"split": str(data.get(split, split))}
    if "name" in options:
        # What costs time or memory to read is read only for a head that needs it.
        known = option_names(datasets.get(options["name"]))
        injected |= {name: name in needs for name in ("masks", "points", "semantic") if name in known}
    dataset: Dataset = datasets.build(options, "data", OF_SPLITS, **injected)
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
            f"The split '{injected['split']}' of data '{options['name']}' has no images. Check data.{split}. "
            f"{dataset.problems.summary()}"
        )
    return dataset


def open_train_and_val(data: dict[str, Any], needs: frozenset[str], open_set: bool = False) -> tuple[Dataset, Dataset]:
    """Both splits, with the labels of the first; see `check_splits` for what they must agree on."""
    check_names(data)
    train, val = open_split(data, "train", needs), open_split(data, "val", needs)
    check_splits(train, val, data, open_set)
    return train, in_order(val, train.classes.names)


def check_names(data: dict[str, Any]) -> None:
    """Refuse one split for training and validation, unless `data.allow_leaks` is true.

    Raises:
        ConfigError: the names are the same, or `data.allow_leaks` is neither true nor false.
    """
    if not isinstance(data.get("allow_leaks", False), bool):
        raise ConfigError(f"'data.allow_leaks' must be true or false, but is {data['allow_leaks']!r}.")
    if data.get("train", "train") == data.get("val", "val") and not data.get("allow_leaks"):
        raise ConfigError(
            f"'data.train' and 'data.val' both name the split '{data.get('train', 'train')}': scores on images that "
            "were trained on say nothing. Give different splits, or set data.allow_leaks to true if you mean it."
        )


def check_splits(train: Dataset, val: Dataset, data: dict[str, Any], open_set: bool = False) -> None:
    """Refuse splits with different classes, but for a head of an open set, and splits that share images.

    Raises:
        DataError: saying which classes or images.
    """
    of_train, of_val = train.classes.names, val.classes.names
    if set(of_train) != set(of_val) and not open_set:
        only_train = ", ".join(name for name in of_train if name not in of_val) or "none"
        only_val = ", ".join(name for name in of_val if name not in of_train) or "none"
        both = ", ".join(name for name in of_train if name in of_val)
        choice = f", or choose those of both: data.class_names: [{both}] and data.other_classes: drop" if both else ""
        raise DataError(
            f"The splits disagree on the classes. Only in training: {only_train}; only in validation: {only_val}. Let "
            f"the files of both declare the same classes{choice}."
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
            f"too, so that the scores would be too good: '{last}'{copy}, for example. Remove them from one of the "
            f"splits, or set data.allow_leaks to true."
        )


def _files(dataset: Dataset) -> list[str]:
    """The files of the images, of crops those that they are cut from."""
    while isinstance(inner := getattr(dataset, "dataset", None), Dataset):
        dataset = inner
    return [dataset.source(index) for index in range(len(dataset))]
