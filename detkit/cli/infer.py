"""Draw predictions on images: detkit infer RUN --source IMAGE|FOLDER|'*.jpg'|VIDEO."""

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
        checkpoint: a run's folder, or a checkpoint file.
        source: an image, a folder of images, a glob in quotes, or a video.
        output: the folder to write to; default runs/infer/run, run2 ...
        conf: detections need a higher score, 0..1; default 0.25.
        iou: of two boxes of one class with a higher IoU, the one with the lower score is removed; default as trained.
        max_det: detections of an image, at most; default as trained.
        classes: names or numbers of the classes to keep, with commas between: WBC,RBC; default all.
        proposals: source of the regions, for a head that needs them; default as trained.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the hardware has matrix units for it
            (AMX, tensor cores), else fp32.
        compile: let TorchInductor compile the network, which takes a minute the first time.
        batch: images in a batch.
        skip_broken: skip unreadable images, and list them at the end, instead of stopping.
        save_images: write images with the predictions drawn.
        save_json: write predictions.json, COCO results with boxes as xywh pixels.
        save_txt: write YOLO text, a file for each image.
        save_conf: with the score as sixth column of the text.
        save_crop: write each detection as an image of its own.
        gallery: for a model that gives embeddings, a folder of known things: a folder of images for each name, or
            images named by their files; each image of `source` gets the name of the nearest.
        threshold: the distance to it, 0..2, from which on an image is unknown; default the best of the evaluation.
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
    """Predict on all images of the source, and write the results."""
    refuse_config("infer", arguments)
    options = parse_options(InferOptions, "infer", arguments)
    if options is None:
        return
    from detkit.inference.paths import check_output, check_source
    from detkit.io.runs import resolve_checkpoint

    # Mistakes that can be found without the model are reported before the time that torch and the model take to load.
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
        console.print(
            "compiling  before the first image: minutes for a large network, seconds where it was kept before"
        )
    common = {name: getattr(options, name) for name in ("batch", "skip_broken", "save_images", "save_json")}
    infer(predictor, options.source, output, prediction, **common)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: those of torch create half a million objects that stay, and searching them for garbage again and
    again takes half a second."""
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
