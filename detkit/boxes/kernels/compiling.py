"""Compilation of the CPU kernels by Numba, and the cache on the disk that holds what was compiled.

Numba is imported with this module, so only the modules of kernels import it, and they when they are first needed.
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
    """`numba.njit` for a function that Python calls, kept in Numba's cache between processes.

    A cache that is damaged, cannot be written, or has no folder costs the time to compile anew, and nothing else. It
    does not notice changes in other files, so that all that the function calls stands in its own file.

    Args:
        signatures: types for which the function is compiled on import; none to compile at the first call.
        options: those of `numba.njit`; error_model "numpy" unless given.
    """

    def decorate(function: Any) -> Any:
        dispatcher = njit(**{"error_model": "numpy", **options})(function)
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            log.warning(
                "Numba finds no folder to keep compiled code in, so that each process compiles %s anew, which takes "
                "seconds. Set NUMBA_CACHE_DIR to a writable folder.",
                function.__name__,
            )
        for signature in signatures:
            dispatcher.compile(signature)
        if signatures:
            dispatcher.disable_compile()
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """Numba's cache, to which a damaged or unwritable file is no entry instead of an error."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file raises anything
            log.warning("The cache of compiled code is damaged (%s), so it is compiled anew.", error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk, a folder without permission
            super().save_overload(sig, data)
