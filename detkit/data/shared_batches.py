"""A batch on its way from a worker process: two pieces of shared memory, however many tensors it has.

Each tensor that crosses alone takes an open file in the process that receives it. With six small ones for each image
a few batches of 64 reach what Linux allows a process by default, 1,024.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detkit.structures import Batch

_IMAGES = -1
_ALIGNMENT = 16
"""Bytes; no less than the largest element of a tensor."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch whose tensors lie one behind the other.

    Args:
        images: as in Batch; by far the largest, and so not copied.
        others: (bytes,) uint8, all others.
        places: where each of the others begins, its type and its shape.
        rest: the pickled batch, with numbers in the place of tensors.
    """

    images: Tensor
    others: Tensor
    places: tuple[tuple[int, torch.dtype, torch.Size], ...]
    rest: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.images.nbytes + self.others.nbytes

    def share(self) -> None:
        """Move the tensors to shared memory now, where an error can be caught, and not when they are sent.

        Raises:
            RuntimeError: there is no room for them.
        """
        for tensor in (self.images, self.others):
            if tensor.nbytes:
                tensor.share_memory_()

    def pin_memory(self) -> "Packed":
        """The same in page-locked memory, for the loader."""
        return Packed(self.images.pin_memory(), self.others.pin_memory(), self.places, self.rest)

    def unpack(self) -> Batch:
        """The batch; its tensors share the memory of `images` and `others`."""
        batch: Batch = _Unpickler(self).load()
        return batch


def pack(batch: Batch) -> Packed:
    """The batch as `Packed`."""
    file = io.BytesIO()
    pickler = _Pickler(file, batch.images)
    pickler.dump(batch)
    begins = []
    end = 0
    for tensor in pickler.others:
        begins.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    places = tuple((begin, tensor.dtype, tensor.shape) for begin, tensor in zip(begins, pickler.others))
    packed = Packed(batch.images, torch.empty(end, dtype=torch.uint8), places, file.getvalue())
    for place, tensor in zip(places, pickler.others):
        _at(packed.others, *place).copy_(tensor)
    return packed


def _at(memory: Tensor, begin: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, images: Tensor) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.images, self.others = images, list[Tensor]()

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if value is self.images:
            return _IMAGES
        self.others.append(value)
        return len(self.others) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.rest))
        self.packed = packed

    def persistent_load(self, number: int) -> Tensor:
        return self.packed.images if number == _IMAGES else _at(self.packed.others, *self.packed.places[number])
