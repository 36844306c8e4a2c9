"""Mapping of the classes declared in files to labels, given the classes that the user chooses."""

from collections.abc import Sequence
from typing import Literal

from detkit.data.dataset import checked_classes
from detkit.data.semantic import names_with_background, with_background
from detkit.errors import DataError, nearest
from detkit.structures import ClassList

OtherClasses = Literal["problem", "drop"]
"""How to treat objects of classes that data.class_names does not list: as a problem, or drop and count them."""


class ClassMap:
    """The classes of a data set, and the label of each raw id in its files.

    Args:
        declared: raw id and name of each class in the files, in the order of the labels.
        where: the file, for messages.
        class_names: the classes in the order of their labels; by default all that are declared.
        merge: merge classes of the same name into one with the first of their raw ids.
        semantic: add "background" as the first class, unless it is one of the classes.

    Attributes:
        classes: the classes by label.
        names: the names of all declared classes by raw id.
        labels: the labels by raw id, without classes that are not chosen.

    Raises:
        DataError: a name or raw id is declared twice, or a chosen class is not declared.
    """

    def __init__(
        self,
        declared: Sequence[tuple[int, str]],
        where: str,
        class_names: Sequence[str] | None = None,
        merge: bool = False,
        semantic: bool = False,
    ) -> None:
        if merge:
            first: dict[str, int] = {}
            for raw_id, name in declared:
                first.setdefault(name, raw_id)
            classes = _class_list([(raw_id, name) for name, raw_id in first.items()], where)
        else:
            classes = _class_list(declared, where)
        if semantic:
            classes = with_background(classes)
            class_names = None if class_names is None else names_with_background(class_names)
        self.classes = classes if class_names is None else _chosen(class_names, classes, where)
        self.names = dict(declared)
        label_of = {name: label for label, name in enumerate(self.classes.names)}
        self.labels = {raw_id: label_of[name] for raw_id, name in declared if name in label_of}


def _class_list(pairs: Sequence[tuple[int, str]], where: str) -> ClassList:
    names = tuple(name for _, name in pairs)
    try:
        return ClassList(names, tuple(raw_id for raw_id, _ in pairs))
    except ValueError as error:
        merge = ", or set data.merge_classes to true to merge classes of the same name"
        raise DataError(
            f"The classes of '{where}' cannot be used: {error}. Give each class a unique name and id"
            f"{merge if len({*names}) < len(names) else ''}."
        ) from None


def _chosen(class_names: Sequence[str], declared: ClassList, where: str) -> ClassList:
    """Select the classes that the user chose, with their declared raw ids.

    Raises:
        DataError: a name is not declared.
    """
    raw_ids = dict(zip(declared.names, declared.raw_ids))
    for name in class_names:
        if name not in raw_ids:
            raise DataError(
                f"data.class_names lists '{name}', a class that '{where}' does not have. {nearest(name, raw_ids)}"
            )
    return checked_classes(lambda: ClassList(tuple(class_names), tuple(raw_ids[name] for name in class_names)), where)
