"""What can be said of the wishes for a prediction before there is a model: ranges, what to read, where to write.

Nothing heavy is imported, so that the command line refuses a mistake at once.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkit.data.image import find_images
from detkit.data.video import VideoReader, is_video
from detkit.errors import ConfigError, DataError, check_range

RANGES = {"conf": (0, 1), "iou": (0, 1), "max_det": (1,), "batch": (1,), "threshold": (0, 2)}
"""Of options: the lowest and the highest value."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a prediction that make no sense, whatever the model; those left out or None are not asked for.

    Raises:
        ConfigError: one is out of its range, or without the other that it is for.
        DataError: the gallery is no folder.
    """
    for name, limits in RANGES.items():
        if options.get(name) is not None:
            check_range("", *limits, **{name: options[name]})
    gallery = options.get("gallery")
    if options.get("threshold") is not None and gallery is None:
        raise ConfigError("'threshold' is the distance to the pictures of a gallery. Give --gallery FOLDER too.")
    if options.get("save_conf") and not options.get("save_txt"):
        raise ConfigError("'save_conf' adds the score to the text that --save-txt writes. Give --save-txt too.")
    if gallery is not None and not Path(gallery).is_dir():
        raise DataError(f"The gallery '{gallery}' is no folder. Give one with a folder of pictures for each name.")


def check_source(source: str) -> None:
    """Refuse a source with no picture and no film.

    Raises:
        DataError: nothing is found, or the film cannot be opened.
    """
    if is_video(source):
        with VideoReader(source):
            return
    find_images(source)


def check_output(folder: Path) -> None:
    """Refuse a folder to write to that is none, or cannot be made or written to.

    Raises:
        ConfigError: naming the file in its place.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"The results cannot be written to '{folder}': '{existing}' is a file. Give --output FOLDER.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The results cannot be written to '{folder}', since '{existing}' may not be written to. Give --output "
            f"FOLDER with one where you may."
        )
