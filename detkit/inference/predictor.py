"""Loading a checkpoint and predicting on images, with results in pixels of the original image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from detkit.data.image import read_image, rgb_uint8
from detkit.data.loader import collate
from detkit.data.proposals.dataset import CACHE_KEY, build_source, check_needed
from detkit.data.proposals.sources import ProposalSource
from detkit.errors import ConfigError, DataError
from detkit.heads.base import Postprocess
from detkit.inference.optimization import FastNetwork, Precision, check_choices, usual_defaults
from detkit.inference.windows import predict
from detkit.model import Model, load_model
from detkit.structures import Meta, Prediction, Sample, Target
from detkit.tasks.base import task_of
from detkit.tasks.options import PredictOptions

M = TypeVar("M", bound=nn.Module)
AnyImage: TypeAlias = "str | Path | np.ndarray | Image.Image | torch.Tensor"


def load(
    checkpoint: str | Path,
    device: str = "auto",
    proposals: Mapping[str, Any] | None = None,
    precision: Precision = "auto",
    compile: bool = False,
) -> "Predictor":
    """Load a predictor from a run folder (its best checkpoint) or a checkpoint file.

    Args:
        checkpoint: "runs/detect/quickstart" or ".../best.safetensors".
        device: "auto" (a GPU if available), "cpu", "cuda", "cuda:1" or "mps".
        proposals: {"name": "selective_search", option: value}, for a model whose head needs proposals; default as
            trained.
        precision: "auto", "fp32", "bf16" or "fp16"; see detkit.inference.optimization.
        compile: compile the network with TorchInductor; see detkit.inference.optimization.

    Raises:
        CheckpointError: the checkpoint does not exist or is broken.
        ConfigError: the device does not exist, the proposals do not fit the model or new images, or the precision or
            compiler is not available.
    """
    check_choices(precision, compile, usable_device(device))  # report errors before the slow loading
    with usual_defaults():
        return Predictor(load_model(checkpoint), device, proposals, precision, compile)


class Predictor:
    """Runs a model on images. Thread-safe; can be pickled and copied.

    Attributes:
        network: the optimized model; `network.choices` describes how it runs.

    Args:
        model: with its classes and input size. Modified in place; see detkit.inference.optimization.FastNetwork.
        device: the device to run on.
        proposals, compile: see `load`.
        precision: see `load`; default the precision of the model's weights.
    """

    def __init__(
        self,
        model: Model,
        device: str = "auto",
        proposals: Mapping[str, Any] | None = None,
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        self.source = _proposal_source(model, proposals)
        # channels_last makes convolutions faster on CPUs and on tensor cores.
        self.model = to_device(model, device).eval().to(memory_format=torch.channels_last)
        self.network = FastNetwork(self.model, precision, compile)
        self.device = self.network.device
        self.class_names = model.classes.names
        self.task = task_of(model.head)

    def predict(
        self,
        image: AnyImage,
        *,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: str | int | Sequence[str | int] | None = None,
        gallery: Any = None,
    ) -> Any:
        """Predict on one image.

        Args:
            image: a path; an (H, W, 3) uint8 RGB or (H, W) grey array; a PIL image; or a torch tensor (3, H, W) RGB,
                uint8 or float in 0..1. The EXIF rotation of files and PIL images is applied.
            conf: score threshold, 0..1; only detections with a higher score are kept; default 0.25.
            iou: NMS threshold, 0..1; of two boxes of one class with a higher IoU, the lower-scoring one is removed;
                default that of the head.
            max_det: maximum number of detections; default that of the head.
            classes: names or labels to keep: "RBC", 1 or ["RBC", 1]; default all.
            gallery: for an embedding model, the gallery of named reference images, or its folder.

        Returns:
            Detections in pixels of the image, best score first, for a detector; for other tasks Classification,
            SemanticMap and so on, see detkit.structures.

        Raises:
            DataError: the image cannot be read.
            ConfigError: an option has an invalid value or does not apply to this model.
        """
        options = PredictOptions(conf=conf, iou=iou, max_det=max_det, classes=classes, gallery=gallery)
        return next(self.run([image], options, batch_size=1))

    def predict_all(
        self,
        images: Iterable[AnyImage],
        *,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: str | int | Sequence[str | int] | None = None,
        gallery: Any = None,
        batch_size: int = 8,
    ) -> Iterator[Any]:
        """Predict on several images; see `predict`. A generator of images is consumed lazily, batch by batch.

        Args:
            batch_size: number of images per batch.
        """
        options = PredictOptions(conf=conf, iou=iou, max_det=max_det, classes=classes, gallery=gallery)
        return self.run(images, options, batch_size)

    def run(self, images: Iterable[AnyImage], options: PredictOptions, batch_size: int) -> Iterator[Any]:
        """Implement `predict_all`. Options are checked immediately; images are read as results are consumed."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"'batch' must be an integer of at least 1, but is {batch_size!r}.")
        if isinstance(images, str | Path | np.ndarray | Image.Image):
            raise ConfigError("`predict_all` takes several images, such as a list of paths. Use `predict` for one.")
        self.task.check_options(self.model.head, options)
        options = self.task.prepared(self, options, batch_size)
        decoding = self.task.decoding(self.model.head, options, self.class_names)
        return self._batches(iter(images), options, decoding, batch_size)

    def _batches(
        self, images: Iterator[AnyImage], options: PredictOptions, decoding: Postprocess | None, batch_size: int
    ) -> Iterator[Any]:
        while arrays := [to_array(image) for image in islice(images, batch_size)]:
            yield from self._run(arrays, options, decoding)

    def _run(self, arrays: list[np.ndarray], options: PredictOptions, decoding: Postprocess | None) -> list[Any]:
        with self.network.arithmetic():
            batch = collate([self.model.fit(self._sample(array)) for array in arrays], self.model.fit)
            batch = batch.to(self.device)
            found = predict(self.model, batch, self.network, decoding)
            return [self._result(prediction, meta, options) for prediction, meta in zip(found, batch.metas)]

    def _result(self, prediction: Prediction, meta: Meta, options: PredictOptions) -> Any:
        """The prediction in pixels of the image itself, as far as the options ask for it."""
        prediction = self.task.undo(prediction.to("cpu"), meta, self.class_names)
        return self.task.select(prediction, self.model.head, options, self.class_names)

    def _sample(self, array: np.ndarray) -> Sample:
        meta = Meta("", "the image", (array.shape[0], array.shape[1]))
        proposals = None if self.source is None else self.source(array, meta.image_id)
        return Sample(array, Target.empty(), meta, proposals)


def _proposal_source(model: Model, options: Mapping[str, Any] | None) -> ProposalSource | None:
    """The source of proposals for new images, for a head that needs one.

    Raises:
        ConfigError: the head needs no proposals but a source is given, or the source is for data sets only.
    """
    trained = model.experiment.proposals
    if options is None and trained is not None:
        # The cache is for data sets, whose images are read again in every run.
        options = {key: value for key, value in trained.items() if key != CACHE_KEY}
    check_needed(options, model.head.needs, str(model.experiment.head["name"]))
    return None if options is None else build_source(options)


def to_device(model: M, device: str) -> M:
    """Move a model (or head) to a device by name; "auto" is a GPU if available.

    Raises:
        ConfigError: the device is not available.
    """
    return model.to(usable_device(device))


def usable_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU if available.

    Raises:
        ConfigError: the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails if the device does not exist or has no free memory
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if name.startswith("cuda") and not torch.cuda.is_available():
            reason = f"torch {torch.__version__} finds no GPU (`nvidia-smi` lists the GPUs of the machine)"
        raise ConfigError(f"The device '{name}' cannot be used: {reason}. Use cpu or auto.") from None
    return device


def to_array(image: AnyImage) -> np.ndarray:
    """Convert a path, PIL image, tensor or array to (H, W, 3) uint8 RGB.

    Raises:
        DataError: the file cannot be read, or the array has another shape or type.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return rgb_uint8(image)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return image
        raise DataError(
            f"An array to predict on must be (H, W, 3) uint8 RGB (or (H, W) grey), but this one is {image.shape} "
            f"{image.dtype}. Scale values to 0..255, drop alpha, and convert OpenCV's BGR with image[..., ::-1]."
        )
    raise DataError(
        f"An image must be a path, an array, a tensor or a PIL image, but this one is of type {type(image).__name__}."
    )


def _from_tensor(image: torch.Tensor) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(
            f"A tensor to predict on must be one image (3, H, W) RGB, but this one is {tuple(image.shape)}. For a "
            f"batch use predict_all(list(batch))."
        )
    if image.is_floating_point():
        if not (image.isfinite().all() and image.min() >= 0 and image.max() <= 1):
            raise DataError("A float tensor to predict on must have values in 0..1: divide by 255, do not normalise.")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError(f"A tensor to predict on must be uint8, or float in 0..1, but this one is {image.dtype}.")
    pixels: np.ndarray = image.detach().permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels
