"""Embedding head: maps each image to a vector near those of the same class, including classes unseen in training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import check_range
from detkit.heads.base import Head, Postprocess, check_count
from detkit.heads.parts.pooling import pooled_images
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.zoo.embedding.losses import build_embed_loss
from detkit.zoo.embedding.structures import Embedding


class EmbedOutputs(NamedTuple):
    """Raw outputs of the embedding head.

    Args:
        vectors: (B, D) of any length.
    """

    vectors: Tensor


@heads.register("embed")
class Embed(Head):
    """Average pooling of the coarsest map, a linear layer, and L2 normalization.

    Training separates classes, but the vectors compare any two images, so validation may have other classes than
    training.

    Args:
        channels, strides: of the feature maps; only the last one is read.
        num_classes: C, the number of classes of the training images.
        dimensions: D, the length of the vectors.
        loss: `name` of the loss (triplet, large_margin, cosface, arcface) and its options; see
            detkit.zoo.embedding.losses.
    """

    task: ClassVar[str] = "embed"
    needs: ClassVar[frozenset[str]] = frozenset({"image_labels"})
    reads_sizes: ClassVar[bool] = True
    open_set: ClassVar[bool] = True
    threshold: Tensor
    """Scalar: distance below which two images show the same class; NaN before the first evaluation."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dimensions: int = 128,
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_range("head", 2, dimensions=dimensions)
        self.projection = nn.Linear(channels[-1], dimensions)
        self.criterion = build_embed_loss(dict(loss or {"name": "triplet"}), dimensions, num_classes)
        self.register_buffer("threshold", torch.tensor(math.nan))

    def forward(self, features: list[Tensor], inputs: Inputs) -> EmbedOutputs:
        """Compute the vector of each image from feature maps [(B, C_i, h_i, w_i)]."""
        return EmbedOutputs(self.projection(pooled_images(features[-1], inputs)).float())

    def loss(self, outputs: EmbedOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `embed` over the images that have a class.

        Raises:
            ValueError: there is not one target for each image, or an image has several classes.
        """
        if len(targets) != len(outputs.vectors):
            check_count(targets, ((0, 0),) * len(outputs.vectors))
        labels = []
        for target in targets:
            if target.image_labels is None or len(target.image_labels) > 1:
                raise ValueError("each image needs image_labels, of one class at most")
            labels.append(target.image_labels)
        counted = [image for image, present in enumerate(labels) if len(present)]
        return {"embed": self.criterion(outputs.vectors[counted], torch.cat(labels))}

    @torch.no_grad()
    def decode(self, outputs: EmbedOutputs, options: Postprocess | None = None) -> list[Embedding]:
        """Return the unit vector of each image."""
        return [Embedding(vector) for vector in F.normalize(outputs.vectors)]
