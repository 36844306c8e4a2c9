"""Console output: one console for all commands, safe for any text and for closed pipes."""

import os
import sys
from typing import Any

import rich.console

from detkit.errors import printable


class Console(rich.console.Console):
    """A rich console that prints text verbatim: no markup, no highlighting, no hard line breaks.

    Control characters, such as escape sequences in file names, are escaped, so that data cannot send commands to the
    terminal. If the reader of a pipe exits (`| head -1`), the command continues and further output is dropped.
    """

    def __init__(self, quiet: bool = False, **options: Any) -> None:
        super().__init__(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """Drop further output; rich would exit the process."""
        self.quiet = True
        drop_output()


def drop_output() -> None:
    """Redirect standard output to the null device, after the reader of the pipe has exited."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def tolerate_any_text() -> None:
    """Print characters that the encoding of standard output or error lacks as escapes, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
