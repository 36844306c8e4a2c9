"""`python -m benchmarks proposals`: selective search beside OpenCV's, recall of objects and images per second.

Both get the same pixels, image by image in turns: OpenCV in a process of another Python (--peer-python), since its
package with selective search and the one that detkit needs overwrite each other.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.harness import Case, Row, cpu_threads
from benchmarks.options import ProposalsOptions
from benchmarks.plot import plot_recall, require_matplotlib
from benchmarks.report import conditions, console, hardware, hardware_name, output_path, write_report
from detkit.boxes import pairwise_iou
from detkit.data.dataset import Dataset
from detkit.data.splits import open_split
from detkit.errors import DetkitError
from detkit.zoo.rcnn.selective_search import SelectiveSearch, shrink

COUNTS = (10, 50, 100, 500, 1000, 2000)
"""Numbers of proposals of an image at which the objects found are counted."""

RECALL_IOU = 0.5

Search = Callable[[np.ndarray], tuple[Tensor, float]]
"""(H, W, 3) uint8 RGB to (P, 4) float32 xyxy, best first, and the seconds it took."""


@dataclass(frozen=True)
class ImageFile:
    """One image and its objects.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) float32 xyxy pixels of the objects that count.
        labels: (N,) int64.
    """

    image: np.ndarray
    boxes: Tensor
    labels: Tensor


def bench_proposals(options: ProposalsOptions, command: str = "") -> dict[str, Any]:
    """Measure, print a table for each data set, write the JSON and the plot; returns what the JSON holds.

    Args:
        options: see there.
        command: how it was called, for the JSON.

    Raises:
        DetkitError: for an option that makes no sense, a data set that is broken, or a peer that fails.
    """
    machine, out = hardware(), console()
    path = output_path("proposals", machine, options)  # an error now, not after minutes
    if options.plot:
        require_matplotlib()
    data_sets = [
        (_title(data, options.split), _image_files(open_split(data, options.split, frozenset()), options))
        for data in _data_options(options)
    ]
    out.print(conditions(machine, options))
    searches: dict[str, Search] = {"detkit": _detkit(options)}
    with cpu_threads(options.threads), _peer(options) as peer:
        if peer is None:
            out.print("left out: OpenCV, as no --peer-python with opencv-contrib-python was given")
        else:
            searches |= {"OpenCV": peer.search}
        cases = []
        for title, images in data_sets:
            cases.append(measure(title, images, searches, options.round_count))
            out.print()
            out.print(_table(cases[-1]), soft_wrap=False)
        version = None if peer is None else peer.version
    path, report = write_report("proposals", cases, options, machine, command, peer_opencv=version)
    out.print(f"\nresults -> {path}")
    if options.plot:
        image = plot_recall(cases, hardware_name(machine), path.with_suffix(".png"))
        out.print(f"plot    -> {image}")
    return report


def measure(title: str, images: Sequence[ImageFile], searches: Mapping[str, Search], rounds: int) -> Case:
    """Time all candidates image by image in turns, and compare what they propose with the objects.

    Args:
        title: of the data set.
        images: at least one.
        searches: candidates by name; the one named OpenCV is what the ratio refers to.
        rounds: passes over the images.

    Returns:
        A case whose facts hold, by candidate, the `recall` of objects with an IoU of 0.5 or more, the best overlap of
        an object as the mean of each class and over these (`mabo`), both by the number of proposals, and the mean
        number of `proposals` of an image.
    """
    for search in searches.values():
        search(images[0].image)  # compiles, or loads what is compiled
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in images] for name in searches}
    found: dict[str, list[Tensor]] = {name: [] for name in searches}
    names = list(searches)
    for number in range(rounds):
        for index, image in enumerate(images):
            for name in names[:: 1 if (number + index) % 2 == 0 else -1]:
                proposals, taken = searches[name](image.image)
                seconds[name][index].append(taken)
                if number == 0:
                    found[name].append(proposals)
    rows = [_row(name, seconds[name]) for name in names]
    reference = next((row.rate for row in rows if row.name == "OpenCV"), None)
    for row in rows:
        row.ratio = row.rate / reference if row.rate and reference else None
    facts: dict[str, Any] = {"objects": sum(len(image.boxes) for image in images), "recall": {}, "mabo": {}}
    for name in names:
        overlaps = best_overlaps(images, found[name])
        facts["recall"][name] = {count: recall(found_by) for count, found_by in overlaps.items()}
        facts["mabo"][name] = {count: mean_average(found_by, images) for count, found_by in overlaps.items()}
    facts["proposals"] = {name: statistics.mean(map(len, found[name])) for name in names}
    return Case(title, "cpu", f"{len(images)} images", len(images), rows, facts)


def best_overlaps(images: Sequence[ImageFile], proposals: Sequence[Tensor]) -> dict[int, Tensor]:
    """For each of COUNTS: (objects of all images,) the best IoU with so many first proposals of its image."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for image, boxes in zip(images, proposals):
        for count in COUNTS:
            ious = pairwise_iou(image.boxes, boxes[:count])
            found[count].append(ious.amax(1) if ious.shape[1] else ious.new_zeros(len(ious)))
    return {count: torch.cat(parts) for count, parts in found.items()}


def recall(overlaps: Tensor) -> float:
    """The part of objects, of (N,) best IoUs, that is found."""
    return (overlaps >= RECALL_IOU).float().mean().item()


def mean_average(overlaps: Tensor, images: Sequence[ImageFile]) -> float:
    """The mean over the classes of the mean best IoU of their objects, (N,) over all images."""
    labels = torch.cat([image.labels for image in images])
    return torch.stack([overlaps[labels == label].mean() for label in labels.unique()]).mean().item()


class Peer:
    """OpenCV's selective search in a process of another Python; see benchmarks.opencv_search.

    Raises:
        DetkitError: the Python does not start, or lacks OpenCV's selective search.
    """

    def __init__(self, python: str, mode: str, threads: int, folder: Path) -> None:
        self._image = folder / "image.npy"
        self._errors = folder / "errors.txt"
        program = Path(__file__).with_name("opencv_search.py")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(program), mode, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.version = str(self._answer()["version"])

    def search(self, image: np.ndarray) -> tuple[Tensor, float]:
        """As `Search` says; the seconds are those of the search alone."""
        np.save(self._image, image)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._image}\n")
        self._process.stdin.flush()
        seconds = float(self._answer()["seconds"])
        with np.load(self._image.with_suffix(".npz")) as arrays:
            return torch.from_numpy(arrays["boxes"]), seconds

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = (self._errors.read_text().strip().splitlines() or [f"status {self._process.returncode}"])[-1]
            raise DetkitError(
                f"OpenCV's selective search failed in the Python of --peer-python: {reason}. It needs a Python with "
                "opencv-contrib-python-headless: python -m venv peer && peer/bin/pip install "
                "opencv-contrib-python-headless, then --peer-python peer/bin/python."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def _peer(options: ProposalsOptions) -> Iterator[Peer | None]:
    if options.peer_python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options.peer_python, options.mode, options.threads, Path(folder))
        try:
            yield peer
        finally:
            peer.close()


def _detkit(options: ProposalsOptions) -> Search:
    source = SelectiveSearch(options.mode, count=COUNTS[-1], longest_side=None)

    def search(image: np.ndarray) -> tuple[Tensor, float]:
        start = time.perf_counter()
        proposals = source(image)
        return proposals, time.perf_counter() - start

    return search


def _row(name: str, seconds: Sequence[Sequence[float]]) -> Row:
    """Of each image the median of its passes counts."""
    medians = [statistics.median(of_image) for of_image in seconds]
    return Row(
        name,
        median_us=statistics.median(medians) * 1e6,
        samples_us=[round(second * 1e6, 1) for of_image in seconds for second in of_image],
        rate=len(medians) / sum(medians),
    )


def _data_options(options: ProposalsOptions) -> list[dict[str, Any]]:
    if options.config is not None:
        from detkit.config import load_experiment

        return [load_experiment([options.config], []).data]
    return options.data if isinstance(options.data, list) else [options.data or {}]


def _title(data: Mapping[str, Any], split: str) -> str:
    return f"{Path(str(data['root'])).name if 'root' in data else data.get('name')} {split}"


def _image_files(dataset: Dataset, options: ProposalsOptions) -> list[ImageFile]:
    """The first images of a data set, shrunk, with the objects that count: no crowds, none that are difficult.

    Raises:
        DetkitError: they have no objects.
    """
    images = []
    for index in range(min(options.image_count, len(dataset))):
        sample = dataset[index]
        target = dataset.target(index)
        image = np.ascontiguousarray(shrink(np.asarray(sample.image), options.longest_side))
        scale = torch.tensor([image.shape[1] / sample.image.shape[1], image.shape[0] / sample.image.shape[0]] * 2)
        counts = ~target.ignored
        images.append(ImageFile(image, target.boxes[counts] * scale, target.labels[counts]))
    if not any(len(photo.boxes) for photo in images):
        raise DetkitError(f"The first {len(images)} images have no object to find. Raise --images.")
    return images


def _table(case: Case) -> Table:
    out = Table(
        title=f"{case.kind}: {case.size}, {case.facts['objects']} objects",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    out.add_column("", no_wrap=True)
    for heading in ("images a second", "times as fast", *(f"{count:,}" for count in COUNTS)):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in case.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}"
        recalls = (f"{value:.3f}" for value in case.facts["recall"][row.name].values())
        out.add_row(f"{row.name}, recall at IoU {RECALL_IOU}", f"{row.rate:.2f}", ratio, *recalls)
    for row in case.rows:
        overlaps = (f"{value:.3f}" for value in case.facts["mabo"][row.name].values())
        out.add_row(f"{row.name}, mean average best overlap", "", "", *overlaps)
    return out
