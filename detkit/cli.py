"""The command line: `detkit train | eval | infer | check | models | bench`; each imports what it needs when it runs."""

import atexit
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from detkit.errors import DetkitError, counted, nearest, printable
from detkit.io.files import REMEDIES
from detkit.io.terminal import Console, drop_output, tolerate_any_text


def train(arguments: list[str]) -> None:
    """Train a detector, evaluate it, draw what it finds: detkit train CONFIG.yaml [--train.epochs 50 ...]."""
    configs, rest = _leading_configs(arguments)
    resume, rest = _take_option(rest, "--resume")
    if resume == "":
        raise DetkitError("--resume needs the folder of a run, but got an empty text. Is a variable unset?")
    if resume is not None and not configs:
        configs = [f"{resume}/config.yaml"]
    if _wants_help(rest):
        _experiment_help("train", "--resume RUN goes on with an unfinished run, a folder runs/<task>/<name>.")
        return
    experiment = _experiment(configs, rest, "train")
    if experiment is None:
        return
    from detkit.engine.train import train as run

    folder = run(experiment, resume)
    if folder is None:
        return
    _print(f"best checkpoint: {folder.best}\npictures:        {folder.pictures}")
    # The checkpoint may be from before a resume with data elsewhere.
    _evaluate(str(folder.best), ["--data", json.dumps(experiment.data)])


def evaluate(arguments: list[str]) -> None:
    """Score a checkpoint on validation data: detkit eval RUN [--data.root PATH ...]."""
    if _wants_help(arguments) or not arguments or arguments[0].startswith("--"):
        _print(EVAL_HELP)
        if not _wants_help(arguments):
            raise DetkitError("detkit eval needs a run's folder (runs/detect/quickstart) or a checkpoint file first.")
        return
    _evaluate(arguments[0], arguments[1:])


def infer(arguments: list[str]) -> None:
    """Draw boxes on pictures: detkit infer RUN --source IMAGE|FOLDER|'*.jpg'|VIDEO."""
    from detkit.cli_options import InferOptions, parse_options

    if arguments and arguments[0].endswith((".yaml", ".yml")):
        _transfer_style(arguments[0], arguments[1:])
        return

    options = parse_options(InferOptions, "infer", arguments)
    if options is None:
        return
    from pathlib import Path

    from detkit.inference.options import check_options, check_output, check_source
    from detkit.io.runs import resolve_checkpoint

    # A mistake that can be told without the model shall not cost the time to import torch and to load it.
    checkpoint = resolve_checkpoint(options.checkpoint)
    check_options(vars(options))
    check_source(options.source)
    output = Path(options.output or "runs/infer/run")
    check_output(output, options.source)

    from detkit.engine.malloc import keep_freed_memory

    with _no_garbage_collection():
        from detkit.inference.images import infer as run
        from detkit.inference.predictor import load

        predictor = load(checkpoint, options.device, options.proposals, options.precision, options.compile)
    if predictor.device.type == "cpu":
        keep_freed_memory()
    console = Console()
    console.print(f"checkpoint {checkpoint}\nclasses    {predictor.model.classes}")
    console.print(f"runs on    {predictor.network.choices}")
    if options.compile:
        console.print(
            "compiling  before the first picture: minutes for a large network, seconds where it was kept before"
        )
    common = {name: getattr(options, name) for name in ("batch", "skip_broken", "save_images", "save_json")}
    run(predictor, options.source, output, **common, **_of_the_task(options))


def check(arguments: list[str]) -> None:
    """Read a data set from end to end and report what is broken: detkit check CONFIG.yaml [--anchors N]."""
    configs, rest = _leading_configs(arguments)
    anchors, rest = _take_option(rest, "--anchors")
    if anchors is not None and not (anchors.isdecimal() and int(anchors) > 0):
        raise DetkitError(f"--anchors is the number of anchors to propose, at least 1, but is '{anchors}'.")
    if _wants_help(rest):
        _experiment_help("check", "Only 'data' is used, and 'input' by --anchors N, which proposes N anchors for YOLO.")
        return
    experiment = _experiment(configs, rest, "check")
    if experiment is None:
        return
    from detkit.data.check import check as run
    from detkit.data.check import propose_anchors
    from detkit.registry import heads
    from detkit.tasks.base import task_of

    outcome = {"fail": "stops at them", "skip": "leaves them out", "repair": "repairs them or leaves them out"}
    inner = experiment.data.get("data")  # of crops, where the files are named
    policy = str((inner if isinstance(inner, dict) else experiment.data).get("broken", "fail"))
    if policy not in outcome:
        raise DetkitError(f"'data.broken' is '{policy}'. {nearest(policy, outcome)}")
    head: Any = heads.get(str(experiment.head.get("name")))
    problems = run(experiment.data, head.needs, head.open_set, task_of(head).check_data)
    if anchors is not None:
        propose_anchors(experiment.data, experiment.input, int(anchors))
    if problems:
        raise DetkitError(
            f"{counted(problems, 'problem')} found, listed above. With data.broken = {policy}, as "
            f"this config has it, training {outcome[policy]}."
        )


def models(arguments: list[str]) -> None:
    """List heads with their tasks, backbones and necks: detkit models."""
    if _wants_help(arguments):
        _print("usage: detkit models\n\nNames for a config's head, backbone and neck, those of installed packages too.")
        return
    if arguments:
        raise DetkitError(f"detkit models takes no arguments, but got '{arguments[0]}'.")
    import inspect

    from detkit.registry import backbones, heads, necks

    for title, registry in (("heads", heads), ("backbones", backbones), ("necks", necks)):
        _print(f"{title}:")
        for name in registry.names():
            part = registry.get(name)
            # Of a part without a docstring inspect would give its base class's.
            paragraph = (inspect.cleandoc(part.__doc__ or "").split("\n\n")[0]).replace("\n", " ")
            task = f"{getattr(part, 'task', ''):10}" if registry is heads else ""
            _print(f"  {name:16} {task}{paragraph.split('. ')[0].removesuffix('.')}".rstrip())


def bench(arguments: list[str]) -> None:
    """Time detkit beside other libraries, results checked first: detkit bench BENCHMARK [--quick]."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print("usage: detkit bench BENCHMARK [--OPTION VALUE ...]\n")
        for name, (summary, _) in BENCHMARKS.items():
            _print(f"  {name:11} {summary}")
        _print("\n`detkit bench BENCHMARK --help` lists its options.")
        if not arguments:
            raise DetkitError("detkit bench needs the name of a benchmark first, for example: detkit bench nms --quick")
        return
    if arguments[0] not in BENCHMARKS:
        raise DetkitError(f"There is no benchmark '{arguments[0]}'. {nearest(arguments[0], BENCHMARKS)}")
    import importlib

    from detkit.bench import options as schemas
    from detkit.cli_options import parse_options

    name = arguments[0]
    schema: type[schemas.BenchOptions] = getattr(schemas, BENCHMARKS[name][1])
    options = parse_options(schema, f"bench {name}", arguments[1:], positional=False)
    if options is None:
        return
    run = getattr(importlib.import_module(f"detkit.bench.{name}"), f"bench_{name}")
    run(options, shlex.join(["detkit", "bench", *arguments]))


BENCHMARKS = {
    "nms": ("Non-maximum suppression: boxes a second against their number, a table, a plot, JSON.", "NmsOptions"),
    "iou": ("Pairwise intersection over union.", "IouOptions"),
    "matching": ("Assignment of truths to anchors: time and memory.", "MatchingOptions"),
    "proposals": ("Selective search: recall of real objects, pictures a second.", "ProposalsOptions"),
    "inference": ("Whole networks, from a picture to boxes and masks: time, its parts, memory.", "InferenceOptions"),
    "train_step": ("Whole networks, one step of training: time and memory.", "TrainStepOptions"),
    "learning": ("Whole networks, some steps of training: the loss beside torchvision's.", "LearningOptions"),
    "model_table": ("Runs and configs: parameters, FLOPs, time of a picture, scores.", "ModelTableOptions"),
    "scaling": ("Growth of time and memory with pixels, batch, objects, classes and data set.", "ScalingOptions"),
}
EVAL_HELP = """usage: detkit eval RUN_OR_CHECKPOINT [--OPTION VALUE ...]

  --data.root PATH         other data than those of the training; any option of data, or a whole --data '{...}'
  --data.val SPLIT         what the validation split is called there
  --proposals '{...}'      for heads that need them, as in a config: '{name: file, path: FILE}'
  --precision PRECISION    auto, fp32, bf16 or fp16: scores of the network as `detkit infer --precision` runs it;
                           without it those of the network in fp32 as it was trained
  --save-json FILE         what was found, with the data set's own ids
  --device DEVICE          auto, cpu, cuda or mps; default as in training
  --train.max_dets N       detections of each class in an image that COCO's figures count; default 100
  --train.batch_size N     pictures that go through the network together; default as in training
  --train.workers N        processes that read pictures; default as in training"""
EVAL_PARTS = frozenset({"data", "proposals"})
EVAL_KEYS = frozenset({"train.batch_size", "train.workers", "train.device", "train.max_dets"})
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "infer": infer,
    "check": check,
    "models": models,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a user's mistake, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tolerate_any_text()
    try:
        status = _run(given)
        _flush()
    except DetkitError as error:
        status = _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        name = "" if error.filename is None else f": '{error.filename}'"
        remedy = REMEDIES.get(error.errno, "Check the path, the free space and the permissions.")
        status = _fail(f"{error.strerror}{name}. {remedy}")
    except ValueError as error:
        if "null" not in str(error):  # Python's words for a path that holds NUL
            raise
        status = _fail(f"A path holds a NUL character ({error}). Correct it.")
    except KeyboardInterrupt:
        hint = " The run goes on from its last whole epoch with --resume RUN." if given[:1] == ["train"] else ""
        _fail(f"stopped.{hint}")
        status = 130
    return status


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own.

    To take torch apart at its end, object by object, takes Python a second, a third of what `detkit infer` needs for a
    picture: that command ends without, after all else that is to be done at the end of a process.
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


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        _print("usage: detkit COMMAND ...\n")
        for name, command in COMMANDS.items():
            _print(f"  {name:6} {(command.__doc__ or '').strip()}")
        _print("\n`detkit COMMAND --help` lists a command's options.")
    elif given[0] == "--version":
        from detkit import __version__

        _print(__version__)
    elif given[0] in COMMANDS:
        COMMANDS[given[0]](given[1:])
    else:
        raise DetkitError(f"There is no command '{given[0]}'. {nearest(given[0], COMMANDS)}")
    return 0


def _print(text: str) -> None:
    Console().print(text)


def _fail(text: str) -> int:
    """Say on standard error why the command ends; returns its exit status."""
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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: torch's make half a million objects that stay, and to look for garbage among them, again and again,
    takes half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _of_the_task(options: Any) -> dict[str, Any]:
    """Those options of `detkit infer` that only some tasks have, as far as they were given."""
    names = ("conf", "iou", "max_det", "classes", "save_txt", "save_conf", "save_crop", "gallery", "threshold")
    values = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if "classes" in given:
        given["classes"] = [name.strip() for name in options.classes.strip("[]").split(",")]
    return given


def _transfer_style(config: str, arguments: list[str]) -> None:
    from pathlib import Path

    from detkit.cli_options import config_values, parse_options
    from detkit.zoo.style.transfer import StyleOptions, transfer

    title = f"infer {config}"
    values = {} if _wants_help(arguments) else config_values(StyleOptions, config)
    options = parse_options(StyleOptions, title, arguments, positional=False, values=values)
    if options is None:
        return
    transfer(options, Path(options.output or "runs/style/run"))


def _evaluate(checkpoint: str, arguments: list[str]) -> None:
    save_json, rest = _take_option(arguments, "--save-json")
    precision, rest = _take_option(rest, "--precision")
    device, rest = _take_option(rest, "--device")
    if device is not None:
        rest += ["--train.device", device]
    for argument in rest:
        key = argument[2:].split("=")[0]
        if argument.startswith("--") and key.partition(".")[0] not in EVAL_PARTS and key not in EVAL_KEYS:
            raise DetkitError(
                f"'{argument}' cannot be changed in an evaluation, whose model is the checkpoint's. "
                f"{nearest(key, {'data.*', 'proposals.*', 'save-json', 'precision', 'device', *EVAL_KEYS})}"
            )
    from pathlib import Path

    from detkit.inference.options import check_results_file
    from detkit.io.runs import resolve_checkpoint

    path = resolve_checkpoint(checkpoint)  # before anything heavy
    if save_json is not None:
        check_results_file(Path(save_json))

    import torch

    from detkit.config import experiment_to_dict, load_experiment
    from detkit.data.dataset_wrapper import in_order
    from detkit.data.proposals.dataset import check_needed, with_proposals, without_new_cache
    from detkit.data.splits import open_split
    from detkit.engine.evaluate import evaluate as run
    from detkit.engine.malloc import keep_freed_memory
    from detkit.inference.predictor import to_device
    from detkit.io.files import write_json
    from detkit.model import check_classes, load_model
    from detkit.tasks.base import task_of

    model = load_model(path)
    base = experiment_to_dict(model.experiment)
    base["proposals"] = without_new_cache(base["proposals"])
    experiment = load_experiment([], rest, base=base)
    check_needed(experiment.proposals, model.head.needs, str(experiment.head["name"]))
    dataset = in_order(open_split(experiment.data, "val", model.head.needs), model.classes.names)
    if not model.head.open_set:
        check_classes(model.classes, dataset.classes, str(path))
    dataset = with_proposals(dataset, experiment.proposals, str(experiment.data.get("val", "val")), "validation")
    options = experiment.train
    console = Console()
    model = to_device(model, options.device).eval().to(memory_format=torch.channels_last)
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    network, choices = None, f"{next(model.parameters()).device}, fp32"
    if precision is not None:
        from detkit.inference.optimization import FastNetwork

        network = FastNetwork(model, precision)  # type: ignore[arg-type]  # which says what is wrong with it
        choices = network.choices
    console.print(f"runs on    {choices}")
    batch_size = max(1, options.batch_size // (options.accumulate * options.devices))
    found = run(
        model, dataset, batch_size=batch_size, workers=options.workers, network=network, max_dets=options.max_dets
    )
    console.print(f"{path} on {len(dataset)} pictures; {dataset.problems.summary()}")
    console.print(found.scores.table())
    if save_json is not None:
        write_json(save_json, found.results)
        console.print(f"{len(found.results)} {task_of(model.head).noun} -> {save_json}")


def _leading_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Config files, given first or by --config, and the other arguments."""
    configs: list[str] = []
    rest = list(arguments)
    while rest and not rest[0].startswith("-"):
        configs.append(rest.pop(0))
    while (config := _take_option(rest, "--config"))[0] is not None:
        configs.append(str(config[0]))
        rest = config[1]
    return configs, rest


def _take_option(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option value` or `--option=value`, and the arguments without it."""
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise DetkitError(f"{option} needs a value.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _wants_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _experiment_help(command: str, extra: str) -> None:
    from detkit.config import Experiment
    from detkit.schema import print_options

    _print(f"usage: detkit {command} CONFIG.yaml [CONFIG2.yaml ...] [--KEY VALUE ...]\n{extra}\n")
    _print("--config CONFIG is a YAML file too; of several, later ones win. --print_config shows the outcome.\n")
    _print(print_options(Experiment).rstrip())


def _experiment(configs: list[str], overrides: list[str], command: str) -> Any:
    """The experiment, or None after --print_config."""
    from detkit.config import experiment_to_dict, load_experiment

    if not configs:
        raise DetkitError(
            f"detkit {command} needs a config first, for example: detkit {command} configs/quickstart.yaml"
        )
    show = "--print_config" in overrides
    experiment = load_experiment(configs, [override for override in overrides if override != "--print_config"])
    if show:
        import yaml

        _print(yaml.safe_dump(experiment_to_dict(experiment), sort_keys=False).rstrip())
        return None
    return experiment


if __name__ == "__main__":
    entry()
