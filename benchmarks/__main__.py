"""Run a benchmark from a checkout: python -m benchmarks NAME [--OPTION VALUE ...]."""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options
from detkit.errors import ConfigError, DetkitError, nearest, printable
from detkit.io.terminal import Console, tolerate_any_text
from detkit.schema import build, from_text, given_options, option_names, option_type, plain, print_options

PROGRAM = "python -m benchmarks"
BENCHMARKS: dict[str, tuple[str, type[options.BenchOptions]]] = {
    "nms": ("Non-maximum suppression: boxes per second by their number, a table, a plot, JSON.", options.NmsOptions),
    "iou": ("Pairwise intersection over union.", options.IouOptions),
    "matching": ("Assignment of ground truth to anchors: time and memory.", options.MatchingOptions),
    "proposals": ("Selective search: recall of real objects, images per second.", options.ProposalsOptions),
    "inference": ("Whole networks, from an image to boxes and masks: time, stages, memory.", options.InferenceOptions),
    "train_step": ("Whole networks, one training step: time and memory.", options.TrainStepOptions),
    "learning": ("Whole networks, some training steps: the loss beside torchvision's.", options.LearningOptions),
    "model_table": ("Runs and configs: parameters, FLOPs, time per image, scores.", options.ModelTableOptions),
    "scaling": ("Growth of time and memory with pixels, batch, objects, classes and data.", options.ScalingOptions),
}
PAGES = Path(__file__).parents[1] / "docs" / "pages"
TABLES = "tables"
LINES = "lines"
DOCUMENTS = {
    TABLES: "Put the results of benchmarks/results into the tables of docs/pages/benchmarks.md.",
    LINES: "Count the lines of detkit, and put the figures into docs/pages/developing.md.",
}
"""The commands that measure no time, but put figures into the documents."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a user's mistake, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tolerate_any_text()
    try:
        _run(given)
    except DetkitError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno is None:
            raise
        return _fail(f"{error}. Check the path, the free space and the permissions.", 1)
    except KeyboardInterrupt:
        return _fail("stopped.", 130)
    return 0


def parse(name: str, arguments: list[str]) -> options.BenchOptions:
    """The options of the benchmark `name`, from a command line.

    Raises:
        ConfigError: an option is not valid, or its value has the wrong type.
        DetkitError: a value is out of range.
    """
    _, schema = BENCHMARKS[name]
    names = option_names(schema)

    def field(option: str) -> str:
        found = option.replace("-", "_")  # --peer-python is accepted as well as --peer_python
        if found not in names:
            raise ConfigError(f"'--{option}' is not a valid option of {PROGRAM} {name}. {nearest(found, names)}")
        return found

    values = {}
    for option, text in given_options(arguments, lambda option: option_type(schema, field(option)) is bool):
        values[field(option)] = plain(from_text(text, option_type(schema, field(option)), option), f"--{option}")
    return build(schema, values, "--")


def _run(given: list[str]) -> None:
    name, *arguments = given or [""]
    wants_help = bool({"-h", "--help"} & set(given))
    if name in BENCHMARKS and wants_help:
        options_help = print_options(BENCHMARKS[name][1]).rstrip()
        Console().print(f"usage: {PROGRAM} {name} [--OPTION VALUE ...]\n\n{options_help}")
    elif name in BENCHMARKS:
        bench = getattr(importlib.import_module(f"benchmarks.{name}"), f"bench_{name}")
        bench(parse(name, arguments), f"{PROGRAM} {shlex.join(given)}")
    elif wants_help:
        _print_help()
    elif given == [TABLES]:
        _rewrite_tables()
    elif given == [LINES]:
        _count_lines()
    elif not given:
        _print_help()
        raise DetkitError(f"The name of a benchmark comes first, for example: {PROGRAM} nms --quick")
    elif name in DOCUMENTS:
        raise DetkitError(f"{PROGRAM} {name} takes no arguments, but got '{arguments[0]}'.")
    else:
        raise DetkitError(f"There is no benchmark '{name}'. {nearest(name, [*BENCHMARKS, *DOCUMENTS])}")


def _print_help() -> None:
    summaries = {name: summary for name, (summary, _) in BENCHMARKS.items()} | DOCUMENTS
    lines = [f"  {name:11} {summary}" for name, summary in summaries.items()]
    usage = f"usage: {PROGRAM} BENCHMARK [--OPTION VALUE ...]"
    Console().print("\n".join([usage, "", *lines, "", f"`{PROGRAM} BENCHMARK --help` lists its options."]))


def _rewrite_tables() -> None:
    from benchmarks.report import RESULTS
    from benchmarks.tables import rewrite

    changed = rewrite(PAGES / "benchmarks.md", RESULTS)
    Console().print(f"benchmarks.md: {'its tables are new' if changed else 'nothing changed'}")


def _count_lines() -> None:
    from benchmarks.count_lines import report, rewrite

    changed = rewrite(PAGES / "developing.md")
    Console().print(f"{report()}\n\ndeveloping.md: {'its figures are new' if changed else 'nothing changed'}")


def _fail(text: str, status: int) -> int:
    """Say on standard error why the command ends; returns the exit status."""
    print(f"benchmarks: {printable(text)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
