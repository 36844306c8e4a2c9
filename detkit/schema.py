"""Validation of values from files and command lines against the types of dataclasses and constructors.

Values are only data: nothing named in them is imported, called or downloaded here. Types are checked by pydantic; lists
become tuples and integers become floats where the type requires it, and nothing else is converted.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union

from detkit.errors import ConfigError, nearest
from detkit.io.files import parse_yaml

Schema = TypeVar("Schema")
WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    types.NoneType: ("null", "null"),
    dict: ("a mapping of keys to values", "mappings of keys to values"),
    collections.abc.Mapping: ("a mapping of keys to values", "mappings of keys to values"),
}
"""Names of types for users, singular and plural."""
LISTS = (tuple, list, collections.abc.Sequence)
DEEPEST = 50
"""Maximum nesting of a value. Configs need up to ten levels; Python's recursion limit is far above."""
LONGEST_KEY = 200
"""Characters, so that messages which name the key stay readable."""


def option_names(part: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keyword arguments of `part`."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(name for name, parameter in _signature(part).parameters.items() if parameter.kind not in kinds)


def required_names(part: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keyword arguments of `part` that have no default."""
    empty = inspect.Parameter.empty
    return frozenset(name for name in option_names(part) if _signature(part).parameters[name].default is empty)


def option_type(part: Callable[..., Any], name: str) -> Any:
    """Return the annotated type of the argument `name` of `part`, a dataclass or constructor; Any without annotation.

    Raises:
        ConfigError: the annotation names something that its module does not define.
    """
    function: Any = typing.cast(Any, part).__init__ if isinstance(part, type) else part
    annotation = _signature(part).parameters[name].annotation
    if annotation is inspect.Parameter.empty:
        return Any
    # Resolve only this annotation: others may have types that are imported only for type checkers.
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", None))[name]
    except NameError as error:
        raise ConfigError(f"The option '{name}' of {part!r} has a type that cannot be resolved: {error}.") from error


def build(schema: type[Schema], values: collections.abc.Mapping[str, Any], prefix: str = "") -> Schema:
    """Build a dataclass from plain values, and nested dataclasses from nested mappings.

    Args:
        schema: the dataclass.
        values: the values of its fields.
        prefix: prefix of field names in messages: "train.", "--".

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; the message has the full key.
    """
    for key in values:
        if key not in option_names(schema):
            raise ConfigError(f"'{prefix}{key}' is not a valid key. {nearest(str(key), option_names(schema))}")
    for key in sorted(required_names(schema) - set(values)):
        raise ConfigError(f"'{prefix}{key}' is missing. Add it to the config, or give it as --{prefix}{key} VALUE.")
    return schema(**{key: convert(value, option_type(schema, key), prefix + key) for key, value in values.items()})


def convert(value: Any, annotation: Any, path: str) -> Any:
    """Convert `value` to the type `annotation`.

    Args:
        value: a plain value: dict, list, text, number, true, false or null.
        annotation: a type, or a dataclass, which is built from a dict.
        path: the value's key, for messages: "train.lr".

    Raises:
        ConfigError: the value has another type; true, nan and infinity are not accepted as numbers.
    """
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise _wrong_type(value, annotation, path)
        return build(typing.cast(type[Any], annotation), value, f"{path}.")
    from pydantic import ValidationError

    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        location = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
    raise _wrong_type(value, annotation, path, location)


def plain(value: Any, path: str, depth: int = DEEPEST) -> Any:
    """Copy `value`, checking that YAML and JSON can represent it: dicts, lists, text, numbers, true, false and null.

    Args:
        value: the value; tuples become lists.
        path: its key, for messages; empty for a whole config.
        depth: maximum nesting.

    Raises:
        ConfigError: it contains another type, such as bytes or nan, or a key that is not text, or is nested too deeply.
    """
    where = f"'{path}'" if path else "The config"
    if depth == 0:
        raise ConfigError(f"{where} is nested deeper than {DEEPEST} levels. Reduce the nesting.")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    f"{where} has the key {format_value(key)}, but keys must be text. Write it in quotes."
                )
            if len(key) > LONGEST_KEY:
                raise ConfigError(
                    f"{where} has the key {format_value(key)}, but keys may have at most {LONGEST_KEY} characters."
                )
        return {key: plain(item, f"{path}.{key}" if path else key, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {format_value(value)}, but numbers must be finite.")
    if not isinstance(value, (str, int, float, types.NoneType)):
        raise ConfigError(
            f"{where} must be text, a number, true, false, null, a list or a mapping, but is {format_value(value)}."
        )
    return value


def given_options(arguments: list[str], is_switch: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Iterate over the (name, text) of each `--name text` and `--name=text` of a command line.

    Args:
        arguments: the arguments of the command line.
        is_switch: whether an option may be given without a value, which is then "true".

    Raises:
        ConfigError: an argument is not an option, or an option has no value.
    """
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument[2:].partition("=")
        if not argument.startswith("--") or not name:
            raise ConfigError(f"'{argument}' is not an option. Options are written as --NAME VALUE.")
        if not equals:
            if is_switch(name) and (not rest or rest[0].startswith("--")):
                text = "true"
            elif rest:
                text = rest.pop(0)
            else:
                raise ConfigError(f"'--{name}' needs a value: --{name} VALUE.")
        yield name, text


def from_text(text: str, annotation: Any, name: str) -> Any:
    """Parse the value of the option `--name`: as text if the type accepts text, otherwise as YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    kinds = _kinds(annotation)
    if str in kinds:
        return None if text == "null" and types.NoneType in kinds else text
    return parse_yaml(text, f"value of '--{name}'", ConfigError)


def put(values: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    """Set the value at the nested `keys`, creating missing mappings.

    Raises:
        ConfigError: a value on the way is not a mapping.
    """
    for position, key in enumerate(keys[:-1]):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            inner = ".".join(keys[: position + 1])
            raise ConfigError(
                f"'--{name}' sets a key within '{inner}', which is not a mapping, but {format_value(values)}."
            )
    values[keys[-1]] = value


def format_value(value: Any) -> str:
    """Format a value as in a config, truncated for messages."""
    if isinstance(value, str):
        text = f"'{value}'"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):  # also for integers of more than 4300 digits
            text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:60]} ... ({len(text):,} characters)"


def describe(annotation: Any, several: bool = False) -> str:
    """Describe a type in words: "a list of 2 numbers or null"."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in WORDS:
        return WORDS[origin][several]
    if origin is Literal or len(_kinds(annotation)) > 1:
        words = [
            word
            for kind in _kinds(annotation)
            for word in (map(format_value, typing.get_args(kind)) if _is_literal(kind) else [describe(kind, several)])
        ]
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if dataclasses.is_dataclass(annotation):
        return WORDS[dict][several]
    if origin in LISTS:
        list_word = "lists" if several else "a list"
        if not arguments:
            return list_word
        count = f"{len(arguments)} " if origin is tuple and arguments[-1] is not ... else ""
        return f"{list_word} of {count}{describe(arguments[0], True)}"
    return getattr(annotation, "__name__", str(annotation))


def print_options(schema: type[Any], prefix: str = "--") -> str:
    """Format the help of all fields of a dataclass: names, docstrings, types and defaults."""
    import argparse

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    _add_options(parser.add_argument_group("options"), parser, schema, prefix)
    return parser.format_help()


def _add_options(group: Any, parser: Any, schema: type[Any], prefix: str) -> None:
    described = option_docs(schema)
    for field in dataclasses.fields(schema):
        kind = option_type(schema, field.name)
        text = described.get(field.name, "")
        if dataclasses.is_dataclass(kind):
            _add_options(
                parser.add_argument_group(text.rstrip(".")),
                parser,
                typing.cast(type[Any], kind),
                f"{prefix}{field.name}.",
            )
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        ending = "required" if default is dataclasses.MISSING else f"default: {format_value(default)}"
        help_text = f"{text} ({describe(kind)}; {ending})".strip().replace("%", "%%")
        group.add_argument(f"{prefix}{field.name}", metavar=field.name.upper(), help=help_text)


def option_docs(schema: type[Any]) -> dict[str, str]:
    """Extract the "Args:" sections of the docstrings of a class and its bases, by argument."""
    described: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for entry in re.split(r"\n(?= {4}\S)", section.split("\n\n")[0]):
            names, _, text = entry.partition(":")
            described |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    return described


_signature = functools.cache(inspect.signature)


@functools.cache
def _adapter(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_strict(annotation), config=ConfigDict(arbitrary_types_allowed=True))


def _strict(annotation: Any) -> Any:
    """Disable pydantic's conversions between numbers, booleans and text in `annotation`."""
    from pydantic import AllowInfNan, BeforeValidator, Field, Strict, StringConstraints

    if annotation is int:
        return Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63), BeforeValidator(_number)]
    if annotation is float:
        return Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_number)]
    if annotation is bool:
        return Annotated[bool, Strict()]
    if annotation is str:
        return Annotated[str, StringConstraints(strict=True, pattern=r"\A[^\x00]*\z")]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None or origin is Literal:
        return annotation
    inner = tuple(kind if kind is ... else _strict(kind) for kind in arguments)
    return Union[inner] if origin in (Union, types.UnionType) else origin[inner]  # noqa: UP007 (made at run time)


def _number(value: Any) -> Any:
    """Convert quoted numbers."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def _wrong_type(value: Any, annotation: Any, path: str, location: Collection[int | str] = ()) -> ConfigError:
    """Create the error about the innermost invalid item; `location` is where pydantic found it."""
    for item in location:
        kinds = [kind for kind in _kinds(annotation) if kind is not types.NoneType]
        arguments = typing.get_args(kinds[0])
        inside = isinstance(item, int) and isinstance(value, (list, tuple)) and item < len(value)
        if len(kinds) > 1 or typing.get_origin(kinds[0]) not in LISTS or not inside:
            break
        index = int(item)
        path, value = f"{path}[{index}]", value[index]
        annotation = arguments[0] if len(arguments) == 1 or arguments[-1] is ... else arguments[index]
    return ConfigError(
        f"'{path}' must be {describe(annotation)}, but is {format_value(value)}.{_remedy(value, annotation)}"
    )


def _remedy(value: Any, annotation: Any) -> str:
    """Suggest how to fix a value that is not of the type `annotation`; empty if there is nothing to suggest."""
    kinds = _kinds(annotation)
    if isinstance(value, str) and str in kinds:
        return " It contains a NUL character, which is not allowed."
    if isinstance(value, str):
        names = [name for kind in kinds if _is_literal(kind) for name in typing.get_args(kind)]
        near = difflib.get_close_matches(value, [name for name in names if isinstance(name, str)], n=1)
        return f" Did you mean '{near[0]}'?" if near else ""
    if isinstance(value, (bool, int, float)) and str in kinds:
        return " Write it in quotes."
    if isinstance(value, int) and not isinstance(value, bool) and {int, float} & set(kinds):
        return " It is too large."
    return ""


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal
