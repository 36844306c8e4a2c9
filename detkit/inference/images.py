"""Writes the results of `detkit infer`: annotated images, predictions.json and task-specific files."""

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.progress import track

from detkit.data.image import read_image
from detkit.data.sources import search
from detkit.data.video import is_video
from detkit.errors import DataError, check_range, counted, printable
from detkit.inference.background_io import BackgroundWriter, ahead
from detkit.inference.paths import check_output, claimed_output, source_folder
from detkit.inference.predictor import Predictor
from detkit.inference.video import infer_video
from detkit.io.files import write_json
from detkit.io.terminal import Console
from detkit.structures import Meta
from detkit.tasks.drawing import write_image
from detkit.tasks.options import PredictOptions

JPEG_SIDE = 65_500
"""Maximum side of a JPEG in pixels; larger images are written as PNG."""
NO_OPTIONS = PredictOptions()
READ_AHEAD, WRITE_BEHIND = 4, 1
"""Images queued for prediction and for drawing and writing, in addition to one batch each."""


def infer(
    predictor: Predictor,
    source: str,
    output: Path,
    options: PredictOptions = NO_OPTIONS,
    *,
    batch: int = 1,
    skip_broken: bool = False,
    save_images: bool = True,
    save_json: bool = True,
) -> int:
    """Predict on every image of `source`, or every frame of a video, and write the results to `output`.

    Args:
        options: prediction options that apply to the model's task (Task.options).

    Returns:
        The number of broken images that were skipped.

    Raises:
        DataError: there are no images, or one is broken and `skip_broken` is false.
        ConfigError: an option does not apply to the model, or `output` is not a folder.
    """
    check_range("", 1, batch=batch)
    sources = None if is_video(source) else search(source)
    predictor.task.check_options(predictor.model.head, options)
    check_output(output, source)
    options = predictor.task.prepared(predictor, options, batch)
    common: dict[str, Any] = {"batch": batch, "save_images": save_images, "save_json": save_json, "options": options}
    with claimed_output(output) as folder:
        if sources is None:
            return infer_video(predictor, source, folder, **common)
        common |= {"root": source_folder(source), "skip_broken": skip_broken}
        broken = _infer_images(predictor, sources.images, folder, **common)
    if sources.passed_over:
        Console().print(sources.summary())
    return broken


def _infer_images(
    predictor: Predictor,
    files: Sequence[Path],
    output: Path,
    *,
    root: Path,
    batch: int,
    skip_broken: bool,
    save_images: bool,
    save_json: bool,
    options: PredictOptions,
) -> int:
    """Implement `infer` for image files."""
    console, task = Console(), predictor.task
    names = result_names(files, root)
    ids = image_ids(names)
    results: list[dict[str, Any]] = []
    broken: list[DataError] = []
    dark: list[str] = []
    images = ahead(partial(_read, dark=dark), files, batch + READ_AHEAD)

    def write(name: str, image: np.ndarray, found: Any, meta: Meta) -> None:
        if save_images:
            suffix = ".jpg" if max(image.shape) <= JPEG_SIDE else ".png"
            write_image(output / "images" / f"{name}{suffix}", task.draw(image, found))
        task.write(output, name, image, found, meta, options)

    # The first batch includes one-time costs (loading, compilation), so it is not timed.
    started, timed = 0.0, 0
    starts = track(range(0, len(files), batch), "predicting", console=console, disable=not console.is_terminal)
    try:
        with closing(images), BackgroundWriter(batch + WRITE_BEHIND) as writer:
            for start in starts:
                whole, errors = _sort_out(zip(files[start : start + batch], images), skip_broken)
                found_all = predictor.run([image for _, image in whole], options, batch)
                for (file, image), found in zip(whole, found_all):
                    name = names[file]
                    meta = Meta(ids[file], str(file), (image.shape[0], image.shape[1]))
                    results += task.records(found, meta, predictor.model.classes)
                    console.print(f"{file}: {task.describe(found)}")
                    writer.submit(write, name, image, found, meta)
                if errors and not skip_broken:
                    raise DataError(
                        f"{errors[0]} The results up to this image are in '{output}'. To skip broken images, use "
                        f"--skip-broken true."
                    )
                broken += errors
                timed += len(whole) if started else 0
                if whole and not started:
                    started = time.perf_counter()
    finally:
        # Also after an error or an interruption, so that no results are lost.
        if save_json:
            write_json(output / "predictions.json", results)
    ended = time.perf_counter()
    for message in broken:
        console.print(f"skipped: {message}")
    if dark:
        console.print(f"dark: {counted(len(dark), '16-bit image')}, the first: {dark[0]}")
    count = len(files) - len(broken)
    each = f" ({1000 * (ended - started) / timed:.0f} ms each after the first {batch})" if timed else ""
    console.print(f"{counted(count, 'image')}{each}, {len(results)} {task.noun}, {len(broken)} skipped -> {output}")
    return len(broken)


def _read(file: Path, dark: list[str]) -> np.ndarray | DataError:
    """Return the pixels, or the error as a value so that it does not end the prefetching.

    Notes that `read_image` makes about the file are appended to `dark`.
    """
    notes: list[str] = []
    try:
        return read_image(file, notes=notes)
    except DataError as error:
        return error
    finally:
        dark += [f"{file}: {note}" for note in notes]


def _sort_out(
    images: Iterable[tuple[Path, np.ndarray | DataError]], skip_broken: bool
) -> tuple[list[tuple[Path, np.ndarray]], list[DataError]]:
    """Split images into readable ones and errors; unless `skip_broken`, stop at the first error."""
    whole: list[tuple[Path, np.ndarray]] = []
    errors: list[DataError] = []
    for file, image in images:
        if not isinstance(image, DataError):
            whole.append((file, image))
            continue
        errors.append(image)
        if not skip_broken:
            break
    return whole, errors


def result_names(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """Name the results of each image: by its stem if that is unique, otherwise by its path relative to `root`.

    shots/a.png gives "a"; cam1/0001.png and cam2/0001.png give "cam1/0001" and "cam2/0001"; a.jpg and a.png give
    "a.jpg" and "a.png". Non-UTF-8 bytes and control characters are escaped.
    """
    paths = {file: _relative(file, root) for file in files}
    stems = Counter(path.stem for path in paths.values())
    whole = Counter(path.with_suffix("") for path in paths.values())
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file, path in paths.items():
        short = path.with_suffix("") if whole[path.with_suffix("")] == 1 else path
        wanted = path.stem if stems[path.stem] == 1 else short.as_posix()
        name = wanted = printable(os.fsencode(wanted).decode(errors="backslashreplace"))
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{wanted}_{number}"
        taken.add(name)
        names[file] = name
    return names


def _relative(file: Path, root: Path) -> Path:
    path = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    return path if ".." not in path.parts else Path(file.name)


def image_ids(names: Mapping[Path, str]) -> dict[Path, int | str]:
    """Return the COCO image_id of each image: the number in its file name (000000000139.jpg) if it is unique, otherwise
    its result name."""
    stems = {file: PurePosixPath(name).name.split(".")[0] for file, name in names.items()}
    numbers = Counter(int(stem) for stem in stems.values() if stem.isdecimal())
    return {
        file: int(stem) if stem.isdecimal() and numbers[int(stem)] == 1 else names[file] for file, stem in stems.items()
    }
