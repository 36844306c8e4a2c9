"""Weights that torchvision and others publish, under detkit's names, with the experiment and classes they belong to."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.config import Experiment
from detkit.errors import CheckpointError, nearest
from detkit.published.classifiers import NETWORKS, convert_classifier
from detkit.published.darknet import read_darknet
from detkit.published.fcn import convert_fcn
from detkit.published.mtcnn import convert_mtcnn, mtcnn_files
from detkit.published.rcnn import convert_rcnn
from detkit.published.retinanet import convert_retinanet
from detkit.published.ssd import convert_ssd300_vgg16
from detkit.published.yolox import STEM, convert_yolox
from detkit.runs import MTCNN, TORCHVISION
from detkit.types import ClassList

DARKNET_SUFFIX = ".weights"
PUBLISHED = (
    "ssd300_vgg16",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcn_resnet50",
    "fcn_resnet101",
    *NETWORKS,
)
Converter = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], Experiment, ClassList]]
CONVERTERS: dict[str, Converter] = {
    # by a tensor that only this family has
    "backbone.scale_weight": convert_ssd300_vgg16,
    "rpn.head.cls_logits.weight": convert_rcnn,
    "head.classification_head.cls_logits.weight": convert_retinanet,
    STEM: convert_yolox,
    "classifier.1.running_mean": convert_fcn,
    **dict.fromkeys(("fc.weight", "classifier.weight", "classifier.6.weight"), convert_classifier),
}


def is_published(source: str) -> bool:
    """Whether `source` is "torchvision:" and a name, "mtcnn:" and a folder, a .pth file, or a .weights file of
    Darknet's."""
    return source.startswith((TORCHVISION, MTCNN)) or source.endswith((".pth", DARKNET_SUFFIX))


def read_published(source: str) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of a published model.

    Args:
        source: "torchvision:ssd300_vgg16" downloads the weights of one of PUBLISHED (or takes them from
            torch's cache); a path ending in .pth is a state dict of one of these or of YOLOX; one ending in .weights is
            a file of Darknet's YOLOv2 or YOLOv3; "mtcnn:" and a folder reads the networks of facenet-pytorch.

    Raises:
        CheckpointError: the weights cannot be had, or are of another model.
    """
    if source.endswith(DARKNET_SUFFIX):
        return read_darknet(source)
    if source.startswith(MTCNN):
        return convert_mtcnn({name: _read(path) for name, path in mtcnn_files(source).items()})
    state = _download(source) if source.startswith(TORCHVISION) else _read(Path(source))
    for name, convert in CONVERTERS.items():
        if name in state:
            return convert(state)
    raise CheckpointError(
        f"'{source}' is none of torchvision's models that detkit runs ({', '.join(PUBLISHED)}), nor one of YOLOX's: "
        f"it has none of the tensors {', '.join(CONVERTERS)}. Files of Darknet's end in {DARKNET_SUFFIX}. Weights of a "
        f"backbone alone go to --backbone.weights."
    )


def _download(source: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    name = source.removeprefix(TORCHVISION)
    if name not in PUBLISHED:
        raise CheckpointError(f"detkit cannot run torchvision's '{name}'. {nearest(name, PUBLISHED)}")
    weights = get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True)
    except OSError as error:
        raise CheckpointError(
            f"The weights {weights.url} cannot be downloaded ({error}). Fetch that file on a machine with a network "
            "and give its path, ending in .pth, instead."
        ) from None
    return state


# Some training programs save their best score beside the weights, as a number of NumPy; its module has had two names.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There is no file of weights '{path}'.")
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"'{path}' is no file of weights: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"'{path}' holds no dict of tensors by name. Save a model's state_dict().")
    inside = state.get("model")  # YOLOX saves the state of the training beside it
    return inside if isinstance(inside, dict) else state
