"""From a checkpoint to predictions in the pixels of any image."""

import threading
from collections.abc import Iterator, Mapping, Sequence
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
from detkit.inference.optimization import FastNetwork, Precision, check_choices
from detkit.inference.windows import predict
from detkit.model import Model, load_model
from detkit.structures import Meta, Sample, Target
from detkit.tasks.base import task_of

M = TypeVar("M", bound=nn.Module)
AnyImage: TypeAlias = "str | Path | np.ndarray | Image.Image"


def load(
    checkpoint: str | Path,
    device: str = "auto",
    proposals: Mapping[str, Any] | None = None,
    precision: Precision = "auto",
    compile: bool = False,
) -> "Predictor":
    """A predictor from a run's folder (its best checkpoint), or from a checkpoint file.

    Args:
        checkpoint: "runs/detect/quickstart", or ".../best.safetensors".
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        proposals: {"name": "selective_search", option: value}, for a model whose head needs proposals; by default what
            it was trained with.
        precision: "auto", "fp32", "bf16" or "fp16"; see detkit.inference.optimization.
        compile: let TorchInductor compile the network; likewise.

    Raises:
        CheckpointError: there is no such checkpoint, or it is broken.
        ConfigError: there is no such device, the proposals do not go with the model or with new images, or the
            precision or the compiler is not to be had.
    """
    check_choices(precision, compile, usable_device(device))  # before the time that loading takes
    return Predictor(load_model(checkpoint), device, proposals, precision, compile)


class Predictor:
    """Runs a model on images; from several threads one prediction at a time.

    Attributes:
        network: the model as it runs; `network.choices` says how.

    Args:
        model: with its classes and input size. It is changed for good: see detkit.inference.optimization.FastNetwork.
        device: where it runs.
        proposals, compile: see `load`.
        precision: see `load`; by default that of the model's weights.
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
        # With the channels of a pixel side by side convolutions run faster, on the CPU and on tensor cores.
        self.model = to_device(model, device).eval().to(memory_format=torch.channels_last)
        self.network = FastNetwork(self.model, precision, compile)
        self.device = self.network.device
        self.class_names = model.classes.names
        self._one_at_a_time = threading.Lock()  # a prediction's thresholds are the head's while it runs
        self.task = task_of(model.head)

    def predict(
        self,
        image: AnyImage,
        *,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[str | int] | None = None,
        gallery: Any = None,
    ) -> Any:
        """What the model says of one image, in its own pixels: a detector's Detections, best score first.

        Args:
            image: a path, an (H, W, 3) uint8 RGB array (or (H, W) grey), or a PIL image. Exif rotation of files
                and PIL images is applied.
            conf: detections need a higher score, 0..1; default 0.25.
            iou: of two boxes of one class that overlap more, the weaker goes; default what the head was
                trained with.
            max_det: the best that are kept; default the head's.
            classes: names or labels to keep; default all.
            gallery: names what the image shows, for a model that gives embeddings (see its Gallery.read).

        Returns:
            Detections of a detector; of the other tasks what stands in detkit.structures.

        Raises:
            DataError: the image cannot be read.
            ConfigError: a threshold or class makes no sense, or is given to a model that is no detector.
        """
        options: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det, "classes": classes, "gallery": gallery}
        return next(self.predict_all([image], **options, batch_size=1))

    def predict_all(
        self,
        images: Sequence[AnyImage],
        *,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[str | int] | None = None,
        gallery: Any = None,
        batch_size: int = 8,
    ) -> Iterator[Any]:
        """What the model says of each image in turn; see `predict`."""
        if batch_size < 1:
            raise ConfigError(f"'batch' must be at least 1, but is {batch_size}.")
        given = {"conf": conf, "iou": iou, "max_det": max_det, "classes": classes, "gallery": gallery}
        options = self.task.complete({name: value for name, value in given.items() if value is not None})
        for start in range(0, len(images), batch_size):
            arrays = [to_array(image) for image in images[start : start + batch_size]]
            yield from self._run(arrays, options)

    def _run(self, arrays: list[np.ndarray], options: Mapping[str, Any]) -> list[Any]:
        fit, head = self.model.fit, self.model.head
        batch = collate([fit(self._sample(array)) for array in arrays], fit).to(self.device)
        limited = self.task.limited(head, self.class_names, options)
        with self._one_at_a_time, self.network.arithmetic(), limited as select:
            found = predict(self.model, batch, self.network)
            return [
                select(self.task.undo(prediction.to("cpu"), meta, self.class_names))
                for prediction, meta in zip(found, batch.metas)
            ]

    def _sample(self, array: np.ndarray) -> Sample:
        meta = Meta("", "the image", (array.shape[0], array.shape[1]))
        proposals = None if self.source is None else self.source(array, meta.image_id)
        return Sample(array, Target.empty(), meta, proposals)


def _proposal_source(model: Model, options: Mapping[str, Any] | None) -> ProposalSource | None:
    """The source of proposals for new images, for a head that needs one.

    Raises:
        ConfigError: the head needs none but one is given, or the source is for the images of a data set only.
    """
    trained = model.experiment.proposals
    if options is None and trained is not None:
        # The cache is for images that are seen again in every run.
        options = {key: value for key, value in trained.items() if key != CACHE_KEY}
    check_needed(options, model.head.needs, str(model.experiment.head["name"]))
    return None if options is None else build_source(options)


def to_device(model: M, device: str) -> M:
    """The model (or head) on a device by its name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    return model.to(usable_device(device))


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without memory, or that is not there, fails here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if name.startswith("cuda") and not torch.cuda.is_available():
            reason = f"torch {torch.__version__} finds no GPU (`nvidia-smi` lists those of the machine)"
        raise ConfigError(f"The device '{name}' cannot be used: {reason}. Use cpu or auto.") from None
    return device


def to_array(image: AnyImage) -> np.ndarray:
    """Any image that a user may hold as (H, W, 3) uint8 RGB.

    Raises:
        DataError: the file cannot be read, or the array has another shape or type.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return rgb_uint8(image)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return image
        raise DataError(
            f"An array to predict on must be (H, W, 3) uint8 RGB (or (H, W) grey), but this one is {image.shape} "
            f"{image.dtype}. Scale values to 0..255, drop alpha, and turn OpenCV's BGR with image[..., ::-1]."
        )
    raise DataError(f"An image must be a path, an array or a PIL image, but this is a {type(image).__name__}.")
