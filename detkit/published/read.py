"""Weights that torchvision and others publish, under detkit's names, with the experiment and classes they belong to."""

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
    """Weights in files that are not state dicts, registered in detkit.registry.weight_files."""

    def matches(self, source: str) -> bool:
        """Whether `source` is such a file, or stands for some."""
        ...

    def read(self, source: str) -> Result:
        """The tensors under detkit's names, the experiment and the classes.

        Raises:
            CheckpointError: the file is missing, damaged, or of another model.
        """
        ...


COCO, CLASS_NAMES = "coco", "data.class_names"
CHANGEABLE = ("backbone.", "neck.", "head.", "input.")
OF_COCO = ("retinanet", "faster_rcnn", "mask_rcnn")
"""Heads of which files with 91 classes are taken for torchvision's own."""
ASSUMED = (
    "input.size",
    "backbone.norm_epsilon",
    "backbone.mean",
    "head.anchors.sizes",
    "head.anchors.ratios",
    "head.rpn.anchors.sizes",
    "head.rpn.anchors.ratios",
)
"""Options on which results depend and which no file of torchvision's or YOLOX's stores."""


def is_published(source: str) -> bool:
    """Whether `source` is "torchvision:" and a name, "mtcnn:" and a folder, or a file that is not one of detkit's."""
    file, options = split_options(source)
    if source.startswith(PREFIXES) or options:
        return True
    kind = file_format(file)
    return not of_detkit(file) if kind == "safetensors" else kind in FORMATS or not file.endswith(".safetensors")


def read_published(source: str) -> Result:
    """Tensors, experiment and classes of a published model.

    Args:
        source: "torchvision:ssd300_vgg16" downloads the weights of one of PUBLISHED (or takes them from torch's cache);
            a path is a state dict of one of these or of YOLOX, in a file of torch.save or safetensors, or a file of
            Darknet's YOLOv2 or YOLOv3; "mtcnn:" and a folder reads the networks of facenet-pytorch. What a path leads
            to was perhaps not trained as the published models were; the file does not say so. Options of the model may
            follow the path: "own.pth?input.size=[600, 1000]&head.anchors.sizes=[...]&data.class_names=[cat, dog]", and
            "coco=false" for a model with 91 classes that are not those of torchvision's COCO files.

    Raises:
        CheckpointError: the weights are not available, are damaged, or are of another model.
        ConfigError: an option does not exist.
    """
    file, text = split_options(source)
    given = _parsed(text, source)
    options = {key: value for key, value in given.items() if key not in (COCO, CLASS_NAMES)}
    tensors, experiment, classes = _read(source, file, given.get(COCO), tuple(options))
    if not file.startswith(PREFIXES):
        _say_what_is_assumed(source, experiment, classes, given)
    return tensors, _changed(experiment, options), _named(classes, given.get(CLASS_NAMES), source)


def _read(source: str, file: str, coco: bool | None, options: tuple[str, ...]) -> Result:
    """As `read_published`, without the changes that options ask for; of these only the names are given."""
    if file.startswith(TORCHVISION):
        return _converted(_download(file), source, coco, options)
    if file.startswith(PREFIXES) or file_format(file) not in TENSOR_FORMATS:
        readers: list[WeightFile] = [weight_files.get(name)() for name in weight_files.names()]
        for reader in readers:
            if reader.matches(file):
                return reader.read(file)
    return _converted(read_tensors(file), source, coco, options)


def find_converter(state: Mapping[str, Tensor]) -> Converter | None:
    """The function that turns a state dict of another library into detkit's; None for an unknown one."""
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
            # What tensors of other shapes than those of the model lead to.
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{where} has tensors of other shapes than the model that their names belong to "
                    f"({one_line(error)}). Was it trained with other options?"
                ) from None
        inner = _without_shared_prefix(inner)
    raise CheckpointError(
        f"{where} is none of torchvision's models that detkit runs ({', '.join(PUBLISHED)}), nor one of YOLOX's or "
        f"Darknet's, and no checkpoint of detkit: it has none of the tensors {', '.join(weight_converters.names())}, "
        f"but {', '.join(list(state)[:3])}. Weights of a backbone alone go to --backbone.weights."
    )


def _without_shared_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """`state` without the attribute in which all of it was kept ("net."); None where there is no such."""
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
    """The options behind a path by key.

    Raises:
        CheckpointError: one has no value, or cannot be changed.
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
        raise CheckpointError(f"The option '{COCO}' is true or false, not {options[COCO]!r}.")
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
    """`classes` under other names.

    Raises:
        CheckpointError: there are not as many, or they are not a list of different texts.
    """
    if names is None:
        return classes
    if not isinstance(names, list) or len(names) != len(classes):
        raise CheckpointError(f"'{printable(source)}' has {len(classes)} classes; give as many in {CLASS_NAMES}=[...].")
    try:
        return ClassList(tuple(map(str, names)), classes.raw_ids)
    except ValueError as error:
        raise CheckpointError(f"The option '{CLASS_NAMES}' of '{printable(source)}': {error}.") from None


def _say_what_is_assumed(source: str, experiment: Experiment, classes: ClassList, given: Mapping[str, Any]) -> None:
    """One line on what results depend on and the file does not tell, unless it is one of the published."""
    shown, join = printable(source), "&" if given else "?"
    if classes.names[0] == "class 0":
        values = experiment_to_dict(experiment)
        assumed = [
            f"{key}={value}" for key in ASSUMED if key not in given and (value := _value(values, key)) is not None
        ]
        unnamed = "" if CLASS_NAMES in given else f" The names of its classes follow as {CLASS_NAMES}=[NAME, ...]."
        if assumed:
            logger.warning(
                f"'{shown}' does not store how it was trained. Assumed: {', '.join(assumed)}. Where that is wrong, add "
                f"the right values to the path: '{shown}{join}{assumed[0]}'.{unnamed}"
            )
    elif COCO not in given and experiment.head["name"] in OF_COCO and Path(source).name not in _names_of_coco_files():
        logger.warning(
            f"'{shown}' has 91 classes and is read as a file of torchvision's that was trained on COCO. If it was "
            f"trained on 91 other classes, add that to the path: '{shown}{join}{COCO}=false'."
        )


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _names_of_coco_files() -> set[str]:
    from torchvision.models import get_model_weights

    names = [name for name in PUBLISHED if name.startswith(("faster", "mask", "retina"))]
    return {Path(weights.url).name for name in names for weights in get_model_weights(name)}
