"""The command line, `detkit COMMAND ...`: each command is a module, found by `commands`."""

import atexit
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

from detkit.errors import DetkitError, nearest, printable
from detkit.io.files import REMEDIES
from detkit.io.terminal import Console, drop_output, tolerate_any_text

ZOO = "detkit.zoo"
ENDING = "_command"


def commands() -> dict[str, ModuleType]:
    """The modules of all commands, by name.

    A command is a module with a function `run(arguments: list[str]) -> None`, which raises DetkitError for a mistake of
    the user. It is the module <name> of this package, or the module <name>_command in a folder of the zoo. The first
    line of its docstring is its help. All are imported at every start, so they import heavy modules within functions.
    """
    own = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    found = {_name(module): module for module in own if hasattr(module, "run")}
    zoo = importlib.import_module(ZOO)
    for entry in pkgutil.walk_packages(zoo.__path__, f"{ZOO}."):
        if entry.name.endswith(ENDING):
            module = importlib.import_module(entry.name)
            assert _name(module) not in found, f"two commands are named {_name(module)}"
            found[_name(module)] = module
    return dict(sorted(found.items()))


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].removesuffix(ENDING)


def summary(command: ModuleType) -> str:
    """The line of `detkit --help` for a command."""
    return (command.__doc__ or "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a user's mistake, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tolerate_any_text()
    try:
        _run(given)
        _flush()
        return 0
    except DetkitError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        name = "" if error.filename is None else f": '{error.filename}'"
        remedy = REMEDIES.get(error.errno, "Check the path, the free space and the permissions.")
        return _fail(f"{error.strerror}{name}. {remedy}")
    except ValueError as error:
        if "null" not in str(error):  # Python's words for a path that holds NUL
            raise
        return _fail(f"A path holds a NUL character ({error}). Correct it.")
    except KeyboardInterrupt:
        hint = " The run goes on from its last whole epoch with --resume RUN." if given[:1] == ["train"] else ""
        _fail(f"stopped.{hint}")
        return 130


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own.

    When a process ends, Python destroys torch object by object, which takes a second: a third of what `detkit infer`
    needs for one image. So that command ends the process directly, after everything else that is due at its end.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = 1  # until the command has ended in another way than by an exception

    def leave() -> None:
        with suppress(OSError):
            _flush()
            sys.stderr.flush()
        os._exit(status)

    if given[:1] == ["infer"]:
        atexit.register(leave)  # the first to be registered is the last to be called
    status = main(given)
    sys.exit(status)


def _run(given: list[str]) -> None:
    console = Console()
    if given[:1] == ["--version"]:
        from detkit import __version__

        console.print(__version__)
        return
    found = commands()
    if not given or given[0] in ("-h", "--help"):
        console.print("usage: detkit COMMAND ...\n")
        for name, command in found.items():
            console.print(f"  {name:6} {summary(command)}")
        console.print("\n`detkit COMMAND --help` lists a command's options.")
    elif given[0] in found:
        found[given[0]].run(given[1:])
    else:
        raise DetkitError(f"There is no command '{given[0]}'. {nearest(given[0], found)}")


def _fail(text: str) -> int:
    """Print on standard error why the command ends; returns its exit status."""
    with suppress(OSError):
        print(f"detkit: {printable(text)}", file=sys.stderr)
    with suppress(OSError):
        _flush()
    return 1


def _flush() -> None:
    """Write out what was printed. What cannot be written is dropped, or Python would try again, in vain, at its end.

    Raises:
        OSError: the disk is full. That the reader of a pipe has gone is no error.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError:
        drop_output()
        raise
