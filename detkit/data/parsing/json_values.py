"""Checks of single values of a JSON file, whose errors say what the value must be and what it is."""

import math
import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def finite(value: object) -> float:
    """A finite number.

    Raises:
        ValueError: it is not one: text, true, null, NaN, or a number beyond the range of floats.
    """
    if type(value) is float or type(value) is int:  # not isinstance: true and false are whole numbers to Python
        try:
            if math.isfinite(number := float(value)):
                return number
        except OverflowError:  # a whole number of more than 308 digits
            pass
    raise ValueError(f"{short(value)} is not a finite number")


def whole(value: object, name: str) -> int:
    """A whole number; 3.0 is one, since JSON has a single type of numbers.

    Raises:
        ValueError: it is not one.
    """
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f"{name} must be a whole number, but it is {short(value)}")


def identifier(value: object, name: str) -> int | str:
    """The id of an image: text or a whole number.

    Raises:
        ValueError: it is neither.
    """
    try:
        return value if isinstance(value, str) else whole(value, name)
    except ValueError:
        raise ValueError(f"{name} must be a whole number or text, but it is {short(value)}") from None


def finite_list(value: object, length: int, form: str) -> list[float]:
    """A list of `length` finite numbers.

    Args:
        value: the value as JSON has it.
        length: how many numbers it must have.
        form: what it must be, for the message: "'bbox' must be [x, y, width, height]".

    Raises:
        ValueError: it is not such a list.
    """
    if not isinstance(value, list) or len(value) != length:
        count = f", which has {len(value)} values" if isinstance(value, list) else ""
        raise ValueError(f"{form}, but it is {short(value)}{count}")
    try:
        return [finite(item) for item in value]
    except ValueError as error:
        raise ValueError(f"{form}, but {error}") from None


def reason_of(error: Exception, entry: object) -> str:
    """Why an entry, which should be an object, cannot be used: what looking into it raised, in words."""
    if not isinstance(entry, dict):
        return f"it must be an object with keys and values, but it is {short(entry)}"
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def short(value: object) -> str:
    """A value for a message, shortened however long or deeply nested it is."""
    return _SHORT.repr(value)
