"""Best overlaps of anchors and ground-truth boxes, computed without the (A, N) matrix of IoUs.

One pass over tiles of anchors: compiled code for float32 and float64 on the CPU, otherwise torch. Both are
bit-identical to `pairwise_iou` (with 0 for NaN) followed by torch's max.
"""

import numpy as np
import torch
from torch import Tensor

from detkit.boxes.iou import at_least_float32, intersection_over_area, pairwise_iou

TILE_PAIRS = 2**20
"""IoUs of a tile in torch: 4 MB for each of the roughly ten tensors of `pairwise_iou`."""

TILE_ANCHORS = 1024
"""Anchors of a tile in compiled code: their coordinates and one row of IoUs fit into the L1 cache."""


class TiledOverlaps:
    """The overlaps of A anchors with N ground-truth boxes, in torch operations on any device.

    Args:
        anchors: (A, 4) xyxy without NaN, A > 0.
        targets: (N, 4) xyxy without NaN, N > 0.

    Attributes:
        anchor_iou: (A,) largest IoU of each anchor.
        anchor_target: (A,) int64, the first ground-truth box with this IoU.
        target_iou: (N,) largest IoU of each ground-truth box.
        target_anchor: (N,) int64, the first anchor with this IoU.
    """

    def __init__(self, anchors: Tensor, targets: Tensor) -> None:
        self._tiles = anchors.detach().split(max(1, TILE_PAIRS // len(targets)))
        self._ground_truths = targets.detach()
        best_of_anchors = []
        begin = 0
        for tile in self._tiles:
            iou = _known_iou(tile, self._ground_truths)
            best_of_anchors.append(iou.max(1))
            value, index = iou.max(0)
            if begin == 0:
                self.target_iou, self.target_anchor = value, index
            else:
                better = value > self.target_iou
                self.target_iou = torch.where(better, value, self.target_iou)
                self.target_anchor = torch.where(better, begin + index, self.target_anchor)
            begin += len(tile)
        self.anchor_iou, self.anchor_target = (torch.cat(parts) for parts in zip(*best_of_anchors))

    def attain_best(self) -> Tensor:
        """(A,) bool, the anchors with the largest IoU, above 0, of some ground-truth box, including all ties."""
        some = self.target_iou > 0
        return torch.cat(
            [((_known_iou(tile, self._ground_truths) == self.target_iou) & some).any(1) for tile in self._tiles]
        )

    def best_free(self, target: int, free: Tensor) -> tuple[float, int]:
        """Return the largest IoU of a ground-truth box with the `free` anchors, (A,) bool, and the first such anchor.

        Returns -1 and 0 if no anchor is free.
        """
        iou = torch.cat([_known_iou(tile, self._ground_truths[target : target + 1])[:, 0] for tile in self._tiles])
        value, index = torch.where(free, iou, -1).max(0)
        return float(value), int(index)

    def covered(self, part: float) -> Tensor:
        """(A,) bool, the anchors with at least the fraction `part`, above 0, of their area inside one of the boxes."""
        return torch.cat([(intersection_over_area(tile, self._ground_truths) >= part).any(1) for tile in self._tiles])


class CompiledOverlaps:
    """`TiledOverlaps` in compiled code, for tensors on the CPU that are both float32 or both float64."""

    def __init__(self, anchors: Tensor, targets: Tensor) -> None:
        # Imported on first use: Numba takes half a second to import.
        from detkit.boxes.kernels import iou_numba as overlap_numba

        self._kernels = overlap_numba
        self._anchors, self._ground_truths = (
            overlap_numba.columns(np.ascontiguousarray(boxes.detach().numpy())) for boxes in (anchors, targets)
        )
        row = np.empty(TILE_ANCHORS, dtype=self._anchors[0].dtype)
        self._scratch = row, row.view(f"i{row.itemsize}")
        anchor_iou, anchor_target, target_bits, target_anchor, target_end = overlap_numba.best_overlaps(
            self._anchors, self._ground_truths, *self._scratch
        )
        self._best_of_targets = target_bits, target_anchor, target_end
        self.anchor_iou, self.anchor_target = torch.from_numpy(anchor_iou), torch.from_numpy(anchor_target).long()
        self.target_iou, self.target_anchor = (
            torch.from_numpy(target_bits.view(row.dtype)),
            torch.from_numpy(target_anchor),
        )

    def attain_best(self) -> Tensor:
        attains = self._kernels.attain_best(self._anchors, self._ground_truths, *self._best_of_targets, *self._scratch)
        return torch.from_numpy(attains)

    def best_free(self, target: int, free: Tensor) -> tuple[float, int]:
        value, index = self._kernels.best_free(self._anchors, self._ground_truths, target, free.numpy(), *self._scratch)
        return float(value), int(index)

    def covered(self, part: float) -> Tensor:
        return torch.from_numpy(self._kernels.largest_cover(self._anchors, self._ground_truths)) >= part


def _known_iou(anchors: Tensor, targets: Tensor) -> Tensor:
    """(A, N) IoUs, with 0 instead of NaN for boxes of infinite area, which then do not match."""
    return pairwise_iou(anchors, targets).nan_to_num(0)


def find_overlaps(anchors: Tensor, targets: Tensor) -> TiledOverlaps | CompiledOverlaps:
    """Compute the overlaps by compiled code if possible, otherwise by torch; arguments as for `TiledOverlaps`."""
    anchors, targets = at_least_float32(anchors), at_least_float32(targets)
    if anchors.device.type == targets.device.type == "cpu" and anchors.dtype == targets.dtype:
        return CompiledOverlaps(anchors, targets)
    return TiledOverlaps(anchors, targets)
