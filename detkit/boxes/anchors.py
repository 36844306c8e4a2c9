"""Anchors: boxes at every location of a feature map, and priors clustered from a data set.

All generators return float32 xyxy in absolute pixels, in row-major order of the locations, with the anchors of one
location consecutive, so that predictions (B, h, w, anchors, ...) can be reshaped to this order. Anchors are not clipped
to the image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.boxes.convert import cxcywh_to_xyxy


def per_pixel_anchors(
    map_size: tuple[int, int], image_size: tuple[int, int], sizes: Sequence[float], ratios: Sequence[float]
) -> Tensor:
    """Anchors of n sizes and m ratios at every pixel of a feature map ("Dive into Deep Learning", 14.4).

    Only the combinations with the first size or the first ratio are used. An anchor of size s and ratio r is
    s * sqrt(r) * W wide and s / sqrt(r) * H high: both are fractions of the image's sides, so ratio 1 has the aspect
    ratio of the image.

    Args:
        map_size: (h, w) of the feature map.
        image_size: (H, W) of the image in pixels.
        sizes: fractions of the image's side, in 0..1.
        ratios: width to height, relative to the aspect ratio of the image.

    Returns:
        (h * w * (n + m - 1), 4): at each location all sizes with the first ratio, then the first size with
        the other ratios.
    """
    if not sizes or not ratios:
        raise ValueError(f"sizes and ratios need at least one value each, but are {list(sizes)} and {list(ratios)}")
    height, width = image_size
    pairs = [(size, ratios[0]) for size in sizes] + [(sizes[0], ratio) for ratio in ratios[1:]]
    shapes = torch.tensor([(s * math.sqrt(r) * width, s / math.sqrt(r) * height) for s, r in pairs])
    rows, columns = map_size
    centres = (_grid(map_size) + 0.5) / torch.tensor((columns, rows)) * torch.tensor((width, height))
    return _anchors_at(centres, shapes)


def linear_scales(minimum: float, maximum: float, levels: int) -> list[float]:
    """The K + 1 scales that `ssd_default_boxes` needs for K levels (SSD, Liu et al. 2016, equation 4).

    K equally spaced scales from `minimum` to `maximum`, then 1.0 for the extra box of the last level. For a single
    level [minimum, maximum], as in torchvision.
    """
    if levels < 1:
        raise ValueError(f"levels must be 1 or more, but is {levels}")
    if levels == 1:
        return [minimum, maximum]
    return [minimum + (maximum - minimum) * level / (levels - 1) for level in range(levels)] + [1.0]


def ssd_default_boxes(
    map_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    scales: Sequence[float],
    ratios: Sequence[Sequence[float]],
    steps: Sequence[int] | None = None,
    clip: bool = True,
) -> list[Tensor]:
    """SSD's default boxes (Liu et al. 2016, section 2.2), equal to torchvision's DefaultBoxGenerator.

    Args:
        map_sizes: (h, w) of each of K feature maps.
        image_size: (H, W) of the image in pixels.
        scales: K + 1 fractions of the image's side; see `linear_scales`.
        ratios: aspect ratios of each level, without 1: SSD300 has [2] and [2, 3].
        steps: pixels between the locations of each level; None spaces them evenly over the image.
        clip: clip widths and heights to the image's. Centres and corners are not clipped.

    Returns:
        for each level (h * w * (2 + 2 * len(ratios)), 4): at each location the squares of scale s_k and
        sqrt(s_k * s_k+1), then for each ratio r the shapes r and 1 / r.

    Raises:
        ValueError: the lists do not match the K levels.
    """
    levels = len(map_sizes)
    if len(scales) != levels + 1 or len(ratios) != levels or (steps is not None and len(steps) != levels):
        raise ValueError(
            f"{levels} feature maps need {levels + 1} scales, {levels} lists of ratios and {levels} steps (or None), "
            f"but got {len(scales)}, {len(ratios)} and {None if steps is None else len(steps)}"
        )
    height, width = image_size
    boxes = []
    for level, map_size in enumerate(map_sizes):
        shapes = torch.tensor(_default_shapes(scales[level], scales[level + 1], ratios[level]))
        if clip:
            shapes = shapes.clamp(0, 1)
        rows, columns = (height / steps[level], width / steps[level]) if steps else map_size
        centres = (_grid(map_size) + 0.5) / torch.tensor((columns, rows))
        boxes.append(_anchors_at(centres, shapes) * torch.tensor((width, height, width, height)))
    return boxes


def region_proposal_anchors(
    map_size: tuple[int, int],
    stride: int | tuple[int, int],
    sizes: Sequence[float] = (128, 256, 512),
    ratios: Sequence[float] = (0.5, 1, 2),
) -> Tensor:
    """The anchors of a region-proposal network (Faster R-CNN, Ren et al. 2015, section 3.1.1).

    An anchor of size s and ratio r (height / width) has area s^2. Equal to torchvision's AnchorGenerator, so that its
    weights can be used: centres are at the corners of the strides (0, stride, 2 * stride ...), not in the middle, and
    the corners relative to the centre are rounded to whole pixels.

    Args:
        map_size: (h, w) of the feature map.
        stride: pixels between locations, or (vertical, horizontal) if they differ: torchvision uses
            image side // map side, which can differ on a level whose map size was rounded up.
        sizes: square root of the area in pixels.
        ratios: height to width.

    Returns:
        (h * w * n * m, 4): at each location all sizes of the first ratio, then of the second ...
    """
    vertical, horizontal = (stride, stride) if isinstance(stride, int) else stride
    roots = torch.tensor(ratios, dtype=torch.float32).sqrt()
    sides = torch.tensor(sizes, dtype=torch.float32)
    widths, heights = ((root[:, None] * sides).flatten() for root in (1 / roots, roots))
    corners = (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()
    centres = _grid(map_size) * torch.tensor((horizontal, vertical))
    return (centres.repeat(1, 2)[:, None] + corners).reshape(-1, 4)


def kmeans_priors(widths_heights: Tensor, count: int, seed: int = 0, iterations: int = 300) -> tuple[Tensor, float]:
    """Cluster the box shapes of a data set by the distance 1 - IoU (YOLOv2, Redmon and Farhadi 2016, section 2).

    The IoU is that of concentric boxes, so that large boxes do not dominate as with the Euclidean distance. Centres are
    initialised by k-means++ and updated to the means of their clusters; a centre with an empty cluster moves to the box
    with the lowest IoU. Since the mean does not always increase the IoU, the best centres found are returned, not the
    last.

    Args:
        widths_heights: (N, 2) positive widths and heights in any unit.
        count: number of priors.
        seed: seed of the initialisation.
        iterations: maximum number; stops earlier on convergence.

    Returns:
        (count, 2) priors by ascending area, and the mean IoU of all boxes with their best prior.

    Raises:
        ValueError: sides are not positive and finite, or there are fewer distinct boxes than priors.
    """
    if widths_heights.ndim != 2 or widths_heights.shape[1] != 2:
        raise ValueError(f"widths_heights must be (N, 2), but got {tuple(widths_heights.shape)}")
    # Shapes that are distinct in float32 have an IoU below 1 in float64.
    shapes = widths_heights.to(torch.float32).to(torch.float64)
    wrong = ~((shapes > 0) & shapes.isfinite()).all(1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"widths_heights[{index}] is {shapes[index].tolist()}: both must be positive and finite")
    distinct = len(shapes.unique(dim=0))
    if not 1 <= count <= distinct:
        raise ValueError(f"{count} priors cannot be clustered from {distinct} distinct boxes")

    priors = _first_centres(shapes, count, torch.Generator().manual_seed(seed))
    best, best_iou = priors, -1.0
    for _ in range(iterations):
        iou, nearest = _shape_iou(shapes, priors).max(1)
        if iou.mean() > best_iou:
            best, best_iou = priors, float(iou.mean())
        moved = _cluster_means(shapes, nearest, iou, count)
        if torch.equal(moved, priors):
            break
        priors = moved
    return best[best.prod(1).argsort()].to(torch.float32), best_iou


def _first_centres(shapes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Initialise by k-means++: draw centres with probability proportional to the squared distance to the nearest."""
    centres = shapes[torch.randint(len(shapes), (1,), generator=generator)]
    while len(centres) < count:
        distance = (1 - _shape_iou(shapes, centres).max(1).values).clamp(min=0)
        # A box equal to a centre has an IoU of exactly 1, so the centres are distinct.
        drawn = torch.multinomial(distance.square(), 1, generator=generator)
        centres = torch.cat((centres, shapes[drawn]))
    return centres


def _cluster_means(shapes: Tensor, nearest: Tensor, iou: Tensor, count: int) -> Tensor:
    members = torch.bincount(nearest, minlength=count)
    means = torch.zeros(count, 2, dtype=shapes.dtype).index_add_(0, nearest, shapes) / members.clamp(min=1)[:, None]
    empty = (members == 0).nonzero().flatten()
    means[empty] = shapes[iou.argsort()[: len(empty)]]
    return means


def _shape_iou(shapes: Tensor, others: Tensor) -> Tensor:
    """(N, M) IoU of concentric boxes of (N, 2) and (M, 2) widths and heights."""
    intersection = torch.minimum(shapes[:, None], others[None]).prod(-1)
    return intersection / (shapes.prod(1)[:, None] + others.prod(1) - intersection)


def _default_shapes(scale: float, next_scale: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    middle = math.sqrt(scale * next_scale)
    shapes = [(scale, scale), (middle, middle)]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return shapes


def _grid(map_size: tuple[int, int]) -> Tensor:
    """(h * w, 2) float32 (column, row) of every location, in row-major order."""
    rows, columns = torch.meshgrid(torch.arange(map_size[0]), torch.arange(map_size[1]), indexing="ij")
    return torch.stack((columns, rows), dim=-1).reshape(-1, 2).float()


def _anchors_at(centres: Tensor, shapes: Tensor) -> Tensor:
    """(L * A, 4) xyxy anchors of A (width, height) shapes around each of L (x, y) centres."""
    grid = torch.cat((centres[:, None].expand(-1, len(shapes), -1), shapes.expand(len(centres), -1, -1)), dim=-1)
    return cxcywh_to_xyxy(grid.reshape(-1, 4))
