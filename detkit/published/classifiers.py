"""Conversion of torchvision's AlexNet, VGG, GoogLeNet, ResNet and DenseNet classifiers."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.published.classes import unnamed_classes
from detkit.published.names import count_rows
from detkit.registry import weight_converters
from detkit.structures import ClassList

NETWORKS = (
    *("alexnet", "vgg11", "vgg11_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "googlenet"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "densenet121"),
)
OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""Names of DenseNet's layers in torchvision's published file."""
INPUT = (224, 224)
HIDDEN = {"widths": [4096, 4096], "dropout": 0.5}
# Names in torchvision's classifiers.
HEAD_NAMES = (
    (r"classifier\.6\.(\w+)", r"head.predictor.\1"),
    (r"(?:classifier|fc)\.(weight|bias)", r"head.predictor.\1"),
    (r"aux1\.(.+)", r"head.auxiliary.0.\1"),
    (r"aux2\.(.+)", r"head.auxiliary.1.\1"),
)
AUXILIARY_NAMES = ((".conv.conv.", ".conv."), (".conv.bn.", ".norm."), (".fc1.", ".hidden."), (".fc2.", ".predictor."))


@weight_converters.register("fc.weight")
@weight_converters.register("classifier.weight")
@weight_converters.register("classifier.6.weight")
def convert_classifier(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert one of torchvision's NETWORKS; the published ones have ImageNet's classes.

    Torchvision resizes an image's shorter side to 256 pixels and takes the central 224 x 224; detkit stretches the
    image to 224 x 224. For equal inputs both compute the same.

    Raises:
        CheckpointError: the tensors do not belong to any of these networks.
    """
    state = with_current_names(state)
    network = _network(state)
    tensors = {_detkit_name(name, network): tensor for name, tensor in state.items()}
    for name in list(tensors):
        # Files from before PyTorch 0.4.1 lack these counters, which are not used with a fixed momentum.
        if name.endswith("running_mean"):
            tensors.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    classes = count_rows(tensors, "head.predictor", "a classifier of torchvision's")
    backbone, head = _parts(network, "aux1.fc1.weight" in state)
    experiment = Experiment(
        data={"name": "folder"},
        backbone=backbone,
        head={"name": "classify", **head},
        input=InputOptions(INPUT, "stretch"),
        name=network,
    )
    return tensors, experiment, imagenet_classes(classes)


def with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of torchvision's published file to the names of its current code."""
    return {OLD_NAME.sub(r"\1\2.", name): tensor for name, tensor in state.items()}


def imagenet_classes(count: int) -> ClassList:
    """ImageNet's classes if `count` is 1000; otherwise "class 0", "class 1" ..."""
    from torchvision.models import AlexNet_Weights

    names = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    return ClassList.from_names(names) if len(names) == count else unnamed_classes(count)


def _network(state: Mapping[str, Tensor]) -> str:
    """Find the one of NETWORKS with tensors of these names and shapes, for any number of classes."""
    from torchvision import models

    for network in NETWORKS:
        options = {"init_weights": False} if network == "googlenet" else {}
        with torch.device("meta"):
            full = models.get_model(network, weights=None, **options).state_dict()
        shapes = {name: tensor.shape for name, tensor in full.items()}
        needed = {name for name in shapes if not name.startswith("aux") and "num_batches_tracked" not in name}
        same = all(name in shapes and tensor.shape[1:] == shapes[name][1:] for name, tensor in state.items())
        if same and needed <= state.keys():
            return network
    raise CheckpointError(
        f"The state dict is not one of torchvision's classifiers that detkit supports: {', '.join(NETWORKS)}. For "
        f"weights of a backbone use --backbone.weights."
    )


def _parts(network: str, auxiliary: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of backbone and head."""
    if network == "alexnet":
        return {"name": network, "levels": [5]}, {"pool": 6, **HIDDEN}
    if network.startswith("vgg"):
        name, _, norm = network.partition("_")
        return {"name": name, "levels": [6], "batch_norm": bool(norm)}, {"pool": 7, **HIDDEN}
    if network == "googlenet":
        # The published weights were converted from TensorFlow and use its normalisation.
        own: dict[str, Any] = {"name": network, "mean": [0.5] * 3, "std": [0.5] * 3}
        if auxiliary:
            levels = ["inception4a", "inception4d", "inception5b"]
            return {**own, "levels": levels}, {"dropout": 0.2, "auxiliary": [0, 1]}
        return {**own, "levels": ["inception5b"]}, {"dropout": 0.2}
    return {"name": network, "levels": [5]}, {}


def _detkit_name(name: str, network: str) -> str:
    hidden = {"1": "0", "4": "3"} if network == "alexnet" else {"0": "0", "3": "3"}
    found = re.fullmatch(r"classifier\.(\d)\.(\w+)", name)
    if found and found[1] in hidden:
        return f"head.hidden.{hidden[found[1]]}.{found[2]}"
    for pattern, replacement in HEAD_NAMES:
        if re.fullmatch(pattern, name):
            renamed = re.sub(pattern, replacement, name)
            for old, new in AUXILIARY_NAMES if "auxiliary" in renamed else ():
                renamed = renamed.replace(old, new)
            return renamed
    return f"backbone.{name}"
