"""Transfer the style of one image to another: detkit style CONFIG.yaml --content A --style B."""

from pathlib import Path

from detkit.cli.parser import config_values, parse_options, report_configs, wants_help
from detkit.errors import DetkitError


def run(arguments: list[str]) -> None:
    """Optimize the image, and write it and its intermediate steps."""
    from detkit.zoo.style.transfer import StyleOptions, transfer

    if wants_help(arguments):
        parse_options(StyleOptions, "style CONFIG", ["--help"], positional=False)
        return
    if not arguments or arguments[0].startswith("-"):
        raise DetkitError(
            "detkit style needs a config as its first argument: detkit style style --content a.jpg --style b.jpg"
        )
    config, rest = arguments[0], arguments[1:]
    values = config_values(StyleOptions, config, "style")
    options = parse_options(StyleOptions, "style", rest, positional=False, values=values)
    assert options is not None
    report_configs([config])
    transfer(options, Path(options.output or "runs/style/run"))
