"""Registries of parts: backbones, necks, heads, data formats, augmentations and others, built from a config by name.

A part is a class; its constructor signature defines its options and their defaults.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from detkit.errors import ConfigError, DetkitError, nearest
from detkit.schema import convert, format_value, option_names, option_type, required_names

Part = TypeVar("Part", bound=Callable[..., Any])
ZOO = "detkit.zoo"
PLUGINS = "detkit.parts"
"""The entry-point group in which an installed package lists its modules with parts for detkit."""
IMPORTING = threading.RLock()
"""Held while modules with parts are imported: one lock for all kinds, since a plugin may register several."""
_LOAD_WEIGHTS: ContextVar[bool] = ContextVar("load_weights", default=True)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build parts with random weights regardless of their options, before those of a checkpoint are loaded."""
    token = _LOAD_WEIGHTS.set(False)
    try:
        yield
    finally:
        _LOAD_WEIGHTS.reset(token)


def weights_are_loaded() -> bool:
    """Return whether parts built now load the weights that their options name."""
    return _LOAD_WEIGHTS.get()


class Registry:
    """Parts of one kind by name.

    The first look-up imports the modules of `package` (of a package with a folder for each part, such as tasks, the
    module `module` of each folder) and the modules that installed packages list as entry points of the group PLUGINS.
    A new part is therefore one new file with `@heads.register("name")` in it. Other names are looked up in the folders
    of detkit.zoo. A config cannot name a module to import.
    """

    def __init__(self, kind: str, package: str, module: str = "") -> None:
        self.kind = kind
        self.package = package
        self._parts: dict[str, Callable[..., Any]] = {}
        self.module = module
        self._importing = False
        self._imported = False

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that registers a class or factory under `name`, which must be free."""

        def add(part: Part) -> Part:
            if name in self._parts:
                raise ValueError(f"{self.kind} '{name}' is already registered, by {self._parts[name]!r}")
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        self._import_package()
        _import_zoo()
        return sorted(self._parts)

    def get(self, name: str) -> Callable[..., Any]:
        """Return the part registered as `name`.

        Raises:
            ConfigError: no part has this name; the message suggests the nearest one.
        """
        self._import_package()
        if not isinstance(name, str) or name not in self._parts:  # a config's name may be anything
            _import_zoo()
        if not isinstance(name, str) or name not in self._parts:
            raise ConfigError(f"There is no {self.kind} named {format_value(name)}. {nearest(str(name), self._parts)}")
        return self._parts[name]

    def build(self, options: Mapping[str, Any], path: str, also_valid: Collection[str] = (), **injected: Any) -> Any:
        """Build `{name: ..., option: value, ...}`.

        Args:
            options: `name` and any options of that part's constructor.
            path: the key of the part in the config ("head"), for messages.
            also_valid: further keys of this part that the caller reads itself, for messages.
            injected: arguments that the program supplies (channels, class count), not the user.

        Raises:
            ConfigError: the name is missing or unknown, or an option is unknown or has the wrong type; the message
                has the dotted path and the nearest valid key.
        """
        if "name" not in options:
            raise ConfigError(f"'{path}' needs a 'name'. Valid names: {', '.join(self.names())}.")
        part = self.get(options["name"])
        given = {key: value for key, value in options.items() if key != "name"}
        return build_part(part, given, path, f"{self.kind} '{options['name']}'", also_valid, **injected)

    def _import_package(self) -> None:
        if self._imported:
            return
        # Other threads wait here until all parts are registered. A look-up by the importing thread itself, from a
        # module that is being imported, finds the parts registered so far.
        with IMPORTING:
            if self._imported or self._importing:
                return
            self._importing = True
            try:
                _import_all(self.package, self.module)
                _import_plugins()
                self._imported = True
            finally:
                self._importing = False


def _import_all(package: str, module: str = "") -> None:
    """Import the modules of a package; with `module`, the modules of this name in its folders."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if found.ispkg == bool(module):
            importlib.import_module(".".join(filter(None, (package, found.name, module))))


def _import_zoo() -> None:
    """Import the modules of each folder of the zoo, which may register parts of any kind.

    Called only for names that are not found elsewhere, so that the zoo costs no time if it is not used.
    """
    with IMPORTING:
        for folder in pkgutil.iter_modules(importlib.import_module(ZOO).__path__):
            _import_all(f"{ZOO}.{folder.name}")


@functools.cache
def _import_plugins() -> None:
    """Import the modules with parts that installed packages list, once.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            importlib.import_module(point.value)
        # Third-party code may raise anything; the remedy is always the same.
        except Exception as error:
            package = point.dist.name if point.dist is not None else "unknown"
            raise ConfigError(
                f"The installed package '{package}' has parts for detkit in its module '{point.value}', which cannot "
                f"be imported ({type(error).__name__}: {error}). Fix that package, or uninstall it."
            ) from error


def build_part(
    part: Callable[..., Any],
    given: Mapping[str, Any],
    path: str,
    title: str,
    also_valid: Collection[str] = (),
    **injected: Any,
) -> Any:
    """Build a part from the user's options; `title` names it in messages. Otherwise as `Registry.build`."""
    valid = option_names(part) - set(injected)
    for key in given:
        if key not in valid:
            inner = f" For the underlying data set, write '{path}.data.{key}'." if "data" in valid else ""
            raise ConfigError(
                f"'{path}.{key}' is not an option of the {title}. {nearest(key, valid | set(also_valid))}{inner}"
            )
    missing = required_names(part) - set(given) - set(injected)
    if missing:
        raise ConfigError(
            f"The {title} needs '{path}.{sorted(missing)[0]}'; give it in the config "
            f"or as --{path}.{sorted(missing)[0]} VALUE."
        )
    typed = {key: convert(value, option_type(part, key), f"{path}.{key}") for key, value in given.items()}
    if not weights_are_loaded() and "weights" in valid and not getattr(part, "weights_set_mean", False):
        weights = typed.get("weights", inspect.signature(part).parameters["weights"].default)
        typed |= {"weights": None} if isinstance(weights, str) else {}
    try:
        return part(**injected, **typed)
    except DetkitError:
        raise
    except ValueError as error:
        # Raised by the part, or the library it wraps, for a value out of range.
        raise ConfigError(f"'{path}' cannot be built: {' '.join(str(error).split())}") from error


backbones = Registry("backbone", "detkit.backbones")
necks = Registry("neck", "detkit.necks")
heads = Registry("head", "detkit.heads")
datasets = Registry("data format", "detkit.data.formats")
augmentations = Registry("augmentation", "detkit.data.augment")
proposal_sources = Registry("source of proposals", "detkit.data.proposals")
tasks = Registry("task", "detkit.tasks", module="task")
weight_converters = Registry("weight converter", "detkit.published")
"""Functions that convert the state dict of another library, by the name of a tensor that only its models have."""
weight_files = Registry("weight file reader", "detkit.published")
"""Classes that read weights from files that are not state dicts; see detkit.published.read.WeightFile."""
