"""YOLOX in detkit beside Ultralytics' YOLO of about the same FLOPs, from an image's file to boxes.

Their networks differ, so that there is nothing to compare but time. Both have random weights; each gets the threshold
at which it finds about 100 boxes in the first image, so that there is something to suppress and to scale back.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Row
from benchmarks.options import InferenceOptions
from detkit.config import Experiment, InputOptions
from detkit.errors import DetkitError, nearest
from detkit.inference.optimization import Precision
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model
from detkit.structures import ClassList
from detkit.tasks.drawing import write_image

PEERS = {"yolox_s": "yolov8s.yaml", "yolox_m": "yolov8m.yaml", "yolox_l": "yolov8l.yaml"}
"""Of 26.8, 73.8 and 155.6 GFLOPs at 640 px; Ultralytics' have 28.6, 78.9 and 165.2."""
SIZES = {"yolox_s": (0.33, 0.5), "yolox_m": (0.67, 0.75), "yolox_l": (1.0, 1.0)}
"""Depth and width."""
CLASSES = 80
SIDE = 640
BOXES = 100
STEPS = 16
SCALE = 6


class Timing(NamedTuple):
    """One prediction.

    Args:
        ms: on the clock.
        cpu_ms: of the processor, all threads together; on a busy machine the fairer one.
        boxes: that were found.
    """

    ms: float
    cpu_ms: float
    boxes: int


Predict = Callable[[str, float], Timing]
"""From a file and a threshold of scores."""


class Peer:
    """Ultralytics in a process of another Python; see benchmarks.ultralytics_predict.

    Raises:
        DetkitError: the Python does not start, or lacks ultralytics.
    """

    def __init__(self, python: str, model: str, threads: int, folder: Path) -> None:
        self._errors = folder / "errors.txt"
        program = Path(__file__).with_name("ultralytics_predict.py")
        try:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    [python, str(program.absolute()), model, str(SIDE), str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=folder,
                )
        except OSError as error:
            raise DetkitError(f"The Python '{python}' of --peer-python does not start: {error.strerror}.") from None
        self.about = self._answer()

    def predict(self, file: str, conf: float) -> Timing:
        """As `Predict` says."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended: that there is no answer says so
            self._process.stdin.write(json.dumps({"file": file, "conf": conf}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.about["threads"] = answer["threads"]
        return Timing(answer["ms"], answer["cpu_ms"], answer["boxes"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            if not line:
                self._process.wait()
                reason = (self._errors.read_text().strip().splitlines() or [f"status {self._process.returncode}"])[-1]
                raise DetkitError(
                    f"Ultralytics failed in the Python of --peer-python: {reason}. It needs a Python with ultralytics: "
                    f"python -m venv peer && peer/bin/pip install ultralytics, then --peer-python peer/bin/python."
                )
            if line.startswith("{"):  # ultralytics prints remarks of its own
                answer: dict[str, Any] = json.loads(line)
                return answer


def yolo_case(name: str, images: Sequence[np.ndarray], options: InferenceOptions) -> Case:
    """One size of YOLOX, and with `options.peer_python` Ultralytics' peer, on the CPU.

    Raises:
        DetkitError: the peer does not start, or a precision is not to be had.
    """
    with tempfile.TemporaryDirectory() as folder, _peer(name, options, Path(folder)) as peer:
        files = _files(images, Path(folder))
        sides: dict[str, Predict] = {} if peer is None else {"ultralytics": peer.predict}
        choices = {}
        ways: dict[str, tuple[Precision, bool]] = {"detkit": (options.precision, options.compile)}
        if options.precision != "fp32" or options.compile:
            ways["detkit, fp32"] = ("fp32", False)
        for label, (precision, compile) in ways.items():
            predictor = Predictor(yolox(name, options.seed, images[0]), "cpu", precision=precision, compile=compile)
            sides[label] = partial(_predict, predictor)
            choices[label] = predictor.network.choices
        thresholds = {side: threshold(call, files[0]) for side, call in sides.items()}
        samples = _in_turns(sides, files, thresholds, options)
        rows = [_row(side, samples[side], len(files)) for side in sides]
        for row in rows:
            if peer is not None and row.median_us is not None and rows[0].median_us is not None:
                row.ratio = rows[0].median_us / row.median_us
        facts: dict[str, Any] = {
            "choices": choices,
            "gflops": _gflops(yolox(name, options.seed, images[0])),
            "peer": None if peer is None else {"model": PEERS[name], **peer.about},
            "cpu_ms": {side: statistics.median(t.cpu_ms for t in taken) for side, taken in samples.items()},
            "boxes": {side: [t.boxes for t in taken[: len(files)]] for side, taken in samples.items()},
        }
    return Case(name, "cpu", f"{SIDE} px", len(files), rows, facts)


def yolox(name: str, seed: int, image: np.ndarray) -> Model:
    """YOLOX of a published size with random weights, its batch norms fitted to an image: without that all places would
    have one score, and a threshold would find all boxes or none.

    Raises:
        DetkitError: there is no such size here.
    """
    if name not in SIZES:
        raise DetkitError(f"--models holds '{name}'. {nearest(name, SIZES)}")
    torch.manual_seed(seed)
    depth, width = SIZES[name]
    experiment = Experiment(
        data={"name": "coco"},
        backbone={"name": "csp_darknet", "depth": depth, "width": width},
        neck={"name": "pafpn", "depth": depth},
        head={"name": "yolox"},
        input=InputOptions((SIDE, SIDE), "letterbox"),
        name=name,
    )
    model = build_model(experiment, ClassList.from_names([str(label) for label in range(CLASSES)]), load_weights=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(model.fit.image(image)[None], ((SIDE, SIDE),))
    return model.eval()


def yolo_table(cases: Sequence[Case]) -> Table:
    """Milliseconds from file to boxes, on the clock and of the processor."""
    out = Table(title="file to boxes on cpu", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "", "an image", "processor time", "times as fast"):
        out.add_column(heading, justify="left" if heading in ("model", "") else "right", no_wrap=True)
    for case in cases:
        peer = case.facts["peer"]
        for row in case.rows:
            name = f"ultralytics {peer['version']}, {peer['model']}" if row.name == "ultralytics" else row.name
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            clock = (row.median_us or 0) / case.work / 1e3
            out.add_row(case.kind, name, f"{clock:.1f} ms", f"{case.facts['cpu_ms'][row.name]:.1f} ms", ratio)
    return out


def threshold(call: Predict, file: str) -> float:
    """The score above which a side finds some BOXES boxes in an image, by bisection; there may be none so exact."""
    low, high = 0.0, 1.0  # of the exponent: random weights give scores of many orders of magnitude
    best = (BOXES, 1.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        conf = 10 ** (-SCALE * (1 - middle))
        found = call(file, conf).boxes
        best = min(best, (abs(found - BOXES), conf))
        if best[0] <= BOXES // 2:
            break
        low, high = (middle, high) if found > BOXES else (low, middle)
    return best[1]


def _gflops(model: Model) -> float:
    """Of an image of SIDE x SIDE; a multiplication and an addition are two."""
    images = torch.zeros(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, ((SIDE, SIDE),))
    return counter.get_total_flops() / 1e9


def _predict(predictor: Predictor, file: str, conf: float) -> Timing:
    clock, processor = time.perf_counter(), time.process_time()
    found = predictor.predict(file, conf=conf)
    return Timing(1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor), len(found))


def _in_turns(
    sides: dict[str, Predict], files: Sequence[str], thresholds: dict[str, float], options: InferenceOptions
) -> dict[str, list[Timing]]:
    """Every image by every side, round after round, each round beginning with another side."""
    samples: dict[str, list[Timing]] = {side: [] for side in sides}
    start = time.perf_counter()
    for number in range(options.round_count):
        order = list(sides)
        start_at = number % len(order)
        for side in order[start_at:] + order[:start_at]:
            samples[side] += [sides[side](file, thresholds[side]) for file in files]
        if time.perf_counter() - start > options.sample_seconds * len(sides):
            break
    return samples


def _row(name: str, samples: Sequence[Timing], files: int) -> Row:
    """Microseconds of a round, as the other benchmarks of whole networks have them."""
    rounds = [sum(t.ms for t in samples[at : at + files]) for at in range(0, len(samples), files)]
    median = statistics.median(rounds)
    return Row(name, median * 1e3, [round(ms * 1e3, 3) for ms in rounds], rate=files / median * 1e3)


def _files(images: Sequence[np.ndarray], folder: Path) -> list[str]:
    paths = [folder / f"{number}.jpg" for number in range(len(images))]
    for path, image in zip(paths, images):
        write_image(path, image)
    return [str(path) for path in paths]


@contextmanager
def _peer(name: str, options: InferenceOptions, folder: Path) -> Iterator[Peer | None]:
    if options.peer_python is None:
        yield None
        return
    peer = Peer(options.peer_python, PEERS[name], options.threads, folder)
    try:
        yield peer
    finally:
        peer.close()
