"""Options of the commands that take no config file, and how they are read."""

import argparse
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from detkit.errors import ConfigError, DetkitError, plain_types

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


def with_config(schema: type[Any], config: str, arguments: list[str]) -> list[str]:
    """The values of a YAML file as arguments, then those of the command line; `--head.width 16` goes into `head`.

    Raises:
        ConfigError: the file is missing or malformed, or has a key that `schema` does not.
    """
    import dataclasses
    import json

    import yaml

    from detkit.config import read_yaml
    from detkit.errors import nearest

    values = read_yaml(config)
    names = {field.name for field in dataclasses.fields(schema)}
    for key in values:
        if key not in names:
            raise ConfigError(
                f"'{key}' in {config} is not for detkit infer, which takes a config for style transfer alone, else the "
                f"folder of a run. {nearest(key, names)}"
            )
    rest: list[str] = []
    given = iter(arguments)
    for argument in given:
        key, equals, value = argument[2:].partition("=")
        *parents, last = key.split(".")
        if not argument.startswith("--") or not parents or parents[0] not in names:
            rest.append(argument)
            continue
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"'--{key}' sets an option of '{parent}', which has none in {config}.")
        inner[last] = yaml.safe_load(value if equals else next(given, ""))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [*(f"--{key}={text}" for key, text in texts.items()), *rest]


def parse_options(schema: type[Options], command: str, arguments: list[str], positional: bool = True) -> Options | None:
    """`arguments` as `schema`, or None after --help. If `positional`, the first field may be given without its name."""
    import dataclasses

    from jsonargparse import ArgumentError, ArgumentParser

    from detkit.errors import nearest

    fields: Any = dataclasses.fields(schema)  # type: ignore[arg-type]
    parser = ArgumentParser(prog=f"detkit {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(schema)
    if "-h" in arguments or "--help" in arguments:
        first = f"{fields[0].name.upper()} " if positional else ""
        print(f"usage: detkit {command} {first}[--OPTION VALUE ...]\n")
        parser.usage = argparse.SUPPRESS
        parser.print_help()
        return None
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{fields[0].name}", *arguments]
    names = {field.name for field in fields}
    normal = []
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            # Users write --max-det as well as --max_det, and a switch without its value.
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name not in names:
                raise ConfigError(f"'--{name}' is no option of detkit {command}. {nearest(name, names)}")
            argument = f"--{name}{equals}{value}"
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            is_switch = next(field for field in fields if field.name == name).type is bool
            if is_switch and not equals and following.startswith("--"):
                argument += "=true"
        normal.append(argument)
    try:
        parsed = parser.parse_args(normal)
    except ArgumentError as error:
        reason = plain_types(" ".join(str(error).split())).replace("Parser key ", "Option ")
        if "unrecognized arguments" in reason and "source" in names:
            reason += ". Several pictures are one text, a folder or a pattern in quotes: --source '*.jpg'"
        raise DetkitError(f"{reason}. See detkit {command} --help.") from None
    return schema(**vars(parser.instantiate(parsed)))
