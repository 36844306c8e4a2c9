"""What the second stage sees of each region: four ways to bring regions of any size to one.

warp        the pixels of the region, through a network of its own (R-CNN, Girshick et al. 2014)
spp         maxima over grids of several finenesses (SPPNet, He et al. 2014)
roi_pool    maxima over one grid (Fast R-CNN, Girshick 2015)
roi_align   samples between the places of the map, nothing rounded (Mask R-CNN, He et al. 2017)
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
"""Maps of larger strides are for proposals alone: a region seldom has more than one place there."""


class RegionFeatures(nn.Module, ABC):
    """Features of one shape for regions of any size.

    The constructor takes `channels` and `strides` of the feature maps.

    Attributes:
        shape: of the features of one region: (C, h, w), or (D,).
        layout: of the feature maps in memory that needs no copy.
    """

    shape: tuple[int, ...]
    layout: ClassVar[torch.memory_format] = torch.contiguous_format

    @abstractmethod
    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        """Features of the regions of all images, one image after the other.

        Args:
            maps: [(B, C_i, h_i, w_i)].
            regions: B tensors (R_b, 4) xyxy pixels of the network's input; may reach outside, may be empty.

        Returns:
            (R_1 + ... + R_B, *shape).
        """


class PooledRegions(RegionFeatures):
    """Regions cut out of feature maps, each from the one map whose stride suits its size.

    A region of canonical_size is read from stride 16, one of twice the side from the next coarser map and so on
    (FPN, Lin et al. 2017, equation 1). With one map all are read from it.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], canonical_size: float = 224.0) -> None:
        super().__init__()
        if canonical_size <= 0:
            raise ConfigError(f"The region features' 'canonical_size' must be above 0, but is {canonical_size}.")
        used = [level for level, stride in enumerate(strides) if 0 < stride <= COARSEST_STRIDE]
        if not used:
            raise ConfigError(
                f"Region features need feature maps of a stride up to {COARSEST_STRIDE}, but the strides are "
                f"{list(strides)}. Choose other 'levels' of the backbone."
            )
        if len({channels[level] for level in used}) > 1:
            raise ConfigError(
                f"Region features need maps of the same channels, but they have {[channels[level] for level in used]}. "
                f"Put a neck before the head ({{name: fpn}}), or give the backbone one level."
            )
        self.levels = used
        self.strides = [strides[level] for level in used]
        self.width = channels[used[0]]
        self.canonical_size = canonical_size

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        rows = with_image_index(regions)
        # torchvision pools in the precision of the coordinates only.
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
        """(R,) which of the maps in use each (R, 4) region is read from."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        # 1e-6 as in torchvision: a region of exactly a power of two must not fall to the finer map by rounding.
        wanted = torch.floor(4 + torch.log2(side / self.canonical_size) + 1e-6)
        available = [math.log2(stride) for stride in self.strides]
        return torch.bucketize(wanted, torch.tensor(available[1:], device=boxes.device), right=True)

    @abstractmethod
    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        """(R, *shape) of rows (R, 5): image index, then xyxy pixels, which times `scale` are places of the map."""


@region_features.register("roi_align")
class RoiAlign(PooledRegions):
    """Means of bilinear samples in each cell of a size x size grid; no coordinate is rounded.

    Args:
        size: cells on each side.
        sampling: samples on each side of a cell; 0 takes as many as the cell has places.
        aligned: shift by half a place, so that places are centres of pixels (Detectron2); torchvision's published
            detectors go without.
        canonical_size: side in pixels of a region that is read from stride 16.
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
        # Torchvision's kernel for the CPU took a third of Faster R-CNN's time.
        if feature.device.type == "cpu" and not torch.compiler.is_compiling():
            return fast_roi_align(feature, rows, self.size, scale, self.sampling, self.aligned)
        from torchvision.ops import roi_align

        return roi_align(feature, rows, self.size, scale, self.sampling or -1, self.aligned)


@region_features.register("roi_pool")
class RoiPool(PooledRegions):
    """Maxima over the cells of a size x size grid, whose edges are rounded to whole places.

    Regions are first cut to the map, so that every cell holds one of its places: one that lies in the last half stride
    at the right or bottom would round to beyond it. One wholly outside reads the places of the border next to it.

    Args:
        size: cells on each side.
        canonical_size: side in pixels of a region that is read from stride 16.
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
    """Maxima over grids of several finenesses, one after the other as one vector.

    Regions are cut to the map as in RoiPool.

    Args:
        grids: cells on each side of each grid.
        canonical_size: side in pixels of a region that is read from stride 16.
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
            raise ConfigError(f"The region features' 'grids' must be one or more numbers from 1 on, but are {grids}.")
        self.grids = grids
        self.shape = (self.width * sum(grid * grid for grid in grids),)

    def pool(self, feature: Tensor, rows: Tensor, scale: float) -> Tensor:
        from torchvision.ops import roi_pool

        rows = cut_to_map(rows, feature, scale)
        return torch.cat([roi_pool(feature, rows, grid, scale).flatten(1) for grid in self.grids], dim=1)


def cut_to_map(rows: Tensor, feature: Tensor, scale: float) -> Tensor:
    """Rows (R, 5) as `PooledRegions.pool` has them, with corners from the first to the last place of (B, C, h, w)."""
    last = rows.new_tensor((feature.shape[3] - 1, feature.shape[2] - 1) * 2) / scale
    return torch.cat((rows[:, :1], rows[:, 1:].clamp(min=0).minimum(last)), dim=1)


@region_features.register("warp")
class Warp(RegionFeatures):
    """The pixels of each region, stretched to one size and sent through a network of their own.

    It reads the image itself, so it goes with `backbone: {name: pixels}`, and costs one pass of the network for each
    region.

    Attributes:
        mean, std: that the network's weights were trained with.

    Args:
        backbone: `name` of the network and its options; its coarsest map is used.
        size: side in pixels that a region is stretched to.
        context: pixels of that size that show what is around the region, on each side (16 of 227 in the paper).
        freeze: the first stages of the network that keep their weights.
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
                f"The region features 'warp' read the image's own pixels, but get feature maps of strides "
                f"{list(strides)}. Use backbone: {{name: pixels}} and no neck with it."
            )
        if not 0 <= 2 * context < size:
            raise ConfigError(f"The 'context' of 'warp' must be in 0..{(size - 1) // 2}, but is {context}.")
        self.backbone: Backbone = backbones.build(backbone, "head.regions.features.backbone")
        self.backbone.freeze(freeze)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)
        self.size, self.context = size, context
        with torch.no_grad():
            # Networks differ in how they round the size of a map.
            self.shape = tuple(self.backbone.eval()(torch.zeros(1, 3, size, size))[-1].shape[1:])
        self.backbone.train()

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        from torchvision.ops import roi_align

        rows = with_image_index(regions)
        around = (rows[:, 3:] - rows[:, 1:3]) * (self.context / (self.size - 2 * self.context))
        rows = torch.cat((rows[:, :1], rows[:, 1:3] - around, rows[:, 3:] + around), dim=1)
        # Outside the image the samples are 0, which is the mean colour, as in the paper.
        images = (maps[0] - self.mean) / self.std
        pixels = roi_align(images, rows, self.size, 1.0, sampling_ratio=-1, aligned=True)
        return self.backbone(pixels.to(memory_format=torch.channels_last))[-1]


def with_image_index(regions: Sequence[Tensor]) -> Tensor:
    """(R, 5) of all regions: the index of the image, then xyxy."""
    index = torch.cat([boxes.new_full((len(boxes), 1), image) for image, boxes in enumerate(regions)])
    return torch.cat((index, torch.cat(list(regions))), dim=1)
