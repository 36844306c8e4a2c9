"""Opening a file runs nothing: what a hostile config, checkpoint or option names is not imported, called or started.

Each payload would leave a trace, a file or an imported module, if anything acted on it.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from zoo_cases import zoo_cases

import detkit
from detkit.cli import main
from detkit.config import experiment_from_dict, load_experiment
from detkit.data.formats.shapes import Shapes
from detkit.errors import DetkitError
from detkit.model import build_model

MODULE = "canary_in_the_mine"


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a payload makes; it must not be there in the end, nor the module be imported."""
    path = tmp_path / "trace"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(
        f"open({str(path)!r}, 'w').close()\nclass Thing(dict):\n    name = 'ssd'\n    def __init__(self, **o): pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists()
    assert MODULE not in sys.modules


def payloads(trace: Path) -> list[dict[str, Any]]:
    """Mappings that jsonargparse, hydra and others make objects of."""
    touch = {"args": f"touch {trace}", "shell": True}
    return [
        {"class_path": "subprocess.Popen", "init_args": touch},
        {"class_path": f"{MODULE}.Thing", "init_args": {"name": "ssd"}},
        {"_target_": "os.system", "command": f"touch {trace}"},
    ]


def places(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value within a config, but to the config itself."""
    if at:
        yield at
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))
        else:
            yield (*at, key)


def replaced(values: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy of a config with another value at one place; a list or mapping on the way is made where there is none."""
    values = copy.deepcopy(values)
    inner = values
    for key in at[:-1]:
        if isinstance(inner, dict) and not isinstance(inner.get(key), (dict, list)):
            inner[key] = {}
        inner = inner[key]
    inner[at[-1]] = new
    return values


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command ends with detkit's own error, one paragraph."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 1, arguments
    assert error.startswith("detkit: "), error
    assert error.strip().count("\n") == 0
    return error


@pytest.fixture
def checkpoint(tiny_config: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A checkpoint of the tiny experiment whose metadata holds another experiment."""
    torch.manual_seed(0)
    good = tmp_path / "good.safetensors"
    build_model(load_experiment([str(tiny_config)]), Shapes("val", val_count=1).classes).save(good)
    with safe_open(good, "pt") as file:
        # Without its checksum, so that what is changed gets as far as the parser.
        metadata = {key: value for key, value in file.metadata().items() if key != "checksum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)

    def make(change: Callable[[dict[str, Any]], Any]) -> Path:
        path = tmp_path / "bad.safetensors"
        experiment = json.dumps(change(json.loads(metadata["experiment"])))
        save_file(tensors, path, {**metadata, "experiment": experiment})
        return path

    return make  # type: ignore[return-value]


MODEL_PLACES = [
    ("head", "iou_threshold"),
    ("head", "anchors"),
    ("head", "anchors", "ratios"),
    ("head", "anchors", "name"),
    ("head", "name"),
    ("head",),
    ("backbone", "widths"),
    ("backbone", "widths", 0),
    ("backbone",),
    ("neck",),
    ("augment",),
    ("train",),
    ("train", "lr"),
    ("train", "optimizer"),
    ("input", "size", 1),
    ("weights",),
    ("weights_parts", 0),
    ("name",),
]


@pytest.mark.parametrize("place", MODEL_PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_checkpoint_runs_nothing(
    trace: Path, checkpoint: Any, place: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for payload in payloads(trace):
        path = checkpoint(lambda values, new=payload: replaced(values, place, new))
        with pytest.raises(DetkitError):
            detkit.load(path)
    refused(capsys, "infer", path, "--source", path)
    refused(capsys, "eval", path)


def test_a_checkpoint_that_is_a_payload_as_a_whole_runs_nothing(trace: Path, checkpoint: Any) -> None:
    for payload in payloads(trace):
        for new in (payload, [payload], {"config": payload}, {**payload, "data": payload}):
            path = checkpoint(lambda values, new=new: new)
            with pytest.raises(DetkitError):
                detkit.load(path)
        path = checkpoint(lambda values, new=payload: {**values, **new})
        with pytest.raises(DetkitError, match=r"class_path|_target_"):
            detkit.load(path)


def test_the_data_that_a_checkpoint_names_run_nothing(
    trace: Path, checkpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data are opened by an evaluation; for a prediction they are words."""
    for payload in payloads(trace):
        for place in (("data", "size"), ("data", "root"), ("data", "data"), ("proposals", "path")):
            path = checkpoint(lambda values, place=place, new=payload: replaced(values, place, new))
            refused(capsys, "eval", path, "--train.workers", "0")


def test_a_config_runs_nothing(trace: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = yaml.safe_load(tiny_config.read_text())
    added = [("head", "anchors"), ("neck",), ("proposals",), ("data", "data"), ("train",), ("class_path",), ("x", "y")]
    for place in [*places(good), *added]:
        for payload in payloads(trace):
            tiny_config.write_text(yaml.safe_dump(replaced(good, place, payload)))
            refused(capsys, "train", tiny_config)
        if place[0] == "data":
            refused(capsys, "check", tiny_config)
        if place[0] in ("train", "input", "name", "runs", "class_path", "x"):
            refused(capsys, "train", tiny_config, "--print_config")


def test_printing_a_config_shows_a_payload_as_data(
    trace: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = payloads(trace)[0]
    assert main(["train", str(tiny_config), f"--head.anchors={json.dumps(payload)}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["head"]["anchors"] == payload


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {trace}']",
        "!!python/object/new:subprocess.Popen [['touch', '{trace}']]",
        "[!!python/module:{module} x]",
        "!!python/name:{module}.Thing ''",
        "{{a: !!python/object:{module}.Thing {{}}}}",
        "{{class_path: subprocess.Popen, init_args: {{args: 'touch {trace}', shell: true}}}}",
        "{{name: {{class_path: {module}.Thing}}}}",
        "{{name: '{module}.Thing'}}",
        "${{{module}:x}}",
    ],
)
def test_options_of_a_command_run_nothing(
    trace: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    text = text.format(trace=trace, module=MODULE)
    for key in ("data", "data.size", "head", "head.anchors", "augment", "train", "train.lr", "input.size", "neck"):
        refused(capsys, "train", tiny_config, f"--{key}", text)
    refused(capsys, "check", tiny_config, f"--data={text}")
    refused(capsys, "infer", tiny_config.with_name("none.safetensors"), "--source", "x", "--conf", text)
    refused(capsys, "infer", tiny_config.with_name("none.safetensors"), "--source", "x", "--proposals", text)


@pytest.mark.parametrize("name", zoo_cases("CONFIGS_OF_COMMANDS"))
def test_a_config_of_a_command_of_the_zoo_runs_nothing(
    trace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    good, others, more_places = zoo_cases("CONFIGS_OF_COMMANDS")[name]
    config = trace.with_name(f"{name}.yaml")
    for place in [*places(good), *more_places, ("optimizer",), ("class_path",)]:
        for payload in payloads(trace):
            config.write_text(yaml.safe_dump({**others, **replaced(good, place, payload)}))
            refused(capsys, "infer", config)


def test_tags_of_python_in_a_file_are_refused(
    trace: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.write_text(f"{tiny_config.read_text()}weights: !!python/object/apply:os.system ['touch {trace}']\n")
    for command in ("train", "check"):
        assert "not valid YAML" in refused(capsys, command, tiny_config)


def test_an_experiment_of_any_json_is_an_error_or_itself(trace: Path) -> None:
    for payload in payloads(trace):
        for values in (payload, [payload], "x", None, 3, True, [], {}, {"data": payload, "backbone": {}, "head": []}):
            with pytest.raises(DetkitError):
                experiment_from_dict(values)


def test_a_checkpoint_does_not_say_where_a_cache_is_made(tmp_path: Path) -> None:
    from detkit.data.proposals.dataset import without_new_cache

    options = {"name": "file", "cache": str(tmp_path / "new")}
    assert without_new_cache(options) == {"name": "file"}
    assert without_new_cache({**options, "cache": str(tmp_path)}) == {**options, "cache": str(tmp_path)}
    assert without_new_cache({"name": "file", "path": "x"}) == {"name": "file", "path": "x"}
    assert without_new_cache(None) is None
