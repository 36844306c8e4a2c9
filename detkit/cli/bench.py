"""Measure the prediction speed of a model: detkit bench RUN [--source IMAGES] [--batch 8] [--json FILE]."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detkit.cli.parser import parse_options, refuse_config
from detkit.errors import check_range
from detkit.io.terminal import Console

if TYPE_CHECKING:
    import numpy as np

    from detkit.inference.predictor import Predictor

WARM_UP = 3
"""Number of untimed batches at the start; they include one-time costs (memory, threads, compilation)."""
FIRST_KEY = "detkit_bench"


@dataclass(frozen=True)
class BenchOptions:
    """Options of `detkit bench`.

    Args:
        checkpoint: a run folder or a checkpoint file.
        source: an image, a folder of images or a quoted glob pattern; reading is not timed. Default: random images of
            the network's input size, on which a detector finds little and therefore has little to suppress.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: auto, fp32, bf16 or fp16, as in detkit infer.
        compile: compile the network with TorchInductor.
        batch: batch size.
        images: number of images to time, rounded up to full batches.
        json: file to write the results to.
    """

    checkpoint: str
    source: str | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    batch: int = 1
    images: int = 50
    json: str | None = None


def run(arguments: list[str]) -> None:
    """Time a model from image arrays to predictions and print the results."""
    refuse_config("bench", arguments)
    options = parse_options(BenchOptions, "bench", arguments)
    if options is None:
        return
    from detkit.data.sources import find_images
    from detkit.inference.paths import check_results_file
    from detkit.io.files import write_json
    from detkit.io.runs import resolve_checkpoint

    checkpoint = resolve_checkpoint(options.checkpoint)
    check_range("", 1, batch=options.batch, images=options.images)
    files = None if options.source is None else find_images(options.source)
    if options.json is not None:
        check_results_file(Path(options.json), "--json", f'{{"{FIRST_KEY}"'.encode())

    figures = _measure(options, checkpoint, files)
    Console().print(
        f"checkpoint {checkpoint}\n"
        f"model      {figures['parameters'] / 1e6:.2f} M parameters, input {' x '.join(map(str, figures['input']))}\n"
        f"runs on    {figures['runs_on']}\n"
        f"processor  {figures['processor']}\n"
        f"time       {figures['median_ms']:.2f} ms per image: median over {figures['images']} images, batch size "
        f"{options.batch}; 10th and 90th percentile {figures['p10_ms']:.2f} and {figures['p90_ms']:.2f} ms\n"
        f"rate       {figures['images_per_second']:.1f} images per second"
    )
    if options.json is not None:
        write_json(options.json, figures)


def _measure(options: BenchOptions, checkpoint: str, files: list[Path] | None) -> dict[str, Any]:
    import numpy as np
    import torch

    from detkit import __version__
    from detkit.engine.malloc import keep_freed_memory
    from detkit.inference.optimization import check_choices
    from detkit.inference.predictor import Predictor, usable_device
    from detkit.model import load_model

    device = usable_device(options.device)
    check_choices(options.precision, options.compile, device)
    model = load_model(checkpoint)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # counted before batch norms are folded
    predictor = Predictor(model, options.device, None, options.precision, options.compile)
    if device.type == "cpu":
        keep_freed_memory()
    size = model.experiment.input.size
    count = -(-options.images // options.batch)
    times = _times(predictor, _images(files, size), options.batch, WARM_UP + count)[WARM_UP:]
    p10, median, p90 = np.percentile(times, (10, 50, 90)).tolist()
    return {
        FIRST_KEY: __version__,
        "checkpoint": checkpoint,
        "parameters": parameters,
        "input": list(size),
        "device": str(device),
        "precision": predictor.network.precision,
        "compiled": options.compile,
        "runs_on": predictor.network.choices,
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "source": options.source,
        "batch": options.batch,
        "images": count * options.batch,
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "images_per_second": 1e3 * len(times) / sum(times),
    }


def _images(files: list[Path] | None, size: tuple[int, int]) -> Iterator["np.ndarray"]:
    """Yield (H, W, 3) uint8 images endlessly: the files in turn, or random pixels of size (height, width)."""
    import numpy as np

    from detkit.data.image import read_image

    if files is not None:
        yield from (read_image(file) for file in cycle(files))
    random = np.random.default_rng(0)
    while True:
        yield random.integers(0, 256, (*size, 3), dtype=np.uint8)


def _times(predictor: "Predictor", images: Iterator["np.ndarray"], batch: int, count: int) -> list[float]:
    """Return the milliseconds per image of each of `count` batches, excluding the time to read the images."""
    times = []
    for _ in range(count):
        arrays = [next(images) for _ in range(batch)]
        started = time.perf_counter()
        list(predictor.predict_all(arrays, batch_size=batch))  # returns CPU tensors, so the GPU has finished
        times.append(1e3 * (time.perf_counter() - started) / batch)
    return times


def _processor(device: Any) -> str:
    """Return the name of the GPU or CPU."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
