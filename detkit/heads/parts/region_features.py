"""Region features of the second stage: four ways to extract fixed-size features from regions of any size.

warp        warped pixels, passed through a separate network (R-CNN, Girshick et al. 2014)
spp         max pooling over grids of several resolutions (SPPNet, He et al. 2014)
roi_pool    max pooling over one grid (Fast R-CNN, Girshick 2015)
roi_align   bilinear samples without rounding (Mask R-CNN, He et al. 2017)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.boxes.roi_align import roi_align as fast_roi_align
from detkit.errors import ConfigError, check_range
from detkit.registry import Registry, backbones

region_features = Registry("kind of region features", "detkit.heads.parts")

COARSEST_STRIDE = 32
"""Maps of larger strides are used for proposals only, since most regions cover at most one cell there."""


class RegionFeatures(nn.Module, ABC):
    """Features of fixed shape for regions of any size.

    The constructor takes `channels` and `strides` of the feature maps.

    Attributes:
        shape: shape of the features of one region: (C, h, w) or (D,).
        layout: memory format of feature maps that avoids a copy.
    """

    shape: tuple[int, ...]
    layout: ClassVar[torch.memory_format] = torch.contiguous_format

    @abstractmethod
    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        """Compute the features of the regions of all images, in the order of the images.

        Args:
            maps: [(B, C_i, h_i, w_i)].
            regions: B tensors (R_b, 4) xyxy pixels of the network's input; may extend beyond it and may be empty.

        Returns:
            (R_1 + ... + R_B, *shape).
        """


class PooledRegions(RegionFeatures):
    """Regions pooled from feature maps, each from the map whose stride matches its size.

    A region of canonical_size is pooled from stride 16, one of twice the side from the next coarser map, and so on
    (FPN, Lin et al. 2017, equation 1). With a single map, all regions are pooled from it.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], canonical_size: float = 224.0) -> None:
        super().__init__()
        if canonical_size <= 0:
            raise ConfigError(f"The region features' 'canonical_size' must be above 0, but is {canonical_size}.")
        used = [level for level, stride in enumerate(strides) if 0 < stride <= COARSEST_STRIDE]
        if not used:
            raise ConfigError(
                f"Region features need feature maps of a stride up to {COARSEST_STRIDE}, but the strides are "
                f"{list(strides)}. Select other 'levels' of the backbone."
            )
        if len({channels[level] for level in used}) > 1:
            raise ConfigError(
                f"Region features need maps with the same number of channels, but they have "
                f"{[channels[level] for level in used]}. Add a neck ({{name: fpn}}), or use a single backbone level."
            )
        self.levels = used
        self.strides = [strides[level] for level in used]
        self.width = channels[used[0]]
        self.canonical_size = canonical_size

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        rows = with_image_index(regions)
        # torchvision requires maps and coordinates of the same dtype.
        maps = [maps[level].float() for level in self.levels]
        if len(maps) == 1:
            return self.pool(maps[0], rows, 1 / self.strides[0])
        level_of = self.assign(rows[:, 1:])
        of_level = [(level_of == position).nonzero().flatten() for position in range(len(self.levels))]
        pooled = [
            self.pool(feature, rows[chosen], 1 / stride)
            for feature, stride, chosen in zip(maps, self.strides, of_level)
        ]
        return torch.cat(pooled)[torch.cat(of_level).argsort()]

    def assign(self, boxes: Tensor) -> Tensor:
        """Return the index (R,) of the map, among those in use, that each region (R, 4) is pooled from."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        # 1e-6 as in torchvision, so that rounding does not assign a region of exactly a power of two to the finer map.
        wanted = torch.floor(4 + torch.log2(side / self.canonical_size) + 1e-6)
        available = [math.log2(stride) for stride in self.strides]
        return torch.bucketize(wanted, torch.tensor(available[1:], device=boxes.device), right=True)

    @abstractmethod
    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        """Pool rows (R, 5), image index and xyxy pixels, to (R, *shape); pixels times `scale` are map coordinates."""


@region_features.register("roi_align")
class RoiAlign(PooledRegions):
    """Means of bilinear samples in each bin of a size x size grid, without rounding of coordinates.

    Args:
        size: bins per side.
        sampling: samples per side of a bin; 0 for as many as the bin has map cells.
        aligned: whether to shift by half a cell, so that samples refer to pixel centres (Detectron2); torchvision's
            published detectors do not.
        canonical_size: side in pixels of a region that is pooled from stride 16.
    """

    layout: ClassVar[torch.memory_format] = torch.channels_last

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        size: int = 7,
        sampling: int = 2,
        aligned: bool = False,
        canonical_size: float = 224.0,
    ) -> None:
        super().__init__(channels, strides, canonical_size)
        check_range("features", 1, size=size)
        check_range("features", 0, sampling=sampling)
        self.size, self.sampling, self.aligned = size, sampling, aligned
        self.shape = (self.width, size, size)

    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        # Torchvision's CPU kernel took a third of Faster R-CNN's run time.
        if feature.device.type == "cpu" and not torch.compiler.is_compiling():
            return fast_roi_align(feature, rows, self.size, scale, self.sampling, self.aligned)
        from torchvision.ops import roi_align

        return roi_align(feature, rows, self.size, scale, self.sampling or -1, self.aligned)


@region_features.register("roi_pool")
class RoiPool(PooledRegions):
    """Max pooling over the bins of a size x size grid, whose edges are rounded to whole map cells.

    Regions are first clipped to the map, so that every bin contains a cell: a region within the last half stride at the
    right or bottom would otherwise round to beyond the map. A region entirely outside reads the nearest border cells.

    Args:
        size: bins per side.
        canonical_size: side in pixels of a region that is pooled from stride 16.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], size: int = 7, canonical_size: float = 224.0
    ) -> None:
        super().__init__(channels, strides, canonical_size)
        check_range("features", 1, size=size)
        self.size = size
        self.shape = (self.width, size, size)

    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        from torchvision.ops import roi_pool

        return roi_pool(feature, cut_to_map(rows, feature, scale), self.size, scale)


@region_features.register("spp")
class SpatialPyramid(PooledRegions):
    """Max pooling over grids of several resolutions, concatenated to one vector.

    Regions are clipped to the map as in RoiPool.

    Args:
        grids: bins per side of each grid.
        canonical_size: side in pixels of a region that is pooled from stride 16.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        grids: tuple[int, ...] = (6, 3, 2, 1),
        canonical_size: float = 224.0,
    ) -> None:
        super().__init__(channels, strides, canonical_size)
        if not grids or min(grids) < 1:
            raise ConfigError(f"The region features' 'grids' must be a list of positive integers, but are {grids}.")
        self.grids = grids
        self.shape = (self.width * sum(grid * grid for grid in grids),)

    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        from torchvision.ops import roi_pool

        rows = cut_to_map(rows, feature, scale)
        return torch.cat([roi_pool(feature, rows, grid, scale).flatten(1) for grid in self.grids], dim=1)


def cut_to_map(rows: Tensor, feature: Tensor, scale: float) -> Tensor:
    """Clip rows (R, 5), as in `PooledRegions.pool`, to the cells of a map (B, C, h, w)."""
    last = rows.new_tensor((feature.shape[3] - 1, feature.shape[2] - 1) * 2) / scale
    return torch.cat((rows[:, :1], rows[:, 1:].clamp(min=0).minimum(last)), dim=1)


@region_features.register("warp")
class Warp(RegionFeatures):
    """The pixels of each region, warped to a fixed size and passed through a separate network.

    It reads the image itself and therefore requires `backbone: {name: pixels}`; it costs one forward pass per region.

    Attributes:
        mean, std: normalization that the network's weights were trained with.

    Args:
        backbone: `name` and options of the network; its coarsest map is used.
        size: side in pixels that regions are warped to.
        context: pixels on each side of the warped region that show its surroundings (16 of 227 in the paper).
        freeze: number of first stages of the network to freeze.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        backbone: dict[str, Any],
        size: int = 112,
        context: int = 8,
        freeze: int = 0,
    ) -> None:
        super().__init__()
        if tuple(strides) != (1,):
            raise ConfigError(
                f"The region features 'warp' read the pixels of the image, but get feature maps of strides "
                f"{list(strides)}. Use backbone: {{name: pixels}} without a neck."
            )
        if not 0 <= 2 * context < size:
            raise ConfigError(f"The 'context' of 'warp' must be in 0..{(size - 1) // 2}, but is {context}.")
        self.backbone: Backbone = backbones.build(backbone, "head.regions.features.backbone")
        self.backbone.freeze(freeze)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)
        self.size, self.context = size, context
        with torch.no_grad():
            # Networks round map sizes differently, so the shape is measured.
            self.shape = tuple(self.backbone.eval()(torch.zeros(1, 3, size, size))[-1].shape[1:])
        self.backbone.train()

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        from torchvision.ops import roi_align

        rows = with_image_index(regions)
        around = (rows[:, 3:] - rows[:, 1:3]) * (self.context / (self.size - 2 * self.context))
        rows = torch.cat((rows[:, :1], rows[:, 1:3] - around, rows[:, 3:] + around), dim=1)
        # Samples outside the image are 0, i.e. the mean colour, as in the paper.
        images = (maps[0] - self.mean) / self.std
        pixels = roi_align(images, rows, self.size, 1.0, sampling_ratio=-1, aligned=True)
        return self.backbone(pixels.to(memory_format=torch.channels_last))[-1]


def with_image_index(regions: Sequence[Tensor]) -> Tensor:
    """Concatenate the regions of all images to rows (R, 5): image index, then xyxy."""
    index = torch.cat([boxes.new_full((len(boxes), 1), image) for image, boxes in enumerate(regions)])
    return torch.cat((index, torch.cat(list(regions))), dim=1)
