"""What `detkit infer` writes: pictures with boxes, COCO JSON, YOLO text, crops."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from detkit.boxes.convert import xyxy_to_cxcywh
from detkit.data.image import find_images, read_image
from detkit.draw import draw_detections, write_image
from detkit.errors import ConfigError, DataError
from detkit.metrics.detection import coco_results, write_coco_results
from detkit.predict import Predictor
from detkit.types import Detections, Meta


def infer(
    predictor: Predictor,
    source: str,
    output: Path,
    *,
    conf: float = 0.25,
    iou: float | None = None,
    max_det: int | None = None,
    classes: Sequence[str] | None = None,
    batch: int = 1,
    skip_broken: bool = False,
    save_images: bool = True,
    save_json: bool = True,
    save_txt: bool = False,
    save_conf: bool = False,
    save_crop: bool = False,
) -> int:
    """Detect objects in every picture of `source`, and write what is asked for into `output`.

    Returns:
        How many pictures were left out because they are broken.

    Raises:
        DataError: there is no picture, or one is broken and `skip_broken` is false.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    files = find_images(source)
    if batch < 1:
        raise ConfigError(f"'batch' must be at least 1, but is {batch}.")
    names = unique_names(files)
    ids = image_ids(list(names.values()))
    results: list[dict[str, Any]] = []
    broken: list[str] = []
    for start in track(range(0, len(files), batch), "detecting", console=console, disable=not console.is_terminal):
        chunk = []
        for file in files[start : start + batch]:
            try:
                chunk.append((file, read_image(file)))
            except DataError as error:
                if not skip_broken:
                    raise DataError(f"{error} To leave broken pictures out: --skip-broken true.") from None
                broken.append(str(error))
        found_all = predictor.predict_all(
            [image for _, image in chunk], conf=conf, iou=iou, max_det=max_det, classes=classes, batch_size=batch
        )
        for (file, image), found in zip(chunk, found_all):
            name = names[file]
            meta = Meta(ids[name], str(file), (image.shape[0], image.shape[1]))
            results += coco_results(found, meta, predictor.model.classes)
            console.print(f"{file}: {_counts(found)}")
            if save_images:
                write_image(output / "pictures" / f"{name}.jpg", draw_detections(image, found))
            if save_txt:
                _write_text(output / "labels" / f"{name}.txt", found, meta.size, save_conf)
            if save_crop:
                _write_crops(output / "crops", name, image, found)
    if save_json:
        write_coco_results(output / "predictions.json", results)
    for message in broken:
        console.print(f"left out: {message}")
    console.print(f"{len(files) - len(broken)} pictures, {len(results)} detections, {len(broken)} left out -> {output}")
    return len(broken)


def unique_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name without suffix for each file: its stem where that is unique, else with its folder and suffix."""
    stems = Counter(file.stem for file in files)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name = file.stem if stems[file.stem] == 1 else "_".join([*file.parent.parts[-1:], file.name]).replace(".", "_")
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        names[file] = unique
    return names


def image_ids(names: Sequence[str]) -> dict[str, int | str]:
    """COCO's image_id of each name: the number that the file is named by (000000000139), where no other file has the
    same number; else the name."""
    numbers = Counter(int(name) for name in names if name.isdecimal())
    return {name: int(name) if name.isdecimal() and numbers[int(name)] == 1 else name for name in names}


def _counts(found: Detections) -> str:
    counts: dict[str, int] = {}
    for _, _, name in found:
        counts[str(name)] = counts.get(str(name), 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing found"


def _write_text(path: Path, found: Detections, size: tuple[int, int], with_score: bool) -> None:
    """YOLO's text: `class cx cy w h [score]`, normalised to 0..1; an empty file for no detections."""
    height, width = size
    lines = []
    centres = xyxy_to_cxcywh(found.boxes).tolist()
    for (x, y, w, h), score, label in zip(centres, found.scores.tolist(), found.labels.tolist()):
        line = f"{label} {x / width:.6f} {y / height:.6f} {w / width:.6f} {h / height:.6f}"
        lines.append(f"{line} {score:.6f}" if with_score else line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_crops(folder: Path, name: str, image: Any, found: Detections) -> None:
    """One file for each detection, in a folder for each class."""
    height, width = image.shape[:2]
    for number, (box, _, class_name) in enumerate(found, start=1):
        left, top = int(box[0]), int(box[1])
        right, bottom = min(width, max(left + 1, round(box[2]))), min(height, max(top + 1, round(box[3])))
        crop = image[min(top, height - 1) : bottom, min(left, width - 1) : right]
        write_image(folder / str(class_name).replace("/", "_") / f"{name}_{number}.jpg", crop)


def numbered_folder(path: Path) -> Path:
    """`path`, or `path`2, `path`3 ... where it exists already."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
