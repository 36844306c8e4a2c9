"""Helpers of the tests of the command line."""

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]
"""Runs a command in this process: its exit status, standard output and standard error."""


def fails(result: tuple[int, str, str], *parts: str) -> None:
    """One paragraph on stderr that holds all of `parts`."""
    status, _, error = result
    assert status == 1
    assert error.startswith("detkit: ")
    assert error.strip().count("\n") == 0
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error
