"""Compilation of the CPU kernels by Numba, with a robust cache on disk.

This module imports Numba, so only the kernel modules import it, which are themselves imported on first use.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

log = logging.getLogger(__name__)

compiled = njit(nogil=True, error_model="numpy")  # NumPy's: no branch for a division by zero
inlined = njit(nogil=True, error_model="numpy", forceinline=True)  # small, in the innermost loops


def cached(*signatures: str, **options: Any) -> Callable[[Any], Any]:
    """`numba.njit` for a function called from Python, cached between processes.

    A cache that is damaged, not writable or without a folder only costs the time to compile again. The cache does not
    notice changes in other files, so everything that the function calls must be in its own file.

    Args:
        signatures: types for which the function is compiled on import; none to compile on the first call.
        options: options of `numba.njit`; error_model defaults to "numpy".
    """

    def decorate(function: Any) -> Any:
        dispatcher = njit(**{"error_model": "numpy", **options})(function)
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            log.warning(
                "Numba finds no writable cache folder, so each process compiles %s again, which takes seconds. Set "
                "NUMBA_CACHE_DIR to a writable folder.",
                function.__name__,
            )
        for signature in signatures:
            dispatcher.compile(signature)
        if signatures:
            dispatcher.disable_compile()
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """Numba's cache, which treats damaged and unwritable files as missing instead of raising an error."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file raises anything
            log.warning("The cache of compiled code is damaged (%s), so the code is compiled again.", error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk, a folder without permission
            super().save_overload(sig, data)
