"""Command-line parsing shared by all commands."""

import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

from detkit.errors import ConfigError, DetkitError
from detkit.io.terminal import Console

if TYPE_CHECKING:
    from detkit.config import Experiment

Options = TypeVar("Options")
YAML = (".yaml", ".yml")


def wants_help(arguments: list[str]) -> bool:
    """Return whether the arguments contain `-h` or `--help`."""
    return "-h" in arguments or "--help" in arguments


def take_option(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of `--option value` or `--option=value`, and the remaining arguments."""
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise DetkitError(f"{option} needs a value.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def leading_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into configs (leading or given by --config) and the rest."""
    configs: list[str] = []
    rest = list(arguments)
    while rest and not rest[0].startswith("-"):
        configs.append(rest.pop(0))
    while (config := take_option(rest, "--config"))[0] is not None:
        configs.append(str(config[0]))
        rest = config[1]
    return configs, rest


def load_config(configs: list[str], overrides: list[str], command: str) -> "Experiment | None":
    """Load the experiment for a command that takes configs; return None after --print_config.

    Raises:
        DetkitError: no config is given, or it is not valid.
    """
    from detkit.config import experiment_to_dict, load_experiment

    if not configs:
        raise DetkitError(
            f"detkit {command} needs a config as its first argument, for example: detkit {command} quickstart"
        )
    show = "--print_config" in overrides
    experiment = load_experiment(configs, [override for override in overrides if override != "--print_config"])
    if show:
        import yaml

        Console().print(yaml.safe_dump(experiment_to_dict(experiment), sort_keys=False).rstrip())
        return None
    report_configs(configs)
    return experiment


def report_configs(configs: list[str]) -> None:
    """Print the path of each config that was given by name."""
    from detkit.config import find_config

    if os.environ.get("LOCAL_RANK", "0") == "0":  # only once in multi-process training
        for config in configs:
            if (path := str(find_config(config)[0])) != config:
                Console().print(f"config     {path}")


def experiment_help(command: str, extra: str) -> None:
    """Print the help text of a command that takes configs."""
    from detkit.config import Experiment, packaged_configs
    from detkit.schema import print_options

    console = Console()
    console.print(f"usage: detkit {command} CONFIG [CONFIG2 ...] [--KEY VALUE ...]\n{extra}\n")
    console.print("CONFIG is a YAML file or the name of a bundled config; later configs override earlier ones.")
    console.print("--config CONFIG adds another one. --print_config prints the merged config.\n")
    console.print(print_options(Experiment).rstrip())
    console.print(f"\nbundled configs (`detkit models` describes them): {', '.join(packaged_configs())}")


def refuse_config(command: str, arguments: list[str]) -> None:
    """Raise DetkitError if the first argument of a command that takes a run is a config."""
    from detkit.cli import commands, summary

    if arguments and arguments[0].endswith(YAML):
        others = (f"detkit {name}" for name, module in commands().items() if "CONFIG" in summary(module))
        raise DetkitError(
            f"detkit {command} takes a run folder or a checkpoint, but '{arguments[0]}' is a config. Commands that "
            f"take a config: {', '.join(others)}."
        )


def config_values(schema: type[Any], config: str, command: str) -> dict[str, Any]:
    """Read a config for a command with its own schema, as the `values` of `parse_options`.

    Raises:
        ConfigError: the file is missing or malformed, or has a key that is not in `schema`.
    """
    from detkit.config import read_yaml
    from detkit.errors import nearest
    from detkit.schema import option_names

    values = read_yaml(config)
    for key in values:
        if key not in option_names(schema):
            raise ConfigError(
                f"'{key}' in {config} is not an option of detkit {command}. {nearest(str(key), option_names(schema))}"
            )
    return values


def parse_options(
    schema: type[Options],
    command: str,
    arguments: list[str],
    positional: bool = True,
    values: dict[str, Any] | None = None,
) -> Options | None:
    """Parse `arguments` into an instance of `schema`; return None after --help.

    Args:
        schema: a dataclass.
        command: name of the command, for messages.
        arguments: command-line arguments; `--head.width 16` sets `width` in the mapping `head`.
        positional: whether the first field may be given without its name.
        values: initial field values, overridden by `arguments`.

    Raises:
        DetkitError: an option is unknown or missing, or its value has the wrong type.
    """
    from detkit.errors import nearest
    from detkit.schema import build, from_text, given_options, option_names, option_type, plain, print_options, put
    from detkit.schema import required_names as required

    first = next(iter(inspect.signature(schema).parameters))
    names = option_names(schema)
    if "-h" in arguments or "--help" in arguments:
        usage = f"{first.upper()} " if positional else ""
        Console().print(f"usage: detkit {command} {usage}[--OPTION VALUE ...]\n\n{print_options(schema).rstrip()}")
        return None
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    given = dict(values or {})

    def field(name: str) -> str:
        # Accept --max-det as well as --max_det.
        found = name.partition(".")[0].replace("-", "_")
        if found not in names:
            raise ConfigError(f"'--{found}' is not a valid option of detkit {command}. {nearest(found, names)}")
        return found

    def is_switch(name: str) -> bool:
        return option_type(schema, field(name)) is bool

    try:
        for name, text in given_options(arguments, is_switch):
            _, *inner = name.split(".")
            kind = Any if inner else option_type(schema, field(name))
            put(given, [field(name), *inner], from_text(text, kind, name), name)
        for name in sorted(required(schema) - set(given)):
            raise ConfigError(f"'--{name}' is missing. Give it as --{name} VALUE.")
        return build(schema, {name: plain(value, f"--{name}") for name, value in given.items()}, "--")
    except ConfigError as error:
        several = " To give several images, use a folder or a quoted glob pattern: --source '*.jpg'"
        hint = several if "source" in names and "is not an option" in str(error) else ""
        raise DetkitError(f"{error}{hint} See detkit {command} --help.") from None
