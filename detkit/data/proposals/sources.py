"""The interface of sources of proposals, class-agnostic candidate object regions of an image."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from detkit.data.dataset import Dataset


class ProposalSource(ABC):
    """Proposes regions of images. Its constructor's arguments are its options; see detkit.registry.proposal_sources.

    Attributes:
        from_pixels: whether the proposals are computed from the image alone, so that they are available for any image
            and are cached; otherwise the source only supports the images of one data set.
        key: text of everything that the proposals depend on besides the image: the options, and a version of the
            algorithm; part of the key of the cache.
    """

    from_pixels: ClassVar[bool] = True
    key: str

    @abstractmethod
    def __call__(self, image: np.ndarray, image_id: int | str) -> Tensor:
        """Compute the proposals of one image; may be called from several threads at once.

        Args:
            image: (H, W, 3) uint8 RGB, upright, at source size.
            image_id: the data set's id of the image.

        Returns:
            (P, 4) float32 xyxy pixels inside `image`, best first.
        """

    def check(self, dataset: Dataset) -> str:
        """Check that the source supports all images of a data set, before proposals are computed.

        Returns:
            A line for the report.

        Raises:
            DataError: the source does not match the data set.
        """
        return f"proposals for {len(dataset)} images"
