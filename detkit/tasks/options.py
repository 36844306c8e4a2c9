"""Prediction options, validated on construction, before the model is loaded.

This module imports nothing slow, so that the command line reports errors immediately.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from detkit.errors import ConfigError, DataError, check_range

DEFAULT_CONF = 0.25
RANGES: dict[str, tuple[float, ...]] = {"conf": (0, 1), "iou": (0, 1), "max_det": (1,), "threshold": (0, 2)}
"""The minimum and, if there is one, the maximum of each numeric option."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of one prediction. None stands for the default of the model's task or head.

    Args:
        conf: score threshold, 0..1; only detections with a higher score are kept; default 0.25.
        iou: NMS threshold, 0..1; of two boxes of one class with a higher IoU, the lower-scoring one is removed.
        max_det: maximum number of detections per image, at least 1.
        classes: names or labels of the classes to keep: ["WBC", 1], or a single one. A string is a name, or a label in
            decimal if no class has that name.
        gallery: for an embedding model, a gallery or its folder.
        threshold: with a gallery, the distance, 0..2, from which an image is unknown.
        save_txt: write one YOLO text file per image.
        save_conf: add the score as the sixth column of these files.
        save_crop: write each detection as a separate image.

    Raises:
        ConfigError: a value has the wrong type, is out of its range, or needs another option.
        DataError: the gallery is not a folder.
    """

    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    classes: str | int | Sequence[str | int] | None = None
    gallery: Any = None
    threshold: float | None = None
    save_txt: bool = False
    save_conf: bool = False
    save_crop: bool = False

    def __post_init__(self) -> None:
        for name, limits in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value)
                check_range("", *limits, **{name: value})
        object.__setattr__(self, "classes", _class_list(self.classes))
        if self.threshold is not None and self.gallery is None:
            raise ConfigError("'threshold' is the distance to the images of a gallery. Give --gallery FOLDER too.")
        if self.save_conf and not self.save_txt:
            raise ConfigError("'save_conf' adds the score to the files that --save-txt writes. Give --save-txt too.")
        if isinstance(self.gallery, str | Path) and not Path(self.gallery).is_dir():
            raise DataError(
                f"The gallery '{self.gallery}' is not a folder. Give a folder with one subfolder of images per name."
            )

    def given(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]


def _check_number(name: str, value: Any) -> None:
    kind, words = (Integral, "an integer") if name == "max_det" else (Real, "a number")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"'{name}' must be {words}, but is {value!r}, of type {type(value).__name__}.")


def _class_list(classes: Any) -> tuple[str | int, ...] | None:
    """Convert names and labels to a tuple.

    Raises:
        ConfigError: an item is neither a name nor a label, or there are none.
    """
    if classes is None:
        return None
    items = (classes,) if isinstance(classes, str | Integral) else classes
    if not isinstance(items, Sequence) and not hasattr(items, "__iter__"):
        raise ConfigError(f"'classes' must be names or labels, but is {classes!r} ({type(classes).__name__}).")
    listed = tuple(items)
    for item in listed:
        if not isinstance(item, str | Integral) or isinstance(item, bool):
            raise ConfigError(f"'classes' contains {item!r}, of type {type(item).__name__}; give names or labels.")
    if not listed:
        raise ConfigError("'classes' is empty, so no detection would be kept. Give names or labels, or omit it.")
    return tuple(item if isinstance(item, str) else int(item) for item in listed)
