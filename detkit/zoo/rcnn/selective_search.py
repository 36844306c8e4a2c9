"""Selective search (Uijlings et al., "Selective Search for Object Recognition", IJCV 2013): proposals from a hierarchy
of regions, without training."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.nms import nms
from detkit.data.proposals.sources import ProposalSource
from detkit.errors import ConfigError, DataError, nearest
from detkit.registry import proposal_sources

VERSION = 1
"""Version of the algorithm, to be incremented whenever it gives other boxes for the same options."""

SIGMA = 0.8
"""Pixels of the Gaussian that an image is smoothed with before it is segmented, as in the paper."""

TEXTURE_SCALE = 0.25
"""Bins of a texture histogram to a difference of one grey level over two pixels: the last begins at 36 levels."""


@dataclass(frozen=True)
class Diversity:
    """The variations of hierarchies of one image: one for each colour space, k and similarity.

    Args:
        spaces: colour spaces, see `in_space`.
        tolerances: k of the over-segmentation in grey levels; regions have at least k pixels, too.
        similarities: whether colour, texture, size, fill are part of the similarity of two regions.
    """

    spaces: tuple[str, ...]
    tolerances: tuple[int, ...]
    similarities: tuple[tuple[bool, bool, bool, bool], ...]


COLOUR_TEXTURE_SIZE_FILL = (True, True, True, True)
TEXTURE_SIZE_FILL = (False, True, True, True)
FILL = (False, False, False, True)
SIZE = (False, False, True, False)

MODES = {
    "fast": Diversity(("hsv", "lab"), (50, 100), (COLOUR_TEXTURE_SIZE_FILL, TEXTURE_SIZE_FILL)),
    "quality": Diversity(
        ("hsv", "lab", "rgi", "hue", "grey"),
        (50, 100, 150, 300),
        (COLOUR_TEXTURE_SIZE_FILL, TEXTURE_SIZE_FILL, FILL, SIZE),
    ),
}
"""Section 5.3 and table 6 of the paper: 8 hierarchies, and 80."""


@proposal_sources.register("selective_search")
class SelectiveSearch(ProposalSource):
    """Regions of several over-segmentations, grouped by similarity, as boxes.

    An image is first segmented into small regions of uniform colour; then the two most similar neighbours are merged
    repeatedly. Every region that occurs is a proposal. Several colour spaces, initial region sizes and similarity
    measures give several such hierarchies.

    Two differences from the paper increase the recall of the first 2,000 proposals. The paper ranks proposals by their
    position in the hierarchy, counted from the top, times a random number; here it is multiplied by the position at
    which the region is merged into a larger one, without randomness, since regions that stay separate for long are more
    often objects. And of nearly identical proposals only the first keeps its rank (`duplicate_iou`).

    Args:
        mode: fast has 8 hierarchies; quality has 80 and takes about five times as long. It is worthwhile with a `count`
            of 10,000: on COCO it then finds 87 % of the objects at an IoU of 0.5, fast 80 %. Among the first 2,000
            proposals fast finds more.
        count: maximum number of proposals, best first.
        min_side: minimum width and height of proposals in pixels of the image.
        duplicate_iou: of two proposals with a higher IoU, the lower-ranked one is moved behind all others; 1 disables
            this. Identical proposals are always removed.
        longest_side: images with a longer side are first reduced to it; null for never. Time and memory grow with the
            number of pixels.

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        mode: Literal["fast", "quality"] = "fast",
        count: int = 2000,
        min_side: int = 5,
        duplicate_iou: float = 0.75,
        longest_side: int | None = 640,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"'proposals.mode' is '{mode}'. {nearest(mode, MODES)}")
        for name, value in (("count", count), ("min_side", min_side), ("longest_side", longest_side)):
            if value is not None and value < 1:
                raise ConfigError(f"'proposals.{name}' must be at least 1, but is {value}.")
        if not 0 < duplicate_iou <= 1:
            raise ConfigError(f"'proposals.duplicate_iou' must be above 0 and at most 1, but is {duplicate_iou}.")
        self.mode, self.count, self.min_side = mode, count, min_side
        self.duplicate_iou, self.longest_side = duplicate_iou, longest_side
        self.key = (
            f"selective_search {VERSION}: mode {mode}, count {count}, min_side {min_side}, "
            f"duplicate_iou {duplicate_iou}, longest_side {longest_side}"
        )

    def __call__(self, image: np.ndarray, image_id: int | str | None = None) -> Tensor:
        """Proposals of one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            image_id: not used, but for messages.

        Returns:
            (P, 4) float32 xyxy pixels of `image`, inside it, best first, no two alike; P may be 0 where the image
            is smaller than `min_side`.

        Raises:
            DataError: the image is of another kind, or too large to be segmented unshrunk.
        """
        where = "The image" if image_id is None else f"The image '{image_id}'"
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise DataError(
                f"{where} must be (H, W, 3) uint8 RGB with H and W at least 1 for selective search, but is "
                f"{image.shape} {image.dtype}. detkit.data.image.read_image reads any file as that."
            )
        height, width = image.shape[:2]
        small = shrink(np.ascontiguousarray(image), self.longest_side)
        boxes, ranks = hierarchies(small, MODES[self.mode], where)
        boxes *= np.array([width / small.shape[1], height / small.shape[0]] * 2, dtype=np.float32)
        np.minimum(boxes, np.array([width, height] * 2, dtype=np.float32), out=boxes)  # after rounding
        return self._best(boxes, ranks)

    def _best(self, boxes: np.ndarray, ranks: np.ndarray) -> Tensor:
        """(P, 4) the proposals that stay, of (N, 4) boxes; the lower of the (N,) ranks are the better."""
        large = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_side).all(1)
        order = np.flatnonzero(large)[np.argsort(ranks[large], kind="stable")]
        _, first = np.unique(boxes[order], axis=0, return_index=True)
        distinct = torch.from_numpy(boxes[order[np.sort(first)]])
        kept = nms(distinct, torch.arange(len(distinct), 0, -1, dtype=torch.float32), self.duplicate_iou)
        behind = torch.ones(len(distinct), dtype=torch.bool)
        behind[kept] = False
        return torch.cat([distinct[kept], distinct[behind]])[: self.count].clone()


def selective_search(image: np.ndarray, mode: Literal["fast", "quality"] = "fast", **options: Any) -> Tensor:
    """Proposals of one image by selective search.

    Args:
        image: (H, W, 3) uint8 RGB.
        mode: as in `SelectiveSearch`.
        options: its other options.

    Returns:
        (P, 4) float32 xyxy pixels, best first.

    Raises:
        ConfigError: an option is out of its range.
        DataError: as `SelectiveSearch.__call__`.
    """
    return SelectiveSearch(mode, **options)(image)


def shrink(image: np.ndarray, longest_side: int | None) -> np.ndarray:
    """The image with its longer side at most `longest_side` pixels, by the mean over areas; or the same."""
    import cv2

    height, width = image.shape[:2]
    if longest_side is None or max(height, width) <= longest_side:
        return image
    scale = longest_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def in_space(image: np.ndarray, space: str) -> np.ndarray:
    """An image in another colour space.

    Args:
        image: (H, W, 3) uint8 RGB.
        space: hsv; lab; rgi, red and green as parts of the sum, and grey; hue; grey.

    Returns:
        (H, W, C) uint8, each channel over 0..255.
    """
    import cv2

    if space == "lab":
        return cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    if space == "grey":
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    if space == "rgi":
        total = np.maximum(image.sum(axis=2, dtype=np.uint16, keepdims=True), 1)
        parts = (image[:, :, :2] * np.float32(255) / total + np.float32(0.5)).astype(np.uint8)
        return np.concatenate([parts, in_space(image, "grey")], axis=2)
    converted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    return converted[:, :, :1] if space == "hue" else converted


def hierarchies(image: np.ndarray, diversity: Diversity, where: str) -> tuple[np.ndarray, np.ndarray]:
    """All regions of all hierarchies.

    Args:
        image: (H, W, 3) uint8 RGB.
        diversity: which hierarchies.
        where: the image, for messages.

    Returns:
        (N, 4) float32 xyxy pixels, in which boxes may be equal; (N,) int64 ranks, the lower the better.

    Raises:
        DataError: the image has too many regions.
    """
    from detkit.zoo.rcnn.kernels.grouping_numba import MAX_REGIONS, feature_bins, group
    from detkit.zoo.rcnn.kernels.segmentation_numba import MAX_PIXELS, STEPS, segment, sorted_edges

    height, width = image.shape[:2]
    too_large = f"{where} of {width} x {height} pixels is too large for selective search. Set proposals.longest_side."
    if height * width > MAX_PIXELS:
        raise DataError(too_large)
    similarities = np.array(diversity.similarities, dtype=np.bool_)
    boxes, ranks = [], []
    for space in diversity.spaces:
        colours, smoothed = _planes(in_space(image, space))
        edges, starts = sorted_edges(smoothed)
        bins = feature_bins(colours, smoothed, TEXTURE_SCALE)
        for k in diversity.tolerances:
            labels, count = segment(edges, starts, height, width, k * STEPS, k)
            if count > MAX_REGIONS:
                raise DataError(too_large)
            found, merges = group(labels, count, bins, similarities)
            boxes.append(found.reshape(-1, 4))
            ranks += [_ranks(parts) for parts in merges]
    return np.concatenate(boxes).astype(np.float32), np.concatenate(ranks)


def _planes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, H, W) uint8 and, smoothed, float32 of (H, W, C) uint8."""
    import cv2

    planes = np.ascontiguousarray(colours.transpose(2, 0, 1))
    smoothed = np.empty(planes.shape, dtype=np.float32)
    for plane, target in zip(planes, smoothed):
        cv2.GaussianBlur(plane.astype(np.float32), (7, 7), SIGMA, dst=target)
    return planes, smoothed


def _ranks(merges: np.ndarray) -> np.ndarray:
    """(2 M + 1,) for the regions of a hierarchy with (M, 2) merges: place x place of the one that takes it up.

    Places count from 1, the whole image, which nothing takes up: its rank is 1.
    """
    regions = 2 * len(merges) + 1
    places = np.arange(regions, 0, -1, dtype=np.int64)
    takers = np.ones(regions, dtype=np.int64)
    takers[merges] = places[len(merges) + 1 :, None]
    return places * takers
