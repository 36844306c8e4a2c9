"""Run a model on images or a video: detkit infer RUN --source IMAGE|FOLDER|'*.jpg'|VIDEO."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from detkit.cli.parser import parse_options, refuse_config
from detkit.errors import check_range
from detkit.io.terminal import Console
from detkit.tasks.options import PredictOptions


@dataclass(frozen=True)
class InferOptions:
    """Options of `detkit infer`.

    Args:
        checkpoint: a run folder or a checkpoint file.
        source: an image, a folder of images, a quoted glob pattern or a video.
        output: folder to write to; default runs/infer/run, run2 ...
        conf: score threshold, 0..1; only detections with a higher score are kept; default 0.25.
        iou: NMS threshold, 0..1; of two boxes of one class with a higher IoU, the lower-scoring one is removed;
            default as trained.
        max_det: maximum number of detections per image; default as trained.
        classes: comma-separated names or labels of the classes to keep: WBC,RBC; default all.
        proposals: proposal source, for a head that needs one; default as trained.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: auto, fp32, bf16 or fp16; auto is bf16 if the hardware has matrix units for it
            (AMX, tensor cores), otherwise fp32.
        compile: compile the network with TorchInductor, which takes about a minute the first time.
        batch: batch size.
        skip_broken: skip unreadable images and list them at the end instead of stopping.
        save_images: write images with the predictions drawn.
        save_json: write predictions.json, in COCO results format with boxes as xywh pixels.
        save_txt: write one YOLO text file per image.
        save_conf: add the score as the sixth column of these files.
        save_crop: write each detection as a separate image.
        gallery: for an embedding model, a folder of reference images, in one subfolder per name or named by file; each
            image of `source` gets the name of its nearest reference image.
        threshold: distance to the gallery, 0..2, from which an image is unknown; default as found in evaluation.
    """

    checkpoint: str
    source: str
    output: str | None = None
    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    classes: str | None = None
    proposals: dict[str, Any] | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    batch: int = 1
    skip_broken: bool = False
    save_images: bool = True
    save_json: bool = True
    save_txt: bool = False
    save_conf: bool = False
    save_crop: bool = False
    gallery: str | None = None
    threshold: float | None = None


def run(arguments: list[str]) -> None:
    """Predict on all images of the source and write the results."""
    refuse_config("infer", arguments)
    options = parse_options(InferOptions, "infer", arguments)
    if options is None:
        return
    from detkit.inference.paths import check_output, check_source
    from detkit.io.runs import resolve_checkpoint

    # Importing torch and loading the model takes seconds, so user errors are reported first where possible.
    checkpoint = resolve_checkpoint(options.checkpoint)
    prediction = _prediction(options)
    check_range("", 1, batch=options.batch)
    check_source(options.source)
    output = Path(options.output or "runs/infer/run")
    check_output(output, options.source)

    from detkit.engine.malloc import keep_freed_memory

    with _no_garbage_collection():
        from detkit.inference.images import infer
        from detkit.inference.predictor import load

        predictor = load(checkpoint, options.device, options.proposals, options.precision, options.compile)
    if predictor.device.type == "cpu":
        keep_freed_memory()
    console = Console()
    console.print(f"checkpoint {checkpoint}\nclasses    {predictor.model.classes}")
    console.print(f"runs on    {predictor.network.choices}")
    if options.compile:
        console.print("compiling  before the first image: minutes for a large network, seconds if it is in the cache")
    common = {name: getattr(options, name) for name in ("batch", "skip_broken", "save_images", "save_json")}
    infer(predictor, options.source, output, prediction, **common)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection during imports: torch creates half a million permanent objects, and scanning them
    repeatedly takes half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _prediction(options: InferOptions) -> PredictOptions:
    values = {field.name: getattr(options, field.name) for field in fields(PredictOptions)}
    if options.classes is not None:
        values["classes"] = [name.strip() for name in options.classes.strip("[]").split(",")]
    return PredictOptions(**values)
