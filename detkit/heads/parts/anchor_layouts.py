"""Anchor layouts, selected by name in a config, on top of the anchor generators of detkit.boxes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.anchors import linear_scales, per_pixel_anchors, region_proposal_anchors, ssd_default_boxes
from detkit.errors import ConfigError
from detkit.registry import Registry

anchor_layouts = Registry("anchor layout", "detkit.heads.parts")


class AnchorLayout(ABC):
    """Generates the anchors of all levels of a feature pyramid."""

    @abstractmethod
    def per_location(self, levels: int) -> list[int]:
        """Return the number of anchors per location for each of `levels` feature maps."""

    @abstractmethod
    def __call__(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], strides: Sequence[int]
    ) -> Tensor:
        """Return anchors (A, 4) xyxy pixels, ordered by level, row, column and then anchor of the location.

        Args:
            map_sizes: (height, width) of each feature map.
            image_size: (height, width) of the network's input in pixels.
            strides: distance between locations of each map in pixels; 0 for a map pooled from the whole image.
        """


@anchor_layouts.register("default_boxes")
class DefaultBoxes(AnchorLayout):
    """SSD's default boxes (Liu et al. 2016, section 2.2), with sizes as fractions of the image.

    Args:
        ratios: for each level, width-to-height ratios other than 1, used together with their inverses; a single entry
            applies to all levels.
        min_scale, max_scale: scales of the first and last level, evenly spaced between.
        scales: overrides these: one scale per level, and a last one for the extra square box.
        steps: for each level, distance between anchor centres in pixels; null divides the image evenly.
        clip: whether to limit widths and heights (not corners) to the image's, as in torchvision's published weights.
    """

    def __init__(
        self,
        ratios: tuple[tuple[float, ...], ...] = ((2.0, 3.0),),
        min_scale: float = 0.15,
        max_scale: float = 0.9,
        scales: tuple[float, ...] | None = None,
        steps: tuple[int, ...] | None = None,
        clip: bool = True,
    ) -> None:
        self.ratios, self.scales, self.steps, self.clip = ratios, scales, steps, clip
        self.min_scale, self.max_scale = min_scale, max_scale

    def per_location(self, levels: int) -> list[int]:
        return [2 + 2 * len(ratios) for ratios in _for_levels(self.ratios, levels, "ratios")]

    def __call__(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], strides: Sequence[int]
    ) -> Tensor:
        levels = len(map_sizes)
        scales = self.scales or tuple(linear_scales(self.min_scale, self.max_scale, levels))
        if len(scales) != levels + 1:
            raise ConfigError(
                f"The anchors' 'scales' have {len(scales)} values; {levels} feature maps need {levels + 1}, "
                "including a last one for the extra square box."
            )
        if self.steps is not None and len(self.steps) != levels:
            raise ConfigError(f"The anchors' 'steps' have {len(self.steps)} values for {levels} feature maps.")
        ratios = _for_levels(self.ratios, levels, "ratios")
        return torch.cat(ssd_default_boxes(map_sizes, image_size, scales, ratios, steps=self.steps, clip=self.clip))


@anchor_layouts.register("per_pixel")
class PerPixel(AnchorLayout):
    """n + m - 1 anchors per location from n sizes and m ratios (Zhang et al., Dive into Deep Learning, 14.4).

    Args:
        sizes: for each level, side lengths as fractions of the image.
        ratios: width-to-height ratios, shared by all levels.
    """

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...] = (
            (0.2, 0.272), (0.37, 0.447), (0.54, 0.619), (0.71, 0.79), (0.88, 0.961),
        ),
        ratios: tuple[float, ...] = (1.0, 2.0, 0.5),
    ) -> None:  # fmt: skip
        self.sizes, self.ratios = sizes, ratios

    def per_location(self, levels: int) -> list[int]:
        return [len(sizes) + len(self.ratios) - 1 for sizes in _for_levels(self.sizes, levels, "sizes")]

    def __call__(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], strides: Sequence[int]
    ) -> Tensor:
        sizes = _for_levels(self.sizes, len(map_sizes), "sizes")
        return torch.cat([per_pixel_anchors(m, image_size, s, self.ratios) for m, s in zip(map_sizes, sizes)])


@anchor_layouts.register("pyramid")
class Pyramid(AnchorLayout):
    """Anchors of fixed pixel size on each level of a feature pyramid (Lin et al. 2017, RetinaNet).

    Args:
        sizes: for each level, side lengths in pixels of the network's input.
        ratios: height-to-width ratios, shared by all levels.
        divide: whether to space anchors by image side // map side instead of the stride, which is less on a map whose
            size was rounded up; torchvision's published weights require it.
    """

    def __init__(
        self, sizes: tuple[tuple[float, ...], ...], ratios: tuple[float, ...] = (0.5, 1.0, 2.0), divide: bool = False
    ) -> None:
        self.sizes, self.ratios, self.divide = sizes, ratios, divide

    def per_location(self, levels: int) -> list[int]:
        return [len(sizes) * len(self.ratios) for sizes in _for_levels(self.sizes, levels, "sizes")]

    def __call__(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], strides: Sequence[int]
    ) -> Tensor:
        sizes = _for_levels(self.sizes, len(map_sizes), "sizes")
        steps = [
            (image_size[0] // rows, image_size[1] // columns) if self.divide or not stride else (stride, stride)
            for (rows, columns), stride in zip(map_sizes, strides)
        ]
        levels = zip(map_sizes, steps, sizes)
        return torch.cat([region_proposal_anchors(m, step, s, self.ratios) for m, step, s in levels])


def _for_levels(values: tuple[tuple[float, ...], ...], levels: int, option: str) -> tuple[tuple[float, ...], ...]:
    """Return one entry per level; a single entry applies to all levels."""
    if len(values) == 1:
        return values * levels
    if len(values) != levels:
        raise ConfigError(
            f"The anchors' '{option}' have entries for {len(values)} levels, but the model has {levels} feature maps. "
            f"Give {levels} entries, or one for all."
        )
    return values
