"""Options of a prediction, validated where they are built. Nothing heavy is imported, so that the command line refuses
a mistake at once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from detkit.errors import ConfigError, DataError, check_range

DEFAULT_CONF = 0.25
RANGES: dict[str, tuple[float, ...]] = {"conf": (0, 1), "iou": (0, 1), "max_det": (1,), "threshold": (0, 2)}
"""The lowest and the highest value of each number."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of one prediction. None stands for the default of the model's task or head.

    Args:
        conf: detections need a higher score, 0..1; default 0.25.
        iou: of two boxes of one class with a higher IoU, 0..1, the one with the lower score is removed.
        max_det: the largest number of detections in an image, at least 1.
        classes: names or labels of the classes to keep: ["WBC", 1], or one of them alone. A text is a name, or the
            decimal number of a label if no class has that name.
        gallery: for a model that gives embeddings, a gallery or its folder.
        threshold: with a gallery, the distance, 0..2, from which on an image is unknown.
        save_txt: write YOLO text, one file for each image.
        save_conf: with the score as the sixth column of the text.
        save_crop: write each detection as an image of its own.

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
            raise ConfigError("'save_conf' adds the score to the text that --save-txt writes. Give --save-txt too.")
        if isinstance(self.gallery, str | Path) and not Path(self.gallery).is_dir():
            raise DataError(
                f"The gallery '{self.gallery}' is not a folder. Give one with a folder of images for each name."
            )

    def given(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]


def _check_number(name: str, value: Any) -> None:
    kind, words = (Integral, "an integer") if name == "max_det" else (Real, "a number")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"'{name}' must be {words}, but is {value!r}, of the type {type(value).__name__}.")


def _class_list(classes: Any) -> tuple[str | int, ...] | None:
    """Names and labels as a tuple.

    Raises:
        ConfigError: they are neither names nor labels, or there are none.
    """
    if classes is None:
        return None
    items = (classes,) if isinstance(classes, str | Integral) else classes
    if not isinstance(items, Sequence) and not hasattr(items, "__iter__"):
        raise ConfigError(f"'classes' must be names or labels, but is {classes!r} ({type(classes).__name__}).")
    listed = tuple(items)
    for item in listed:
        if not isinstance(item, str | Integral) or isinstance(item, bool):
            raise ConfigError(f"'classes' holds {item!r}, of the type {type(item).__name__}; give names or labels.")
    if not listed:
        raise ConfigError("'classes' is empty, so that nothing would be kept. Give names or labels, or leave it out.")
    return tuple(item if isinstance(item, str) else int(item) for item in listed)
