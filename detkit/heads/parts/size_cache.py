"""A cache of tensors that depend only on sizes, such as the anchors of a head or the cells of its maps."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

KEPT = 8
"""Number of cached results; a network for images of any shape sees only a few sizes repeatedly."""

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


class PerSize(Generic[T]):
    """Calls `compute` once per size and device. The returned tensors are shared and must not be modified.

    Args:
        compute: a function of sizes that returns one or two tensors.
    """

    def __init__(self, compute: Callable[..., T]) -> None:
        self.compute: Callable[..., T] = compute
        self._known: dict[Any, T] = {}

    def __call__(self, device: torch.device, *sizes: Any) -> T:
        """Return `compute(*sizes)` on `device`; all sizes are tuples."""
        if torch.compiler.is_compiling():  # sizes may be symbolic; the compiler folds constants itself
            return _on(device, self.compute(*sizes))
        key = (device, *sizes)
        found = self._known.get(key)
        if found is None:
            with torch.inference_mode(False):  # later training may need it in autograd
                found = _on(device, self.compute(*sizes))
            # A new dict without the oldest entry, since other threads may be reading the current one.
            self._known = {**dict(list(self._known.items())[1 - KEPT :]), key: found}
        return found


def _on(device: torch.device, found: T) -> T:
    if isinstance(found, Tensor):
        return found.to(device)
    first, second = found
    return first.to(device), second.to(device)
