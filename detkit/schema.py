"""Checks values from files and command lines against the types of dataclasses and of parts' constructors.

A value is data and stays data: nothing that is named in it is imported, called or downloaded here. Types are checked by
pydantic; lists become tuples and whole numbers become floats where the type says so, and nothing else is converted.
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
"""Types as a user calls them, one and many."""
LISTS = (tuple, list, collections.abc.Sequence)
DEEPEST = 50
"""Levels that a value may be nested. Configs have up to ten; Python's own limit ends far above."""
LONGEST_KEY = 200
"""Characters, so that messages, which name the key, stay readable."""


def option_names(part: Callable[..., Any]) -> frozenset[str]:
    """The keyword arguments that `part` takes."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(name for name, parameter in _signature(part).parameters.items() if parameter.kind not in kinds)


def required_names(part: Callable[..., Any]) -> frozenset[str]:
    """The keyword arguments of `part` without a default."""
    empty = inspect.Parameter.empty
    return frozenset(name for name in option_names(part) if _signature(part).parameters[name].default is empty)


def option_type(part: Callable[..., Any], name: str) -> Any:
    """The type that `part`, a dataclass or a constructor, gives to its argument `name`; Any where it gives none.

    Raises:
        ConfigError: the annotation names something that its module does not have.
    """
    function: Any = typing.cast(Any, part).__init__ if isinstance(part, type) else part
    annotation = _signature(part).parameters[name].annotation
    if annotation is inspect.Parameter.empty:
        return Any
    # Only this one: the arguments that the program supplies may have types that are imported for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", None))[name]
    except NameError as error:
        raise ConfigError(f"The option '{name}' of {part!r} has a type that cannot be resolved: {error}.") from error


def build(schema: type[Schema], values: collections.abc.Mapping[str, Any], prefix: str = "") -> Schema:
    """An instance of a dataclass from plain values, nested dataclasses from nested mappings.

    Args:
        schema: the dataclass.
        values: its fields.
        prefix: what stands before the name of a field in messages: "train.", "--".

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
    """`value` as the type `annotation`.

    Args:
        value: dicts, lists, text, numbers, true, false, null.
        annotation: a type, or a dataclass, which is built from a dict.
        path: the value's key, for messages: "train.lr".

    Raises:
        ConfigError: the value has another type; true is not a number, and nan and infinity are none either.
    """
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise _wrong_type(value, annotation, path)
        return build(typing.cast(type[Any], annotation), value, f"{path}.")
    from pydantic import ValidationError

    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        place = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
    raise _wrong_type(value, annotation, path, place)


def plain(value: Any, path: str, depth: int = DEEPEST) -> Any:
    """A copy of `value` in dicts, lists, text, numbers, true, false and null, for YAML and JSON.

    Args:
        value: such a value; tuples become lists.
        path: its key, for messages; empty for a whole config.
        depth: levels that it may be nested.

    Raises:
        ConfigError: it holds something else, such as bytes or nan, or a key that is not text, or is nested too deeply.
    """
    where = f"'{path}'" if path else "The config"
    if depth == 0:
        raise ConfigError(f"{where} is nested deeper than {DEEPEST} levels. Write it with fewer.")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where} has the key {shown(key)}, but keys must be text. Write it in quotes.")
            if len(key) > LONGEST_KEY:
                raise ConfigError(f"{where} has the key {shown(key)}, but keys have up to {LONGEST_KEY} characters.")
        return {key: plain(item, f"{path}.{key}" if path else key, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {shown(value)}, but numbers must be finite.")
    if not isinstance(value, (str, int, float, types.NoneType)):
        raise ConfigError(
            f"{where} must be text, a number, true, false, null, a list or a mapping, but is {shown(value)}."
        )
    return value


def given_options(arguments: list[str], is_switch: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Name and text of each `--name text` and `--name=text` of a command line.

    Args:
        arguments: those of the command line.
        is_switch: whether an option may be given without its text, which is "true" then.

    Raises:
        ConfigError: an argument is not an option, or an option has no text.
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
    """The value of the option `--name` as it was typed: text where the type takes text, else YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    kinds = _kinds(annotation)
    if str in kinds:
        return None if text == "null" and types.NoneType in kinds else text
    return parse_yaml(text, f"value of '--{name}'", ConfigError)


def put(values: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    """Set what stands under `keys`; mappings on the way are made where there is nothing.

    Raises:
        ConfigError: what stands on the way has no keys.
    """
    for position, key in enumerate(keys[:-1]):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            inner = ".".join(keys[: position + 1])
            raise ConfigError(f"'--{name}' sets a key within '{inner}', which has no keys: it is {shown(values)}.")
    values[keys[-1]] = value


def shown(value: Any) -> str:
    """A value as a config has it, cut to a length for messages."""
    if isinstance(value, str):
        text = f"'{value}'"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):  # among them whole numbers of over 4300 digits
            text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:60]} ... ({len(text):,} characters)"


def describe(annotation: Any, several: bool = False) -> str:
    """A type in words: "a list of 2 numbers or null"."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in WORDS:
        return WORDS[origin][several]
    if origin is Literal or len(_kinds(annotation)) > 1:
        words = [
            word
            for kind in _kinds(annotation)
            for word in (map(shown, typing.get_args(kind)) if _is_literal(kind) else [describe(kind, several)])
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
    """The help of all fields of a dataclass: names, docstrings, types and defaults."""
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
        ending = "required" if default is dataclasses.MISSING else f"default: {shown(default)}"
        help_text = f"{text} ({describe(kind)}; {ending})".strip().replace("%", "%%")
        group.add_argument(f"{prefix}{field.name}", metavar=field.name.upper(), help=help_text)


def option_docs(schema: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and its bases say under "Args:", by argument."""
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
    """`annotation` with pydantic's conversions between numbers, ground truth values and text switched off."""
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
    """The number that a text in quotes is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def _wrong_type(value: Any, annotation: Any, path: str, place: Collection[int | str] = ()) -> ConfigError:
    """The error about the innermost item that is wrong; `place` is where pydantic found it."""
    for item in place:
        kinds = [kind for kind in _kinds(annotation) if kind is not types.NoneType]
        arguments = typing.get_args(kinds[0])
        inside = isinstance(item, int) and isinstance(value, (list, tuple)) and item < len(value)
        if len(kinds) > 1 or typing.get_origin(kinds[0]) not in LISTS or not inside:
            break
        index = int(item)
        path, value = f"{path}[{index}]", value[index]
        annotation = arguments[0] if len(arguments) == 1 or arguments[-1] is ... else arguments[index]
    return ConfigError(f"'{path}' must be {describe(annotation)}, but is {shown(value)}.{_remedy(value, annotation)}")


def _remedy(value: Any, annotation: Any) -> str:
    """What else there is to say about a value that is not of the type `annotation`."""
    kinds = _kinds(annotation)
    if isinstance(value, str) and str in kinds:
        return " It holds a NUL character, which no text here may have."
    if isinstance(value, str):
        names = [name for kind in kinds if _is_literal(kind) for name in typing.get_args(kind)]
        near = difflib.get_close_matches(value, [name for name in names if isinstance(name, str)], n=1)
        return f" Did you mean '{near[0]}'?" if near else ""
    if isinstance(value, (bool, int, float)) and str in kinds:
        return " Write it in quotes."
    if isinstance(value, int) and not isinstance(value, bool) and {int, float} & set(kinds):
        return " That is too large."
    return ""


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, that type."""
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal
