"""A source of proposals and a head that reads them, both as small as can be."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from detkit.data.proposals.sources import ProposalSource
from detkit.heads.base import Head, Postprocess
from detkit.structures import Detections, Inputs, Target


class Grid(ProposalSource):
    """Squares side by side, row by row; none at all for an image whose first pixel is darker than `darkest`."""

    calls: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, side: int = 16, copies: int = 1, darkest: int = -1) -> None:
        self.side, self.copies, self.darkest = side, copies, darkest
        self.key = f"grid {side} {copies} {darkest}"

    def __call__(self, image: np.ndarray, image_id: int | str) -> Tensor:
        self.calls.append(image.shape[:2])
        return grid(image.shape[0], image.shape[1], self.side, self.copies if int(image[0, 0, 0]) > self.darkest else 0)


def grid(height: int, width: int, side: int = 16, copies: int = 1) -> Tensor:
    boxes = [
        [x, y, min(x + side, width), min(y + side, height)]
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    return torch.tensor(boxes * copies, dtype=torch.float32).reshape(-1, 4)


class Outputs(NamedTuple):
    scores: Tensor
    pooled: Tensor
    proposals: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]


class RegionHead(Head):
    """Each proposal is scored by what it covers; its loss runs a layer, as that of a two-stage head does."""

    task = "detect"
    needs = frozenset({"boxes", "labels", "proposals"})
    seen: ClassVar[list[Inputs]] = []
    loss_dtypes: ClassVar[set[torch.dtype]] = set()

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.scale = 1 / strides[0]
        self.score = nn.Linear(channels[0] * 4, num_classes + 1)
        self.late = nn.Linear(channels[0] * 4, 1)
        self.postprocess = Postprocess(score_threshold=0.0)

    def forward(self, features: list[Tensor], inputs: Inputs) -> Outputs:
        self.seen.append(inputs)
        assert inputs.proposals is not None
        pooled = roi_align(features[0].float(), list(inputs.proposals), 2, self.scale).flatten(1)
        return Outputs(self.score(pooled), pooled, inputs.proposals, inputs.sizes)

    def loss(self, outputs: Outputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        labels = torch.cat([self._labels(*pair) for pair in zip(outputs.proposals, targets)])
        late = self.late(outputs.pooled)
        self.loss_dtypes.add(late.dtype)
        return {
            "class": F.cross_entropy(outputs.scores.float(), labels, reduction="sum") / max(1, len(labels)),
            "late": late.float().square().sum() / max(1, len(labels)),
        }

    def _labels(self, proposals: Tensor, target: Target) -> Tensor:
        background = self.score.out_features - 1
        if not len(target):
            return torch.full((len(proposals),), background)
        best, index = box_iou(proposals, target.boxes).max(1) if len(proposals) else (proposals.new_zeros(0),) * 2
        return torch.where(best > 0.3, target.labels[index.long()], background)

    def decode(self, outputs: Outputs, options: Any = None) -> list[Detections]:
        found: list[Any] = []
        start = 0
        for boxes in outputs.proposals:
            scores, labels = outputs.scores[start : start + len(boxes), :-1].float().softmax(1).max(1)
            start += len(boxes)
            order = scores.argsort(descending=True, stable=True)[: self.postprocess.max_detections]
            order = order[scores[order] > self.postprocess.score_threshold]
            found.append(Detections(boxes[order], scores[order], labels[order]))
        return found
