"""The command line, `detkit COMMAND ...`. Each command is a module, discovered by `commands`."""

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
    """Return the modules of all commands by name.

    A command is a module with a function `run(arguments: list[str]) -> None`, which raises DetkitError for user errors.
    It is either <name> in this package or <name>_command in a zoo package. The first line of its docstring is its help
    text. All command modules are imported at every start, so they import heavy modules inside functions.
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
    """Return the line that `detkit --help` shows for a command."""
    return (command.__doc__ or "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 after a user error, 130 if interrupted."""
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
        if "null" not in str(error):  # Python reports a NUL in a path this way
            raise
        return _fail(f"A path contains a NUL character ({error}). Correct it.")
    except KeyboardInterrupt:
        hint = " Use --resume RUN to continue from the last complete epoch." if given[:1] == ["train"] else ""
        _fail(f"stopped.{hint}")
        return 130


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `main` and exit the process with its status.

    At exit, Python destroys torch object by object. This takes about a second, a third of the time `detkit infer` needs
    for one image, so that command ends the process directly once all other exit handlers have run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = 1  # unless the command returns

    def leave() -> None:
        with suppress(OSError):
            _flush()
            sys.stderr.flush()
        os._exit(status)

    if given[:1] == ["infer"]:
        atexit.register(leave)  # handlers run in reverse order, so this one runs last
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
    """Print the reason for the failure to standard error and return the exit status."""
    with suppress(OSError):
        print(f"detkit: {printable(text)}", file=sys.stderr)
    with suppress(OSError):
        _flush()
    return 1


def _flush() -> None:
    """Flush standard output. Output that cannot be written is dropped; otherwise Python would retry it at exit.

    Raises:
        OSError: the disk is full. A closed pipe is not an error.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError:
        drop_output()
        raise
