"""What depends on nothing but sizes, computed once for each: the anchors of a head, the cells of its maps."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

KEPT = 8
"""Sizes of which the results are kept: a network that takes images of any shape meets few again and again."""

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


class PerSize(Generic[T]):
    """Calls `compute` once for each size and device. What it returns is shared, and not to be changed.

    Args:
        compute: a function of sizes, which gives a tensor or two.
    """

    def __init__(self, compute: Callable[..., T]) -> None:
        self.compute: Callable[..., T] = compute
        self._known: dict[Any, T] = {}

    def __call__(self, device: torch.device, *sizes: Any) -> T:
        """`compute(*sizes)` on `device`; all sizes are tuples."""
        if torch.compiler.is_compiling():  # sizes may be symbols, and the graph makes constants of what it can
            return _on(device, self.compute(*sizes))
        key = (device, *sizes)
        found = self._known.get(key)
        if found is None:
            with torch.inference_mode(False):  # a training that follows may need it for gradients
                found = _on(device, self.compute(*sizes))
            # A new dict, since other threads may be reading this one; without the oldest.
            self._known = {**dict(list(self._known.items())[1 - KEPT :]), key: found}
        return found


def _on(device: torch.device, found: T) -> T:
    if isinstance(found, Tensor):
        return found.to(device)
    first, second = found
    return first.to(device), second.to(device)
