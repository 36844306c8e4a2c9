"""The errors that are the user's to fix: each one paragraph, saying what, where and the remedy.

The command line prints these without a traceback; every other exception is a fault of detkit's own.
"""

import difflib
import math
import re
from collections.abc import Iterable

LONGEST_MESSAGE = 2000
"""Characters of an error; what a file holds is quoted in errors, and a file can hold anything."""


class DetkitError(ValueError):
    """A mistake in what detkit was given. The message names the file, line, key or image, and the remedy.

    Of a message of more than LONGEST_MESSAGE characters the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE // 2]} [...] {text[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(text)


class ConfigError(DetkitError):
    """A config holds an unknown key, a value of the wrong type, or parts that do not fit together."""


class DataError(DetkitError):
    """A data set holds something broken: a missing file, a malformed annotation, an impossible box."""


class CheckpointError(DetkitError):
    """A file of weights is missing, broken, or belongs to another model or another list of classes."""


class WriteError(DetkitError):
    """A file or folder cannot be written: the disk is full, the path is wrong, or permission is missing."""


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters but tab and newline, and bytes of a file name that are not UTF-8."""


def printable(text: str) -> str:
    """`text` with every control character written as an escape ("\\x1b"), so that it can be sent to a terminal."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_range(path: str, low: float, high: float = math.inf, **options: float) -> None:
    """Refuse options that are not in low..high.

    Args:
        path: where in the config they stand ("head.rpn"); empty for options of a command.

    Raises:
        ConfigError: naming the first that is out of range.
    """
    for name, value in options.items():
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
            raise ConfigError(f"'{f'{path}.{name}' if path else name}' must be {allowed}, but is {value}.")


def counted(count: int, noun: str) -> str:
    """A number with its noun in the plural that it needs: "1 image", "2,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """A sentence for an error about an unknown `word`: the nearest valid one, then all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    suggestion = f"Did you mean '{close[0]}'? " if close else ""
    return f"{suggestion}Valid: {', '.join(valid) or '(none)'}."
