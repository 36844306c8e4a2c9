"""From a checkpoint to detections in the pixels of any picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from detkit.data.image import read_image, rgb_uint8
from detkit.data.loader import collate
from detkit.data.transforms import undo
from detkit.errors import ConfigError, DataError, nearest
from detkit.model import Model, load_model
from detkit.proposals.dataset import CACHE_KEY, build_source, check_needed
from detkit.proposals.sources import ProposalSource
from detkit.types import Detections, Meta, Sample, Target

UNLIMITED = 1_000_000

Picture: TypeAlias = "str | Path | np.ndarray | Image.Image"


def load(checkpoint: str | Path, device: str = "auto", proposals: Mapping[str, Any] | None = None) -> "Predictor":
    """A predictor from a run's folder (its best checkpoint), or from a checkpoint file.

    Args:
        checkpoint: "runs/detect/quickstart", or ".../best.safetensors".
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        proposals: {"name": "selective_search", option: value}, for a model whose head needs proposals; by default what
            it was trained with.

    Raises:
        CheckpointError: there is no such checkpoint, or it is broken.
        ConfigError: there is no such device, or the proposals do not go with the model or with new pictures.
    """
    return Predictor(load_model(checkpoint), device, proposals)


class Predictor:
    """Runs a model on pictures.

    Args:
        model: with its classes and input size.
        device: where it runs.
        proposals: see `load`.
    """

    def __init__(self, model: Model, device: str = "auto", proposals: Mapping[str, Any] | None = None) -> None:
        self.source = _proposal_source(model, proposals)
        # With the channels of a pixel side by side convolutions run faster, on the CPU and on tensor cores.
        self.model = to_device(model, device).eval().to(memory_format=torch.channels_last)
        self.device = self.model.mean.device
        self.class_names = model.classes.names

    def predict(
        self,
        image: Picture,
        *,
        conf: float = 0.25,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[str | int] | None = None,
    ) -> Detections:
        """Detections in one picture, in its own pixels, best score first.

        Args:
            image: a path, an (H, W, 3) uint8 RGB array (or (H, W) grey), or a PIL image. Exif rotation of files
                and PIL images is applied.
            conf: detections need a higher score, 0..1.
            iou: of two boxes of one class that overlap more, the weaker goes; default what the head was
                trained with.
            max_det: the best that are kept; default the head's.
            classes: names or labels to keep; default all.

        Raises:
            DataError: the picture cannot be read.
            ConfigError: a threshold or class makes no sense.
        """
        return next(self.predict_all([image], conf=conf, iou=iou, max_det=max_det, classes=classes, batch_size=1))

    def predict_all(
        self,
        images: Sequence[Picture],
        *,
        conf: float = 0.25,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[str | int] | None = None,
        batch_size: int = 8,
    ) -> Iterator[Detections]:
        """Detections of each picture in turn; see `predict`."""
        wanted = self._labels(classes)
        default = self.model.head.postprocess
        for name, value in (("conf", conf), ("iou", iou)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"'{name}' must lie in 0..1, but is {value}.")
        for name, count in (("max_det", max_det), ("batch", batch_size)):
            if count is not None and count < 1:
                raise ConfigError(f"'{name}' must be at least 1, but is {count}.")
        kept = default.max_detections if max_det is None else max_det
        limits = replace(
            default,
            score_threshold=conf,
            iou_threshold=default.iou_threshold if iou is None else iou,
            max_candidates=max(default.max_candidates, kept),
            # Where classes are chosen afterwards, those left out must not use up the places.
            max_detections=kept if wanted is None else UNLIMITED,
        )
        for start in range(0, len(images), batch_size):
            arrays = [to_array(image) for image in images[start : start + batch_size]]
            for found in self._run(arrays, limits):
                if wanted is not None:
                    found = found[torch.isin(found.labels, wanted)]
                    found = found[torch.arange(min(len(found), kept))]
                yield found

    @torch.inference_mode()
    def _run(self, arrays: list[np.ndarray], limits: Any) -> list[Detections]:
        fit = self.model.fit
        batch = collate([fit(self._sample(array)) for array in arrays], fit).to(self.device)
        metas = batch.metas
        head = self.model.head
        before, head.postprocess = head.postprocess, limits
        try:
            found = head.decode(self.model(batch.images, batch.sizes, batch.proposals))
        finally:
            head.postprocess = before
        return [
            replace(undo(detections.to("cpu"), meta), class_names=self.class_names)
            for detections, meta in zip(found, metas)
        ]

    def _sample(self, array: np.ndarray) -> Sample:
        meta = Meta("", "the picture", (array.shape[0], array.shape[1]))
        proposals = None if self.source is None else self.source(array, meta.image_id)
        return Sample(array, Target.empty(), meta, proposals)

    def _labels(self, classes: Sequence[str | int] | None) -> torch.Tensor | None:
        """The labels of the classes to keep."""
        if classes is None:
            return None
        labels = []
        for given in classes:
            if given in self.class_names:
                labels.append(self.class_names.index(str(given)))
            elif str(given).isdigit() and int(given) < len(self.class_names):
                labels.append(int(given))
            else:
                raise ConfigError(f"'{given}' is no class of this model. {nearest(str(given), self.class_names)}")
        return torch.tensor(labels)


def _proposal_source(model: Model, options: Mapping[str, Any] | None) -> ProposalSource | None:
    """The source of proposals for new pictures, for a head that needs one.

    Raises:
        ConfigError: the head needs none but one is given, or the source is for the pictures of a data set only.
    """
    trained = model.experiment.proposals
    if options is None and trained is not None:
        # The cache is for pictures that are seen again in every run.
        options = {key: value for key, value in trained.items() if key != CACHE_KEY}
    check_needed(options, model.head.needs, str(model.experiment.head["name"]))
    return None if options is None else build_source(options)


def to_device(model: Model, device: str) -> Model:
    """The model on a device by its name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device '{device}' cannot be used: {reason} Use cpu or auto.") from None


def to_array(image: Picture) -> np.ndarray:
    """Any picture that a user may hold as (H, W, 3) uint8 RGB.

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
    raise DataError(f"A picture must be a path, an array or a PIL image, but this is a {type(image).__name__}.")
