"""Errors that the user can fix: one paragraph each, with what is wrong, where, and the remedy.

The command line prints them without a traceback; any other exception is a bug in detkit.
"""

import difflib
import math
import re
from collections.abc import Iterable

LONGEST_MESSAGE = 2000
"""Maximum characters of a message, which may quote the content of a file."""


class DetkitError(ValueError):
    """A mistake in the user's input. The message names the file, line, key or image, and the remedy.

    The middle of a message longer than LONGEST_MESSAGE is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE // 2]} [...] {text[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(text)


class ConfigError(DetkitError):
    """A config contains an unknown key, a value of the wrong type, or parts that do not fit together."""


class DataError(DetkitError):
    """A data set is invalid: a missing file, a malformed annotation, an impossible box."""


class CheckpointError(DetkitError):
    """A file of weights is missing, damaged, or belongs to another model or another list of classes."""


class WriteError(DetkitError):
    """A file or folder cannot be written: the disk is full, the path is wrong, or permission is missing."""


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters except tab and newline, and bytes of a file name that are not UTF-8."""


def printable(text: str) -> str:
    """Escape the control characters of `text` ("\\x1b"), so that it is safe to print to a terminal."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_range(path: str, low: float, high: float = math.inf, **options: float) -> None:
    """Raise ConfigError if an option is not in low..high.

    Args:
        path: where the options are in the config ("head.rpn"); empty for options of a command.

    Raises:
        ConfigError: naming the first that is out of range.
    """
    for name, value in options.items():
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
            raise ConfigError(f"'{f'{path}.{name}' if path else name}' must be {allowed}, but is {value}.")


def counted(count: int, noun: str) -> str:
    """Format a count with its noun in singular or plural: "1 image", "2,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """Suggest a replacement for an unknown `word` in an error: the nearest valid one, then all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    suggestion = f"Did you mean '{close[0]}'? " if close else ""
    return f"{suggestion}Valid: {', '.join(valid) or '(none)'}."
