"""Options of the commands that take no config file, and how they are read."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from detkit.errors import ConfigError, DetkitError
from detkit.io.terminal import Console

Options = TypeVar("Options")


@dataclass(frozen=True)
class InferOptions:
    """What `detkit infer` takes.

    Args:
        checkpoint: a run's folder, or a checkpoint file.
        source: a picture, a folder of pictures, a glob in quotes, or a video.
        output: the folder to write to; default runs/infer/run, run2 ...
        conf: detections need a higher score, 0..1; default 0.25.
        iou: of two boxes of one class that overlap more, the weaker goes; default as trained.
        max_det: at most so many detections a picture; default as trained.
        classes: names or numbers of the classes to keep, with commas between: WBC,RBC; default all.
        proposals: where the regions come from, for a head that needs them; default as trained.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the hardware has matrix units for it
            (AMX, tensor cores), else fp32.
        compile: let TorchInductor compile the network, which takes a minute the first time.
        batch: pictures that go through the network together.
        skip_broken: leave unreadable pictures out, and list them at the end, instead of stopping.
        save_images: write pictures with their boxes drawn.
        save_json: write predictions.json, COCO results with boxes as xywh pixels.
        save_txt: write YOLO text, a file for each picture.
        save_conf: with the score as sixth column of the text.
        save_crop: write each detection as a picture of its own.
        gallery: for a model that gives embeddings, a folder of known things, a folder of pictures for each name or
            pictures named by their files; each picture of `source` gets the name of the nearest.
        threshold: the distance to it, 0..2, from which on a picture is unknown; default the best of the evaluation.
    """

    checkpoint: str
    source: str
    output: str | None = None
    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    classes: str | None = None
    proposals: dict[str, Any] | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    batch: int = 1
    skip_broken: bool = False
    save_images: bool = True
    save_json: bool = True
    save_txt: bool = False
    save_conf: bool = False
    save_crop: bool = False
    gallery: str | None = None
    threshold: float | None = None


def config_values(schema: type[Any], config: str) -> dict[str, Any]:
    """The values of a YAML file for `parse_options`.

    Raises:
        ConfigError: the file is missing or malformed, or has a key that `schema` does not.
    """
    from detkit.config import read_yaml
    from detkit.errors import nearest
    from detkit.schema import option_names

    values = read_yaml(config)
    for key in values:
        if key not in option_names(schema):
            raise ConfigError(
                f"'{key}' in {config} is not for detkit infer, which takes a config for style transfer alone, else the "
                f"folder of a run. {nearest(str(key), option_names(schema))}"
            )
    return values


def parse_options(
    schema: type[Options],
    command: str,
    arguments: list[str],
    positional: bool = True,
    values: dict[str, Any] | None = None,
) -> Options | None:
    """`arguments` as `schema`, or None after --help.

    Args:
        schema: a dataclass.
        command: the command, for messages.
        arguments: those of the command line; `--head.width 16` goes into the mapping `head`.
        positional: the first field may be given without its name.
        values: fields that are set already; arguments win.

    Raises:
        DetkitError: an option is unknown or missing, or has a value of the wrong type.
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
        # Users write --max-det as well as --max_det.
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
        several = " Several pictures are one text, a folder or a pattern in quotes: --source '*.jpg'"
        hint = several if "source" in names and "is not an option" in str(error) else ""
        raise DetkitError(f"{error}{hint} See detkit {command} --help.") from None
