"""README and docs: links resolve, commands parse, code runs, and figures are those of the benchmarks."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import detkit
from benchmarks import __main__ as benchmarks
from benchmarks.count_lines import core_files, count, files_without_zoo, rewrite
from detkit.cli import commands, main
from detkit.cli.infer import InferOptions
from detkit.cli.parser import leading_configs, parse_options, take_option
from detkit.config import experiment_to_dict, load_experiment, packaged_configs
from detkit.registry import backbones, datasets, heads, necks
from detkit.schema import option_names

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:detkit|benchmarks|configs|docs|tests|tools)/[\w./]*")
REGISTRIES = {"data": datasets, "backbone": backbones, "neck": necks, "head": heads}
OF_EXPERIMENT = {"name", "train", "val", "allow_leaks"}
"""Keys of `data` that are not options of the format."""
NEEDS_NO_CHECK = {"pip", "pytest", "pre-commit", "mkdocs", ".ci/run", "python3", "."}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(read(path)) if kind == language]


def spans(path: Path) -> list[str]:
    """Inline code, with line breaks as spaces."""
    return [" ".join(text.split()) for text in SPAN.findall(FENCE.sub("", read(path)))]


def shell_lines() -> Iterator[tuple[str, str]]:
    """(document, command) of all blocks, and of the inline code that is a command of detkit."""
    for path in DOCUMENTS:
        inline = (text for text in spans(path) if re.match(r"detkit |python (-m benchmarks|\w+/)", text))
        for text in (*blocks(path, "bash"), *inline):
            for line in text.splitlines():
                for command in line.split("&&"):
                    if shlex.split(command, comments=True):
                        yield path.name, command.strip()


COMMANDS = sorted(set(shell_lines()))


def slug(heading: str) -> str:
    """The anchor that mkdocs and GitHub give a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", read(path)), re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for link in LINK.findall(SPAN.sub("", FENCE.sub("", read(path)))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = {text for text in spans(path) if PATH.fullmatch(text)}
    assert [text for text in sorted(named) if not (ROOT / text).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 150


def test_the_site_lists_every_page() -> None:
    site = yaml.safe_load(read(ROOT / "docs" / "mkdocs.yml"))
    assert sorted(page for entry in site["nav"] for page in entry.values()) == [path.name for path in PAGES]


def test_the_reference_names_what_there_is() -> None:
    for name in re.findall(r"^::: (\S+)$", read(ROOT / "docs" / "pages" / "reference.md"), re.MULTILINE):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_commands_parse(document: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if program == "python" and arguments[0].startswith("tools/"):
        program, arguments = "detkit", [Path(arguments[0]).stem, *arguments[1:]]
    if program == "detkit":
        check_detkit(arguments, capsys)
    elif program == "python" and arguments[:2] == ["-m", "benchmarks"]:
        check_benchmark(arguments[2:])
    elif program == "python":
        script = read(ROOT / arguments[0])
        assert all(f'"{option}"' in script for option in arguments if option.startswith("--"))
    else:
        assert program in NEEDS_NO_CHECK, command


def check_detkit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = arguments
    if name in ("COMMAND", "--version", "--help"):
        return
    assert name in commands(), name
    if name in ("train", "check"):
        if "--help" not in rest:
            check_experiment(rest)
    elif name == "infer":
        given = {"checkpoint": "RUN", "source": "images"}
        assert parse_options(InferOptions, name, rest, values=given) is not None or "--help" in rest
        capsys.readouterr()
    elif name == "models" and not rest:
        assert main(arguments) == 0
    else:
        assert main([name, "--help"]) == 0
        options = {option.split("=")[0] for option in rest if option.startswith("--")}
        known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
        assert {option for option in options if option not in known and not option.startswith("--data.")} == set()


def check_experiment(arguments: list[str]) -> None:
    """Configs that a document makes up stand for the quickstart's."""
    for option in ("--resume", "--anchors"):
        _, arguments = take_option(arguments, option)
    configs, overrides = leading_configs([argument for argument in arguments if argument != "--print_config"])
    known = [config for config in configs if Path(config).stem in packaged_configs()]
    check_parts(load_experiment([Path(config).stem for config in known or ["quickstart"]], overrides))


def check_parts(experiment: Any) -> None:
    values = experiment_to_dict(experiment)
    for part, registry in REGISTRIES.items():
        if values[part] is not None:
            options = option_names(registry.get(values[part]["name"])) | OF_EXPERIMENT
            assert set(values[part]) <= options, part


def check_benchmark(arguments: list[str]) -> None:
    name, *options = arguments
    if options:
        benchmarks.parse(name, options)
    elif name not in benchmarks.BENCHMARKS:
        assert name in (*benchmarks.DOCUMENTS, "NAME", "--help"), name


def test_extras_exist() -> None:
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        for names in re.findall(r"(?:\.|detkit-vision)\[([\w,]+)\]", read(path)):
            assert set(names.split(",")) <= set(extras), (path.name, names)


@pytest.mark.parametrize(("path", "text"), [(path, text) for path in PAGES for text in blocks(path, "yaml")])
def test_configs_in_documents_are_valid(path: Path, text: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    check_parts(load_experiment([str(config)], []))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_in_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in order; `detkit.load` gives an untrained model in place of the run.

    The export is only compiled: tests/boxes/test_nms_onnx.py runs one, and it takes long.
    """
    from detkit.inference.predictor import Predictor
    from detkit.model import build_model
    from detkit.structures import ClassList

    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save("street.jpg")
    model = build_model(load_experiment(["quickstart"], []), ClassList.from_names(["a", "b"]))
    monkeypatch.setitem(vars(detkit), "load", lambda checkpoint: Predictor(model))
    namespace: dict[str, Any] = {}
    for text in blocks(path, "python"):
        code = compile(text, str(path), "exec")
        if "torch.onnx" not in text:
            exec(code, namespace)


def test_figures_of_the_readme_stand_among_the_results() -> None:
    text = read(ROOT / "README.md")
    results = read(ROOT / "docs" / "pages" / "benchmarks.md") + read(ROOT / "docs" / "pages" / "boxes.md")
    claims = text[text.index("## What you get") : text.index("## Documentation")]
    claims = LINK.sub("]", FENCE.sub("", claims))
    figures = re.findall(r"\d+\.\d+x?|\d+x|\d+ (?:ms|MB)\b", claims)
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in results] == []
    for row in re.findall(r"^\| .*`(\w+)` \| (.*) \|$", claims, re.MULTILINE):
        name, cells = row
        known = next(line for line in results.splitlines() if line.startswith(f"| `{name}.yaml`"))
        values = [cell.strip() for cell in cells.split("|")[1:] if cell.strip()]
        assert set(values) <= {cell.strip() for cell in known.split("|")}, name


def test_figures_of_the_size_are_written_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "developing.md"
    page.write_text("| core: files | 1 |\n| all of detkit without the zoo | 1,000 |\n", encoding="utf-8")
    assert rewrite(page)
    figures = (f"{round(count(files), -2):,}" for files in (core_files(), files_without_zoo()))
    assert read(page) == "| core: files | {} |\n| all of detkit without the zoo | {} |\n".format(*figures)
    assert not rewrite(page)


def test_figures_of_the_size_are_those_of_the_script() -> None:
    table = read(ROOT / "docs" / "pages" / "developing.md").partition("## Size")[2]
    core, everything = (int(figure.replace(",", "")) for figure in re.findall(r"\| ([\d,]+) \|$", table, re.MULTILINE))
    assert abs(core - count(core_files())) < 100, "run python -m benchmarks lines"
    assert abs(everything - count(files_without_zoo())) < 100, "run python -m benchmarks lines"
