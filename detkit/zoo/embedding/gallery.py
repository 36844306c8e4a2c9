"""One-shot recognition: an image gets the name of the nearest image in a gallery, if it is near enough."""

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
    """Embeddings of named reference images.

    Args:
        names: the name of each image.
        vectors: (N, D) unit vectors.
        threshold: distance to the nearest of them from which an image is unknown.
    """

    names: tuple[str, ...]
    vectors: Tensor
    threshold: float

    @classmethod
    def read(
        cls, predictor: Predictor, folder: str | Path, threshold: float | None = None, batch_size: int = 8
    ) -> "Gallery":
        """Read a gallery from a folder with one subfolder of images per name, images named by file, or both.

        Args:
            predictor: a predictor of a model with the head `embed`.
            folder: contains for example Ada/1.jpg and Ada/2.jpg, or Ada.jpg.
            threshold: in 0..2; default the best one found in the evaluation of the model.

        Raises:
            ConfigError: the model gives no embeddings, or the threshold is not valid or missing.
            DataError: there are no images, or one cannot be read.
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
                "This model was never evaluated, so it has no threshold. Give --threshold, the distance from which an "
                "image is unknown; detkit eval prints the best one."
            )
        if not 0 <= chosen <= 2:
            raise ConfigError(f"'threshold' is a distance in 0..2, but is {chosen}.")
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(
                f"The gallery '{folder}' is not a folder. Give a folder with one subfolder of images per name."
            )
        files = find_images(folder)
        names = tuple(file.stem if file.parent == folder else file.relative_to(folder).parts[0] for file in files)
        found: Sequence[Embedding] = list(predictor.predict_all(files, batch_size=batch_size))
        return cls(names, torch.stack([embedding.vector for embedding in found]), chosen)

    def recognise(self, embedding: Embedding) -> Embedding:
        """Return the embedding with the distance and the name of the nearest image in the gallery; without a name if
        the distance is not below the threshold."""
        distances = torch.linalg.vector_norm(self.vectors - embedding.vector, dim=1)
        nearest = int(distances.argmin())
        distance = float(distances[nearest])
        return replace(
            embedding, identity=self.names[nearest] if distance < self.threshold else None, distance=distance
        )
