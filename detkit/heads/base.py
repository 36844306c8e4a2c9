"""The head interface: one forward pass, then a loss or predictions from its raw outputs."""

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
"""Value of Postprocess.max_candidates for no limit."""
DECODING = frozenset({"conf", "iou", "max_det"})
"""The prediction options that `Head.decode` can read."""
SLACK = 1e-4
"""Relative margin below the score threshold; larger than the rounding error of a score, even with thousands of
classes."""


@dataclass(frozen=True)
class Postprocess:
    """Selection of detections from candidates: score threshold, top-k per class, NMS, top-k per image.

    Args:
        score_threshold: only candidates with a higher score are kept.
        iou_threshold: of two detections of one class with a higher IoU, the lower-scoring one is removed.
        max_candidates: number of candidates per class and image that enter NMS. The default is SSD's; two-stage heads
            do not limit it.
        max_detections: number of detections per image that are kept.
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
            raise ConfigError(f"The maximum number of detections must be at least 1, but is {self.max_detections}.")

    @property
    def least_logit(self) -> float:
        """A lower bound of the logits whose sigmoid is above the score threshold, robust to rounding of the sigmoid."""
        score = self.score_threshold * (1 - SLACK)
        return math.log(score / (1 - score)) if score else -math.inf

    def above_threshold(self, limits: Tensor) -> Tensor:
        """Return the indices (K,), ascending, of the rows that may have a score above the threshold.

        Args:
            limits: (A,) logits, each an upper bound of its row's scores after the sigmoid; not finite if a score may
                be NaN. Such rows are included, so that `candidates` can report them.
        """
        return ((limits > self.least_logit) | ~limits.isfinite()).nonzero().flatten()

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the entries of one image's (A, C) scores that enter NMS: rows, labels and scores, (K,) each.

        Raises:
            DetkitError: a score is NaN.
        """
        # Most rows have no score above the threshold and are dropped first. The maximum propagates NaN.
        rows_above = (~(scores.amax(1) <= self.score_threshold)).nonzero().flatten()
        scores = scores[rows_above]
        if scores.numel() and scores.max().isnan():
            raise DetkitError(
                "The network's scores are NaN: its weights are broken, for example because training diverged, or half "
                "precision overflowed. Use another checkpoint, or train.precision 32-true."
            )
        above = scores > self.score_threshold
        # Sorting dominates the run time, so only classes with too many candidates are sorted.
        crowded = (above.count_nonzero(0) > self.max_candidates).nonzero().flatten()
        if not len(crowded):
            rows, labels = above.nonzero(as_tuple=True)
            return rows_above[rows], labels, scores[rows, labels]
        best, best_rows = scores.index_select(1, crowded).topk(self.max_candidates, dim=0)
        rows, labels = above.index_fill_(1, crowded, False).nonzero(as_tuple=True)
        return (
            rows_above[torch.cat((rows, best_rows.flatten()))],
            torch.cat((labels, crowded.expand_as(best).flatten())),
            torch.cat((scores[rows, labels], best.flatten())),
        )

    def detections(self, candidates: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Detections]:
        """Run NMS on the candidates of a batch in one call.

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
    """Raise ValueError if a batch does not have exactly one target per image."""
    if len(targets) != len(sizes):
        raise ValueError(f"{len(sizes)} images but {len(targets)} targets")


class Head(nn.Module, ABC):
    """Base class of heads: the task-specific part of a model, on top of feature maps.

    The constructor takes `channels` and `strides` of the maps and `num_classes`, then options. `forward` never
    reads `self.training`, so the same forward pass serves the validation loss and the predictions.

    Attributes:
        task: its name in detkit.registry.tasks, also the name of the folder of its runs: "detect".
        needs: the fields of Target that its loss reads; checked against the data set before training.
        postprocess: the default decoding options of a detector.
        decode_options: the prediction options that `decode` reads, a subset of DECODING.
        unmixed_losses: losses that training sets to 0 in epochs with mixed images (mosaic, mixup).
        reads_sizes: whether `forward` computes with the image sizes, rather than only passing them to `decode`.
        full_precision: whether half precision would change its results by more than a few thousandths.
        open_set: whether it can be evaluated on classes it was not trained on, because it only compares images.
        any_size: whether it processes images of any size unscaled and therefore supports input.resize crop.
        trims_padding: whether its output at a location depends only on the surrounding features, not on the input
            size, so that at prediction letterboxed images are padded only to a multiple of 32.
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
        """Load external input of a new head other than weights, such as the image whose style it learns.

        Called once before training; the result is saved in the checkpoint and not loaded again.

        Raises:
            DetkitError: the input is not available.
        """
        return

    @abstractmethod
    def forward(self, features: list[Tensor], inputs: Inputs) -> Any:
        """Compute raw outputs from feature maps [(B, C_i, h_i, w_i)]."""

    @abstractmethod
    def loss(self, outputs: Any, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Return scalar losses by name, to be summed; finite even if no image has an object."""

    @abstractmethod
    def decode(self, outputs: Any, options: Postprocess | None = None) -> Sequence[Prediction]:
        """Return a list with one prediction per image, in pixels of the network's input.

        Args:
            options: decoding options of a detector; None for `self.postprocess`.
        """
