"""Validation of single values of a JSON file, with errors that name the expected and the actual value."""

import math
import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def finite(value: object) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is something else: text, true, null, NaN, or a number beyond the range of floats.
    """
    if type(value) is float or type(value) is int:  # not isinstance, since bool is a subclass of int
        try:
            if math.isfinite(number := float(value)):
                return number
        except OverflowError:  # an integer of more than 308 digits
            pass
    raise ValueError(f"{short(value)} is not a finite number")


def whole(value: object, name: str) -> int:
    """Return a whole number; 3.0 is valid, since JSON has a single number type.

    Raises:
        ValueError: it is not a whole number.
    """
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f"{name} must be a whole number, but is {short(value)}")


def identifier(value: object, name: str) -> int | str:
    """Return the id of an image: text or a whole number.

    Raises:
        ValueError: it is neither.
    """
    try:
        return value if isinstance(value, str) else whole(value, name)
    except ValueError:
        raise ValueError(f"{name} must be a whole number or text, but is {short(value)}") from None


def finite_list(value: object, length: int, form: str) -> list[float]:
    """Return a list of `length` finite numbers.

    Args:
        value: the JSON value.
        length: the required length.
        form: the requirement, for the message: "'bbox' must be [x, y, width, height]".

    Raises:
        ValueError: it is not such a list.
    """
    if not isinstance(value, list) or len(value) != length:
        count = f", which has {len(value)} values" if isinstance(value, list) else ""
        raise ValueError(f"{form}, but is {short(value)}{count}")
    try:
        return [finite(item) for item in value]
    except ValueError as error:
        raise ValueError(f"{form}, but {error}") from None


def reason_of(error: Exception, entry: object) -> str:
    """Describe why an entry, which should be an object, cannot be used, from the error of reading it."""
    if not isinstance(entry, dict):
        return f"it must be an object with keys and values, but is {short(entry)}"
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def short(value: object) -> str:
    """Format a value for a message, limiting its length and nesting."""
    return _SHORT.repr(value)
