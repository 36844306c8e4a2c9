"""What every head promises, whatever its task: one forward, then a loss or predictions from its raw outputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detkit.boxes.nms import nms
from detkit.errors import ConfigError, DetkitError
from detkit.structures import Detections, Inputs, Prediction, Target

ALL = 1_000_000_000
"""For Postprocess.max_candidates."""
DECODING = frozenset({"conf", "iou", "max_det"})
"""The options of a prediction that `Head.decode` may read."""
SLACK = 1e-4
"""Part of the score threshold; rounding moves a score by less, also one of thousands of classes."""


@dataclass(frozen=True)
class Postprocess:
    """Which candidates become detections.

    Args:
        score_threshold: a candidate needs a higher score.
        iou_threshold: of two detections of one class that overlap more, the one with the lower score goes.
        max_candidates: the best of each class and image that enter suppression. SSD's default; heads with a second
            stage have all their proposals enter.
        max_detections: the best of each image that are kept.
    """

    score_threshold: float = 0.01
    iou_threshold: float = 0.45
    max_candidates: int = 400
    max_detections: int = 200

    def __post_init__(self) -> None:
        for name in ("score_threshold", "iou_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"The {name.replace('_', ' ')} must lie in 0..1, but is {getattr(self, name)}.")
        if min(self.max_candidates, self.max_detections) < 1:
            raise ConfigError(f"At least one detection must be allowed, but it is {self.max_detections}.")

    @property
    def least_logit(self) -> float:
        """Every logit whose sigmoid is above the score threshold is above it, however the sigmoid is rounded."""
        score = self.score_threshold * (1 - SLACK)
        return math.log(score / (1 - score)) if score else -math.inf

    def promising(self, limits: Tensor) -> Tensor:
        """(K,) indices, ascending, of the rows whose scores are worth computing.

        Args:
            limits: (A,) for each row a number whose sigmoid none of its scores is above; not finite where a score may
                not be a number, which `candidates` is to see.
        """
        return ((limits > self.least_logit) | ~limits.isfinite()).nonzero().flatten()

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which entries of one image's (A, C) scores may become detections: rows, labels and scores, (K,) each.

        Raises:
            DetkitError: a score is not a number.
        """
        # Of most rows no score is above the threshold: they are not looked at again. The maximum with NaN is NaN.
        promising = (~(scores.amax(1) <= self.score_threshold)).nonzero().flatten()
        scores = scores[promising]
        if scores.numel() and scores.max().isnan():
            raise DetkitError(
                "The network's scores are not numbers (NaN): its weights are broken, as after a training that "
                "diverged, or half precision overflowed. Use another checkpoint, or train.precision 32-true."
            )
        above = scores > self.score_threshold
        # Sorting takes longer than all else: only of classes that have too many.
        crowded = (above.count_nonzero(0) > self.max_candidates).nonzero().flatten()
        if not len(crowded):
            rows, labels = above.nonzero(as_tuple=True)
            return promising[rows], labels, scores[rows, labels]
        best, best_rows = scores.index_select(1, crowded).topk(self.max_candidates, dim=0)
        rows, labels = above.index_fill_(1, crowded, False).nonzero(as_tuple=True)
        return (
            promising[torch.cat((rows, best_rows.flatten()))],
            torch.cat((labels, crowded.expand_as(best).flatten())),
            torch.cat((scores[rows, labels], best.flatten())),
        )

    def detections(self, candidates: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Detections]:
        """Suppress the candidates of a batch in one call.

        Args:
            candidates: boxes (K, 4), scores (K,) and labels (K,) of each image.

        Returns:
            The detections of each image, best score first.
        """
        if not candidates:
            return []
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates))
        image_index = torch.cat([torch.full_like(each[2], image) for image, each in enumerate(candidates)])
        kept = nms(
            boxes,
            scores,
            self.iou_threshold,
            labels=labels,
            image_index=image_index if len(candidates) > 1 else None,
            max_detections=self.max_detections,
        )
        of_image = [kept[image_index[kept] == image] for image in range(len(candidates))]
        return [Detections(boxes[rows], scores[rows], labels[rows]) for rows in of_image]


def check_count(targets: tuple[Target, ...], sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse a batch that has not one target for each image."""
    if len(targets) != len(sizes):
        raise ValueError(f"{len(sizes)} images but {len(targets)} targets")


class Head(nn.Module, ABC):
    """A task on top of feature maps.

    The constructor takes `channels` and `strides` of the maps and `num_classes`, then options. `forward` never
    reads `self.training`, so that one forward serves the validation loss and the predictions.

    Attributes:
        task: what it does, out of detkit.registry.tasks, and the name of the folder of its runs: "detect".
        needs: the fields of Target that its loss reads; checked against the data set at the start.
        postprocess: the default options of `decode` of a detector.
        decode_options: the options of a prediction that `decode` reads, out of DECODING.
        unmixed_losses: the losses that training counts as 0 in epochs whose images are mixed (mosaic, mixup).
        reads_sizes: `forward` computes with the sizes of the images; it may pass them on to `decode` without.
        full_precision: half precision would move its results by more than some thousandths.
        open_set: it compares images of any classes, and so may be scored on others than it was trained on.
        any_size: it finds objects in images of any size as they are, and so can go with input.resize crop.
        trims_padding: what it says of a place depends on the maps around it and not on the size of the input, so that
            at prediction letterboxed images need no more padding than up to a multiple of 32.
    """

    task: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    unmixed_losses: ClassVar[frozenset[str]] = frozenset()
    reads_sizes: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    trims_padding: ClassVar[bool] = False
    open_set: ClassVar[bool] = False
    decode_options: ClassVar[frozenset[str]] = frozenset()
    postprocess: Postprocess

    def prepare(self) -> None:
        """Take in what else than weights a new head starts from, such as the image whose style it learns. Called once
        before training; what it computes belongs to the checkpoint, and is not asked for again.

        Raises:
            DetkitError: it is not available.
        """
        return

    @abstractmethod
    def forward(self, features: list[Tensor], inputs: Inputs) -> Any:
        """Raw outputs for feature maps [(B, C_i, h_i, w_i)]."""

    @abstractmethod
    def loss(self, outputs: Any, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Scalars by name, to be summed; finite also when no image has an object."""

    @abstractmethod
    def decode(self, outputs: Any, options: Postprocess | None = None) -> Sequence[Prediction]:
        """One result for each image, a list, in pixels of the network's input.

        Args:
            options: of a detector, the candidates to keep; None for `self.postprocess`.
        """
