"""What detkit prints: one console for every command, safe for any text and for a reader that goes away."""

import os
import sys
from typing import Any

import rich.console

from detkit.errors import printable


class Console(rich.console.Console):
    """A rich console that prints text as it is: no markup, no highlighting, no hard line breaks.

    Control characters in a text, such as escape sequences in the name of a file, are printed as escapes, so that
    nothing in a user's data reaches the terminal as a command. When the reader of a pipe goes away (`| head -1`), the
    work goes on and the output is dropped.
    """

    def __init__(self, quiet: bool = False, **options: Any) -> None:
        super().__init__(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """Drop the output from here on, where rich would end the process."""
        self.quiet = True
        drop_output()


def drop_output() -> None:
    """Let standard output lead nowhere, after the reader of the pipe has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def tolerate_any_text() -> None:
    """Let standard output and error print text that their encoding does not have, as escapes instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
