"""List heads with their tasks, backbones, necks and bundled configs: detkit models."""

import re
from pathlib import Path

from detkit.cli.parser import wants_help
from detkit.errors import DetkitError
from detkit.io.terminal import Console


def run(arguments: list[str]) -> None:
    """Print all names with their summaries."""
    console = Console()
    if wants_help(arguments):
        console.print(
            "usage: detkit models\n\nLists the names available for a config's head, backbone and neck, including those "
            "of installed\npackages, and the configs for `detkit train NAME`."
        )
        return
    if arguments:
        raise DetkitError(f"detkit models takes no arguments, but got '{arguments[0]}'.")
    import inspect

    from detkit.config import packaged_configs
    from detkit.registry import backbones, heads, necks

    for title, registry in (("heads", heads), ("backbones", backbones), ("necks", necks)):
        console.print(f"{title}:")
        for name in registry.names():
            part = registry.get(name)
            # Not inspect.getdoc, which falls back to the docstring of the base class.
            text = _first_sentence(inspect.cleandoc(part.__doc__ or "").split("\n\n")[0])
            task = f"{getattr(part, 'task', ''):10}" if registry is heads else ""
            console.print(f"  {name:16} {task}{text}".rstrip())
    console.print("configs:")
    for name, path in packaged_configs().items():
        console.print(f"  {name:24} {_header(path)}".rstrip())


def _first_sentence(text: str) -> str:
    return re.split(r"(?<! al)\. ", text.replace("\n", " "))[0].removesuffix(".")


def _header(config: Path) -> str:
    """Return the first sentence of the comment at the top of a config."""
    lines = config.read_text(encoding="utf-8").split("\n#\n")[0].splitlines()
    return _first_sentence("\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")))
