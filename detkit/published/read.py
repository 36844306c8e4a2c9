"""Reading of weights published by torchvision and others, with their experiment and classes."""

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from detkit.backbones.weights import downloaded
from detkit.config import Experiment, experiment_from_dict, experiment_to_dict
from detkit.errors import CheckpointError, DetkitError, nearest, printable
from detkit.io.files import parse_yaml
from detkit.io.runs import PREFIXES, TORCHVISION, split_options
from detkit.io.tensor_files import FORMATS, TENSOR_FORMATS, file_format, of_detkit, read_tensors
from detkit.io.torch_file import one_line
from detkit.published.classifiers import NETWORKS
from detkit.registry import weight_converters, weight_files
from detkit.structures import ClassList

logger = logging.getLogger(__name__)

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
Result = tuple[dict[str, Tensor], Experiment, ClassList]
Converter = Callable[..., Result]


class WeightFile(Protocol):
    """A reader of weights that are not state dicts, registered in detkit.registry.weight_files."""

    def matches(self, source: str) -> bool:
        """Return whether `source` is such a file, or a name of some."""
        ...

    def read(self, source: str) -> Result:
        """Read the tensors under detkit's names, the experiment and the classes.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to another model.
        """
        ...


COCO, CLASS_NAMES = "coco", "data.class_names"
CHANGEABLE = ("backbone.", "neck.", "head.", "input.")
COCO_HEADS = ("retinanet", "faster_rcnn", "mask_rcnn")
"""Heads whose files with 91 classes are assumed to be torchvision's COCO files."""
ASSUMED = (
    "input.size",
    "backbone.norm_epsilon",
    "backbone.mean",
    "head.anchors.sizes",
    "head.anchors.ratios",
    "head.rpn.anchors.sizes",
    "head.rpn.anchors.ratios",
)
"""Options that affect results and are not stored in files of torchvision or YOLOX."""


def is_published(source: str) -> bool:
    """Return whether `source` is "torchvision:NAME", "mtcnn:FOLDER", or a file that is not a detkit checkpoint."""
    file, options = split_options(source)
    if source.startswith(PREFIXES) or options:
        return True
    kind = file_format(file)
    return not of_detkit(file) if kind == "safetensors" else kind in FORMATS or not file.endswith(".safetensors")


def read_published(source: str) -> Result:
    """Read the tensors, experiment and classes of a published model.

    Args:
        source: "torchvision:ssd300_vgg16" downloads the weights of one of PUBLISHED (or takes them from torch's cache);
            a path is a state dict of one of these or of YOLOX, in a torch.save or safetensors file, or a file of
            Darknet's YOLOv2 or YOLOv3; "mtcnn:FOLDER" reads the networks of facenet-pytorch. A file does not store how
            its model was trained; options that differ from the published model's may follow the path:
            "own.pth?input.size=[600, 1000]&head.anchors.sizes=[...]&data.class_names=[cat, dog]", and "coco=false" for
            a model with 91 classes that are not those of torchvision's COCO files.

    Raises:
        CheckpointError: the weights are not available, damaged, or belong to another model.
        ConfigError: an option does not exist.
    """
    file, text = split_options(source)
    given = _parsed(text, source)
    options = {key: value for key, value in given.items() if key not in (COCO, CLASS_NAMES)}
    tensors, experiment, classes = _read(source, file, given.get(COCO), tuple(options))
    if not file.startswith(PREFIXES):
        _log_assumptions(source, experiment, classes, given)
    return tensors, _changed(experiment, options), _named(classes, given.get(CLASS_NAMES), source)


def _read(source: str, file: str, coco: bool | None, options: tuple[str, ...]) -> Result:
    """As `read_published`, without applying `options`, of which only the names are given."""
    if file.startswith(TORCHVISION):
        return _converted(_download(file), source, coco, options)
    if file.startswith(PREFIXES) or file_format(file) not in TENSOR_FORMATS:
        readers: list[WeightFile] = [weight_files.get(name)() for name in weight_files.names()]
        for reader in readers:
            if reader.matches(file):
                return reader.read(file)
    return _converted(read_tensors(file), source, coco, options)


def find_converter(state: Mapping[str, Tensor]) -> Converter | None:
    """Find the function that converts a state dict of another library; None if it is unknown."""
    return next((weight_converters.get(name) for name in weight_converters.names() if name in state), None)


def _converted(state: Mapping[str, Tensor], source: str, coco: bool | None, options: tuple[str, ...]) -> Result:
    where = f"'{printable(source)}'"
    inner: Mapping[str, Tensor] | None = state
    while inner is not None:
        if convert := find_converter(inner):
            given = {"coco": coco, "options": options}
            taken = {key: given[key] for key in inspect.signature(convert).parameters if key in given}
            if coco is not None and "coco" not in taken:
                raise CheckpointError(f"{where}: '{COCO}' is for Faster R-CNN, Mask R-CNN and RetinaNet.")
            try:
                return convert(inner, **taken)
            except DetkitError as error:
                raise CheckpointError(f"{where} cannot be used. {error}") from None
            # Raised for tensors of unexpected shapes.
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{where} has tensors of other shapes than the model with these names "
                    f"({one_line(error)}). Was it trained with other options?"
                ) from None
        inner = _without_shared_prefix(inner)
    raise CheckpointError(
        f"{where} is not a torchvision model that detkit supports ({', '.join(PUBLISHED)}), nor a model of YOLOX or "
        f"Darknet, nor a detkit checkpoint: it has none of the tensors {', '.join(weight_converters.names())}, but "
        f"{', '.join(list(state)[:3])}. For weights of a backbone use --backbone.weights."
    )


def _without_shared_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Remove the attribute name that all names start with ("net."); None if there is none."""
    prefixes = {name.partition(".")[0] if "." in name else "" for name in state}
    if len(prefixes) != 1 or "" in prefixes:
        return None
    return {name.partition(".")[2]: tensor for name, tensor in state.items()}


def _download(source: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights

    name = source.removeprefix(TORCHVISION)
    if name not in PUBLISHED:
        raise CheckpointError(f"detkit cannot run torchvision's '{printable(name)}'. {nearest(name, PUBLISHED)}")
    weights = get_model_weights(name).DEFAULT
    return downloaded(
        lambda: weights.get_state_dict(progress=True, check_hash=True, weights_only=True),
        f"The weights of torchvision's {name}, {weights.url}",
        "give its path in place of the name",
    )


def _parsed(text: str, source: str) -> dict[str, Any]:
    """Parse the options after a path.

    Raises:
        CheckpointError: an option has no value, or cannot be changed.
    """
    options: dict[str, Any] = {}
    for item in text.split("&") if text else ():
        key, equals, value = item.partition("=")
        if not equals or not (key in (COCO, CLASS_NAMES) or key.startswith(CHANGEABLE)):
            raise CheckpointError(
                f"'{printable(item)}' in '{printable(source)}' is not an option that can follow a path. Options are "
                f"written {', '.join(f'{part}NAME=VALUE' for part in CHANGEABLE)}, {COCO}=false and "
                f"{CLASS_NAMES}=[NAME, NAME], with & between them."
            )
        options[key] = parse_yaml(value, f"option '{key}'", CheckpointError, as_text=key == CLASS_NAMES)
    if not isinstance(options.get(COCO, False), bool):
        raise CheckpointError(f"The option '{COCO}' must be true or false, but is {options[COCO]!r}.")
    return options


def _changed(experiment: Experiment, options: Mapping[str, Any]) -> Experiment:
    if not options:
        return experiment
    values = copy.deepcopy(experiment_to_dict(experiment))
    for key, value in options.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner[parent] = inner[parent] if isinstance(inner.get(parent), dict) else {}
            inner = inner[parent]
        inner[last] = value
    return experiment_from_dict(values)


def _named(classes: ClassList, names: Any, source: str) -> ClassList:
    """Rename the classes.

    Raises:
        CheckpointError: `names` is not a list of different texts, one for each class.
    """
    if names is None:
        return classes
    if not isinstance(names, list) or len(names) != len(classes):
        raise CheckpointError(
            f"'{printable(source)}' has {len(classes)} classes; give their names in {CLASS_NAMES}=[...]."
        )
    try:
        return ClassList(tuple(map(str, names)), classes.raw_ids)
    except ValueError as error:
        raise CheckpointError(f"The option '{CLASS_NAMES}' of '{printable(source)}': {error}.") from None


def _log_assumptions(source: str, experiment: Experiment, classes: ClassList, given: Mapping[str, Any]) -> None:
    """Log the assumed options that the file does not store, unless it is a published one."""
    shown, join = printable(source), "&" if given else "?"
    if classes.names[0] == "class 0":
        values = experiment_to_dict(experiment)
        assumed = [
            f"{key}={value}" for key in ASSUMED if key not in given and (value := _value(values, key)) is not None
        ]
        unnamed = "" if CLASS_NAMES in given else f" Add the names of its classes as {CLASS_NAMES}=[NAME, ...]."
        if assumed:
            logger.warning(
                f"'{shown}' does not store how it was trained. Assumed: {', '.join(assumed)}. If that is wrong, append "
                f"the right values to the path: '{shown}{join}{assumed[0]}'.{unnamed}"
            )
    elif (
        COCO not in given and experiment.head["name"] in COCO_HEADS and Path(source).name not in _names_of_coco_files()
    ):
        logger.warning(
            f"'{shown}' has 91 classes and is assumed to be a torchvision model trained on COCO. If it was trained on "
            f"91 other classes, append that to the path: '{shown}{join}{COCO}=false'."
        )


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _names_of_coco_files() -> set[str]:
    from torchvision.models import get_model_weights

    names = [name for name in PUBLISHED if name.startswith(("faster", "mask", "retina"))]
    return {Path(weights.url).name for name in names for weights in get_model_weights(name)}
