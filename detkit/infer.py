"""What `detkit infer` writes: pictures with what was found on them, predictions.json, and what the task adds."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from detkit.data.image import find_images, read_image
from detkit.data.video import is_video
from detkit.draw import write_image
from detkit.errors import DataError, counted
from detkit.gallery import Gallery
from detkit.infer_video import infer_video
from detkit.limits import check_options, check_output
from detkit.overlap import Behind, ahead
from detkit.predict import Predictor
from detkit.tasks.base import write_json
from detkit.terminal import Console
from detkit.types import Meta

READ_AHEAD, WRITE_BEHIND = 4, 1
"""Pictures that wait to be predicted and to be drawn and written, beyond a batch of each."""


def infer(
    predictor: Predictor,
    source: str,
    output: Path,
    *,
    batch: int = 1,
    skip_broken: bool = False,
    save_images: bool = True,
    save_json: bool = True,
    **options: Any,
) -> int:
    """Predict on every picture of `source`, or every frame of a film, and write what is asked for into `output`.

    Args:
        options: those of the model's task (Task.options); of a detector conf, iou, max_det, classes, save_txt,
            save_conf, save_crop; of a model that gives embeddings gallery (a folder, see detkit.gallery) and threshold.

    Returns:
        How many pictures were left out because they are broken.

    Raises:
        DataError: there is no picture, or one is broken and `skip_broken` is false.
        ConfigError: an option makes no sense, or has no use for the model's task; or `output` is no folder.
    """
    files = [] if is_video(source) else find_images(source)
    choices = predictor.task.complete(options)
    check_options({**options, "batch": batch})
    check_output(output)
    limits = _limits(predictor, options, batch)
    common: dict[str, Any] = {"batch": batch, "save_images": save_images, "save_json": save_json}
    common |= {"choices": choices, "limits": limits}
    if is_video(source):
        return infer_video(predictor, source, output, **common)
    return _infer_pictures(predictor, files, output, skip_broken=skip_broken, **common)


def _infer_pictures(
    predictor: Predictor,
    files: Sequence[Path],
    output: Path,
    *,
    batch: int,
    skip_broken: bool,
    save_images: bool,
    save_json: bool,
    choices: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> int:
    """As `infer`, of files; `choices` are all options of the model's task, `limits` those that `predict_all` takes."""
    console, task = Console(), predictor.task
    names = unique_names(files)
    ids = image_ids(list(names.values()))
    results: list[dict[str, Any]] = []
    broken: list[DataError] = []
    pictures = ahead(_read, files, batch + READ_AHEAD)

    def write(name: str, image: np.ndarray, found: Any, meta: Meta) -> None:
        if save_images:
            write_image(output / "pictures" / f"{name}.jpg", task.draw(image, found))
        task.write(output, name, image, found, meta, choices)

    if save_json and (output / "predictions.json").exists():
        console.print(f"{output} has results of before: files of the same name are replaced, others stay")
    # Of the first batch much of the time is for what is done once: loading, compiling.
    started, timed = 0.0, 0
    starts = track(range(0, len(files), batch), "predicting", console=console, disable=not console.is_terminal)
    try:
        with closing(pictures), Behind(batch + WRITE_BEHIND) as behind:
            for start in starts:
                whole, errors = _sort_out(zip(files[start : start + batch], pictures), skip_broken)
                found_all = predictor.predict_all([image for _, image in whole], batch_size=batch, **limits)
                for (file, image), found in zip(whole, found_all):
                    name = names[file]
                    meta = Meta(ids[name], str(file), (image.shape[0], image.shape[1]))
                    results += task.records(found, meta, predictor.model.classes)
                    console.print(f"{file}: {task.describe(found)}")
                    behind.submit(write, name, image, found, meta)
                if errors and not skip_broken:
                    raise DataError(
                        f"{errors[0]} What was found before it is in '{output}'. To leave broken pictures out: "
                        f"--skip-broken true."
                    )
                broken += errors
                timed += len(whole) if started else 0
                if whole and not started:
                    started = time.perf_counter()
    finally:
        # After an error or an interruption, too: nothing that was found is lost.
        if save_json:
            write_json(output / "predictions.json", results)
    ended = time.perf_counter()
    for message in broken:
        console.print(f"left out: {message}")
    count = len(files) - len(broken)
    each = f" ({1000 * (ended - started) / timed:.0f} ms each after the first {batch})" if timed else ""
    console.print(f"{counted(count, 'picture')}{each}, {len(results)} {task.noun}, {len(broken)} left out -> {output}")
    return len(broken)


def _limits(predictor: Predictor, options: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Those of the options by which a prediction itself is made, for `Predictor.predict_all`."""
    limits = {name: options[name] for name in ("conf", "iou", "max_det", "classes") if name in options}
    if "gallery" in options:
        limits["gallery"] = Gallery.read(predictor, options["gallery"], options.get("threshold"), batch)
    return limits


def _read(file: Path) -> np.ndarray | DataError:
    """The pixels, or why there are none: a value, so that reading ahead does not end at it."""
    try:
        return read_image(file)
    except DataError as error:
        return error


def _sort_out(
    pictures: Iterable[tuple[Path, np.ndarray | DataError]], skip_broken: bool
) -> tuple[list[tuple[Path, np.ndarray]], list[DataError]]:
    """Those that could be read, and why the others could not; up to the first broken one unless they are left out."""
    whole: list[tuple[Path, np.ndarray]] = []
    errors: list[DataError] = []
    for file, picture in pictures:
        if not isinstance(picture, DataError):
            whole.append((file, picture))
            continue
        errors.append(picture)
        if not skip_broken:
            break
    return whole, errors


def unique_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name without suffix for each file: its stem where that is unique, else with its folder and suffix."""
    stems = Counter(file.stem for file in files)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    numbers: dict[str, int] = defaultdict(lambda: 1)
    for file in files:
        name = file.stem if stems[file.stem] == 1 else "_".join([*file.parent.parts[-1:], file.name]).replace(".", "_")
        unique = name
        while unique in taken:
            numbers[name] += 1
            unique = f"{name}_{numbers[name]}"
        taken.add(unique)
        names[file] = unique
    return names


def image_ids(names: Sequence[str]) -> dict[str, int | str]:
    """COCO's image_id of each name: the number that the file is named by (000000000139), where no other file has the
    same number; else the name."""
    numbers = Counter(int(name) for name in names if name.isdecimal())
    return {name: int(name) if name.isdecimal() and numbers[int(name)] == 1 else name for name in names}


def numbered_folder(path: Path) -> Path:
    """`path`, or `path`2, `path`3 ... where it exists already."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
