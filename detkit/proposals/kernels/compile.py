"""How the kernels are compiled."""

import logging

from numba import njit

log = logging.getLogger(__name__)

compiled = njit(nogil=True, error_model="numpy")  # NumPy's: no branch for a division by zero
inlined = njit(nogil=True, error_model="numpy", forceinline=True)  # small, in the innermost loops


def entry(signature):  # type: ignore[no-untyped-def]
    """njit for what Python calls: with its types, compiled on import, or loaded from the cache where there is one.

    The cache does not notice changes in other files, so all that an entry calls is in its own file.
    """

    def decorate(function):  # type: ignore[no-untyped-def]
        try:
            return njit(signature, cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            log.warning(
                "Numba finds no folder to keep compiled code in, so that each process compiles selective search anew, "
                "for some twenty seconds. Set NUMBA_CACHE_DIR to a folder that can be written to."
            )
            return njit(signature, nogil=True, error_model="numpy")(function)

    return decorate
