"""What every source of proposals promises: regions of an image that may hold an object, whatever it is."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from detkit.data.dataset import Dataset


class ProposalSource(ABC):
    """Proposes regions of images. Its constructor's arguments are its options; see detkit.registry.proposal_sources.

    Attributes:
        from_pixels: whether the proposals are computed from the image alone. Then they can be had for any image,
            and are kept in a cache; otherwise the source knows the images of one data set.
        key: text of everything that the proposals depend on besides the image: the options, and a version that
            changes with the algorithm. Proposals in the cache are found by it.
    """

    from_pixels: ClassVar[bool] = True
    key: str

    @abstractmethod
    def __call__(self, image: np.ndarray, image_id: int | str) -> Tensor:
        """Proposals of one image; may be called from several threads at once.

        Args:
            image: (H, W, 3) uint8 RGB, upright, in its own size.
            image_id: the data set's id of it.

        Returns:
            (P, 4) float32 xyxy pixels of `image`, inside it, best first.
        """

    def check(self, dataset: Dataset) -> str:
        """Look at all images of a data set that proposals will be asked for, before the first.

        Returns:
            A line about it for people.

        Raises:
            DataError: the source does not fit the data set.
        """
        return f"proposals for {len(dataset)} images"
