"""One-shot recognition: what an image shows is the name of the nearest image in a gallery, if it is near enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from detkit.data.sources import find_images
from detkit.errors import ConfigError, DataError
from detkit.inference.predictor import Predictor
from detkit.zoo.embedding.structures import Embedding


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images of known things.

    Args:
        names: of what each image shows.
        vectors: (N, D) of length 1.
        threshold: images as far as this from all of these, or farther, show something unknown.
    """

    names: tuple[str, ...]
    vectors: Tensor
    threshold: float

    @classmethod
    def read(
        cls, predictor: Predictor, folder: str | Path, threshold: float | None = None, batch_size: int = 8
    ) -> "Gallery":
        """The gallery in a folder: one folder of images for each name, or images named by their files, or both.

        Args:
            predictor: of a model with the head `embed`.
            folder: Ada/1.jpg and Ada/2.jpg, or Ada.jpg.
            threshold: in 0..2; default the one that the evaluation of the model found the best.

        Raises:
            ConfigError: the model gives no embeddings, or the threshold makes no sense or is missing.
            DataError: there is no image, or one cannot be read.
        """
        head = predictor.model.head
        if head.task != "embed":
            raise ConfigError(
                f"A gallery is for models that give embeddings, but this one gives {predictor.task.noun}. Train one "
                "with head: {name: embed}."
            )
        own = getattr(head, "threshold", None)
        chosen = threshold if threshold is not None else float(own) if isinstance(own, Tensor) else math.nan
        if math.isnan(chosen):
            raise ConfigError(
                "This model was never evaluated, so it has no threshold of its own. Give --threshold, the distance "
                "from which on an image is unknown: detkit eval prints the best."
            )
        if not 0 <= chosen <= 2:
            raise ConfigError(f"'threshold' is a distance in 0..2, but is {chosen}.")
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"The gallery '{folder}' is no folder. Give one with a folder of images for each name.")
        files = find_images(folder)
        names = tuple(file.stem if file.parent == folder else file.relative_to(folder).parts[0] for file in files)
        found: Sequence[Embedding] = list(predictor.predict_all(files, batch_size=batch_size))
        return cls(names, torch.stack([embedding.vector for embedding in found]), chosen)

    def recognise(self, embedding: Embedding) -> Embedding:
        """The embedding with the name and the distance of the nearest image of the gallery; without a name where that
        is not below the threshold."""
        distances = torch.linalg.vector_norm(self.vectors - embedding.vector, dim=1)
        nearest = int(distances.argmin())
        distance = float(distances[nearest])
        return replace(
            embedding, identity=self.names[nearest] if distance < self.threshold else None, distance=distance
        )
