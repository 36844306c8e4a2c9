"""Transfer of batches from worker processes in two blocks of shared memory, for any number of tensors.

Each tensor sent on its own takes an open file in the receiving process. With six small tensors per image a few batches
of 64 exceed Linux's default limit of 1,024 open files.
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
"""Bytes; at least the largest element of a tensor."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch with its tensors in contiguous memory.

    Args:
        images: as in Batch; by far the largest tensor, hence not copied.
        others: (bytes,) uint8, all other tensors.
        layout: offset, dtype and shape of each of the other tensors.
        rest: the pickled batch, with indices instead of tensors.
    """

    images: Tensor
    others: Tensor
    layout: tuple[tuple[int, torch.dtype, torch.Size], ...]
    rest: bytes

    @property
    def nbytes(self) -> int:
        """Total bytes of its tensors."""
        return self.images.nbytes + self.others.nbytes

    def share(self) -> None:
        """Move the tensors to shared memory now, when errors can be caught, instead of when they are sent.

        Raises:
            RuntimeError: shared memory is full.
        """
        for tensor in (self.images, self.others):
            if tensor.nbytes:
                tensor.share_memory_()

    def pin_memory(self) -> "Packed":
        """Copy to pinned memory; called by the loader."""
        return Packed(self.images.pin_memory(), self.others.pin_memory(), self.layout, self.rest)

    def unpack(self) -> Batch:
        """Restore the batch, whose tensors share the memory of `images` and `others`."""
        batch: Batch = _Unpickler(self).load()
        return batch


def pack(batch: Batch) -> Packed:
    """Pack a batch; see `Packed`."""
    file = io.BytesIO()
    pickler = _Pickler(file, batch.images)
    pickler.dump(batch)
    begins = []
    end = 0
    for tensor in pickler.others:
        begins.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    layout = tuple((begin, tensor.dtype, tensor.shape) for begin, tensor in zip(begins, pickler.others))
    packed = Packed(batch.images, torch.empty(end, dtype=torch.uint8), layout, file.getvalue())
    for entry, tensor in zip(layout, pickler.others):
        _at(packed.others, *entry).copy_(tensor)
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
        return self.packed.images if number == _IMAGES else _at(self.packed.others, *self.packed.layout[number])
