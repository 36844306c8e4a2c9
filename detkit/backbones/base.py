"""The interfaces of backbones and necks, which give heads feature maps of known channels and strides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Self

from torch import Tensor, nn

from detkit.errors import ConfigError


class Backbone(nn.Module, ABC):
    """A network from images to feature maps.

    Attributes:
        channels: channels of each feature map, from fine to coarse.
        strides: input pixels per map location; 0 for a 1x1 map pooled from the whole image.
        frozen_stages: number of frozen `stages`; see `freeze`.
        mean, std: per-channel normalisation of RGB images in 0..1 that the weights were trained with.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frozen_stages: int = 0
    _frozen_norms: bool = False
    _all_frozen: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps [(B, channels[i], ~H / strides[i], ~W / strides[i])] of normalised images (B, 3, H, W)."""

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """The stages in forward order, starting with the stem, so that the first ones can be frozen."""

    def freeze(self, count: int, norms: bool = False) -> None:
        """Freeze the first `count` stages and train the others.

        A frozen stage gets no gradients and stays in evaluation mode after later calls of `train()`, since a batch norm
        in training mode would keep updating its running statistics.

        Args:
            count: 0 (nothing is frozen) to the number of `stages()`.
            norms: also freeze scale, shift and statistics of all batch norms, as is useful for batches of one or two
                images, whose statistics are poor.

        Raises:
            ConfigError: `count` is out of that range.
        """
        stages = self.stages()
        if not 0 <= count <= len(stages):
            raise ConfigError(
                f"This backbone has {len(stages)} stages, so 0 to {len(stages)} can be frozen, not {count}."
            )
        for index, stage in enumerate(stages):
            stage.requires_grad_(index >= count)
        for norm in self._norms() if norms else ():
            norm.requires_grad_(False)
        self.frozen_stages, self._frozen_norms = count, norms
        self.train(self.training)

    def freeze_all(self) -> None:
        """Freeze all parameters, including those outside the stages, and stay in evaluation mode."""
        self.freeze(len(self.stages()), norms=True)
        self.requires_grad_(False)
        self._all_frozen = True
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode and not self._all_frozen)
        if self.frozen_stages:
            for stage in self.stages()[: self.frozen_stages]:
                stage.eval()
        if self._frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def _override_normalisation(
        self, mean: tuple[float, float, float] | None, std: tuple[float, float, float] | None
    ) -> None:
        """Override `mean` and `std` if the user gives them."""
        if mean is not None:
            self.mean = mean
        if std is not None:
            if min(std) <= 0:
                raise ConfigError(f"A backbone's 'std' must be above 0, since it divides the image, but is {std}.")
            self.std = std


class Neck(nn.Module, ABC):
    """A network from the backbone's feature maps to those of the head, with the same attributes as a backbone.

    Its constructor takes the `channels` and `strides` of the input maps.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps [(B, channels[i], h_i, w_i)] from those of the backbone, from fine to coarse."""


def check_levels(levels: tuple[int, ...], valid: Collection[int], network: str) -> None:
    """Raise ConfigError if `levels` are not ascending, or one of them is not a level of `network`."""
    if not levels or list(levels) != sorted(set(levels)) or not set(levels) <= set(valid):
        allowed = ", ".join(str(level) for level in sorted(valid))
        raise ConfigError(
            f"'levels' of the backbone '{network}' must be some of {allowed}, each once and in ascending order, "
            f"but they are {list(levels)}."
        )
