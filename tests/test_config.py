"""Configs: merged, overridden, strict."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from detkit.config import (
    TrainOptions,
    experiment_from_dict,
    experiment_to_dict,
    find_config,
    load_experiment,
    packaged_configs,
    read_yaml,
)
from detkit.data.proposals.dataset import check_needed
from detkit.errors import ConfigError
from detkit.model import build_model
from detkit.structures import ClassList

CONFIG = """
data: {name: voc, root: images}
backbone: {name: small_ssd}
head: {name: ssd, iou_threshold: 0.5}
augment: [{name: flip, horizontal: 0.5}]
train: {epochs: 5, lr: 1e-3}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG)
    return path


def test_overrides_win_over_files_and_files_over_defaults(config: Path) -> None:
    experiment = load_experiment([str(config)], ["--train.epochs", "7", "--head.box_loss=giou", "--input.size=[64,96]"])
    assert (experiment.train.epochs, experiment.train.lr, experiment.train.batch_size) == (7, 1e-3, 16)
    assert experiment.head == {"name": "ssd", "iou_threshold": 0.5, "box_loss": "giou"}
    assert experiment.input.size == (64, 96)


def test_later_files_win_key_by_key(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text("head: {iou_threshold: 0.4}\ntrain: {epochs: 9}")
    experiment = load_experiment([str(config), str(other)])
    assert experiment.head == {"name": "ssd", "iou_threshold": 0.4}
    assert (experiment.train.epochs, experiment.train.lr) == (9, 1e-3)
    other.write_text("backbone: {name: resnet18}\nhead: {name: other, depth: 3}")
    assert load_experiment([str(config), str(other)]).head == {"name": "other", "depth": 3}


def test_a_relative_root_belongs_to_its_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert load_experiment([str(config)]).data["root"] == str(config.parent / "images")
    assert load_experiment([str(config)], ["--data.root", "here"]).data["root"] == "/here"


def test_relative_paths_of_proposals_belong_to_their_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config.write_text(CONFIG + "proposals: {name: file, path: 'deep/{split}.json', cache: ../there}")
    proposals = load_experiment([str(config)], ["--proposals.count", "7"]).proposals
    folder = config.parent
    assert proposals == {
        "name": "file",
        "path": f"{folder}/deep/{{split}}.json",
        "cache": str(folder.parent / "there"),
        "count": 7,
    }
    replaced = load_experiment([str(config)], ["--proposals", "{name: file, path: a.json, cache: here}"]).proposals
    assert replaced == {"name": "file", "path": "/a.json", "cache": "/here"}
    assert load_experiment([str(config)], ["--proposals", "null"]).proposals is None


def test_round_trip(config: Path) -> None:
    experiment = load_experiment([str(config)])
    assert experiment_from_dict(experiment_to_dict(experiment)) == experiment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", r"'trian' in .*a\.yaml is not a key.*Did you mean 'train'"),
        ("train: {epoch: 3}", r"'train\.epoch' in .*a\.yaml is not a key.*Did you mean 'epochs'"),
        ("train: {epochs: many}", r"train\.epochs.*whole number.*many"),
        ("train: {epochs: 0}", r"'train\.epochs' must be greater than 0"),
        ("train: {optimizer: sdg}", r"train\.optimizer"),
        (
            "train: {precision: bf17}",
            r"'train\.precision' must be 'auto', '32-true', .* or 'fp16', but is 'bf17'\. Did you mean 'bf16'",
        ),
        ("train: {batch_size: 7, accumulate: 2}", r"must be a multiple"),
        ("train: {epochs: 3, epochs: 4}", r"the key 'epochs' is given twice.*line"),
        ("input: {letterbox: true}", r"'input\.letterbox' in .*a\.yaml is not a key.*resize"),
        ("input: {resize: squash}", r"input\.resize.*squash"),
        ("input: {resize: short_side, size: [800, 600]}", r"'input\.size' with .*short_side is .*\[800, 600\]"),
        ("proposals: selective_search", r"proposals.*selective_search"),
        ("train: [1, 2", r"a\.yaml' is not valid YAML.*line"),
        ("- 3", r"a\.yaml' must be a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    parts = "" if text.startswith("-") else "data: {name: voc}\nbackbone: {name: small_ssd}\nhead: {name: ssd}\n"
    path.write_text(parts + text)
    with pytest.raises(ConfigError, match=message):
        load_experiment([str(path)])


def test_a_missing_file_and_missing_part_are_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file .*Did you mean .*a\.yaml"):
        load_experiment([str(config.with_name("aa.yaml"))])
    config.write_text("data: {name: voc}")
    with pytest.raises(ConfigError, match="backbone"):
        load_experiment([str(config)])


def test_an_unknown_override_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"'train\.learning_rat' in the command line.*Valid: "):
        load_experiment([str(config)], ["--train.learning_rat", "1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--head.name", "sdd"], r"no head named 'sdd'\. Did you mean 'ssd'"),
        (["--head.iou_treshold", "0.3"], r"'head\.iou_treshold' is not an option .*Did you mean 'iou_threshold'"),
        (["--head.iou_threshold", "high"], r"'head\.iou_threshold'.*a number.*high"),
        (["--head.anchors", "{name: pyramid}"], r"needs 'head\.anchors\.sizes'"),
        (["--head.anchors", "{name: default_boxes, ratios: [[2.0], [3.0]]}"], r"2 levels, but the model has 5"),
        (["--backbone.nmae", "x"], r"'backbone\.nmae' is not an option"),
        (["--head.num_classes", "3"], r"'head\.num_classes' is not an option"),
    ],
)
def test_options_of_parts_are_strict(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(load_experiment([str(config)], overrides), ClassList.from_names(["a", "b"]))


FOLDER = Path(__file__).parents[1] / "configs"
# style.yaml trains nothing and has a schema of its own; tests/zoo/style/test_style_transfer.py reads it.
CONFIGS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "style.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_in_the_repository_builds(path: Path) -> None:
    experiment = load_experiment([str(path)])
    assert path.read_text().startswith("#")
    count = len(experiment.head.get("class_weights", "abc"))
    model = build_model(experiment, ClassList.from_names([str(number) for number in range(count)]), load_weights=False)
    check_needed(experiment.proposals, model.head.needs, str(experiment.head["name"]))


def test_an_option_within_an_option_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(
        "data: {name: crops, margin: 0.2, data: {name: voc, root: inner, broken: repair}}\n"
        "backbone: {name: small_ssd}\nhead: {name: ssd, anchors: {name: pyramid, sizes: [[8.0]], ratios: [1.0]}}\n"
    )
    loaded = load_experiment([str(config)])
    assert loaded.data["data"] == {"name": "voc", "root": str(tmp_path / "inner"), "broken": "repair"}
    options = ["--data.data.root", str(tmp_path / "other"), "--head.anchors.sizes=[[4.0]]", "--train.lr", "1e-3"]
    changed = load_experiment([str(config)], options)
    assert changed.data["data"] == {"name": "voc", "root": str(tmp_path / "other"), "broken": "repair"}
    assert changed.data["margin"] == 0.2
    assert changed.head["anchors"] == {"name": "pyramid", "sizes": [[4.0]], "ratios": [1.0]}
    assert changed.train.lr == 1e-3
    whole = load_experiment([str(config)], ["--data", "{name: crops, data: {name: shapes}}", "--data.data.size", "64"])
    assert whole.data == {"name": "crops", "data": {"name": "shapes", "size": 64}}


def test_freeze_takes_a_number_or_all(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("data: {name: shapes}\nbackbone: {name: small_ssd}\nhead: {name: ssd}\n")
    assert load_experiment([str(config)], ["--train.freeze", "all"]).train.freeze == "all"
    assert load_experiment([str(config)], ["--train.freeze", "2"]).train.freeze == 2
    for wrong in ("-1", "none"):
        with pytest.raises(ConfigError, match=r"train\.freeze"):
            load_experiment([str(config)], ["--train.freeze", wrong])


@pytest.mark.parametrize(("short", "precision"), [("fp32", "32-true"), ("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
def test_precisions_have_the_names_that_predictions_know(short: str, precision: str) -> None:
    assert TrainOptions(precision=short).precision == precision  # type: ignore[arg-type]


def test_a_config_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    with pytest.raises(ConfigError, match=r"no config file 'ssd_bccd.yaml'. Did you mean 'configs/ssd_bccd.yaml'\?"):
        load_experiment(["ssd_bccd.yaml"], [])
    assert load_experiment(["ssd_bccd"], []).name == "ssd_bccd"


def test_configs_that_come_with_detkit_are_found_from_anywhere() -> None:
    """Each test runs in an empty folder."""
    assert find_config("quickstart") == (FOLDER / "quickstart.yaml", Path())
    assert load_experiment(["quickstart"]) == load_experiment([str(FOLDER / "quickstart.yaml")])
    assert set(packaged_configs()) == {path.stem for path in FOLDER.glob("*.yaml")}
    for missing in ("quickstart.yaml", "configs/quickstart.yaml", "deep/quickstart"):
        with pytest.raises(ConfigError, match=f"no config file '{missing}'. .* detkit train quickstart$"):
            find_config(missing)
    with pytest.raises(ConfigError, match=r"no config named 'quickstrat'. Did you mean 'quickstart'\?"):
        find_config("quickstrat")


@pytest.mark.parametrize("local", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_config_of_the_working_folder_wins(local: str) -> None:
    path = Path(local)
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    assert find_config("quickstart") == (path, path.parent)
    assert load_experiment(["quickstart"]).data["root"] == str(path.parent.absolute() / "images")


def test_paths_in_a_config_that_comes_with_detkit_start_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the folder of the installed package."""
    (tmp_path / "detkit/configs").mkdir(parents=True)
    (tmp_path / "detkit/configs/mine.yaml").write_text(CONFIG)
    monkeypatch.setattr("detkit.config.__file__", str(tmp_path / "detkit/config.py"))
    assert list(packaged_configs()) == ["mine"]
    assert load_experiment(["mine"]).data["root"] == str(Path("images").absolute())
    Path("mine").mkdir()  # a folder of that name is not a config
    assert load_experiment(["mine"]).data["root"] == str(Path("images").absolute())


def test_what_may_be_null_is_named_in_words() -> None:
    with pytest.raises(ConfigError, match=r"'train\.cache' must be 'memory', 'disk' or null, but is 'ram'\."):
        load_experiment([str(FOLDER / "quickstart.yaml")], ["--train.cache", "ram"])
    with pytest.raises(ConfigError, match=r"'train\.patience' must be a whole number or null, but is 'x'\."):
        load_experiment([str(FOLDER / "quickstart.yaml")], ["--train.patience", "x"])


WRONG: list[Any] = [
    None, True, [], {}, [None], -1, 2**70, 10**400, 3.7, float("nan"), float("inf"), "", "x", "a\0b", "~nobody/x",
    "1" * 5000, {"class_path": "os.system", "init_args": {}}, {"name": None}, {"name": {"a": 1}}, [[[]]], {1: 2}, b"x",
]  # fmt: skip


def places(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield from places(value, (*at, key)) if isinstance(value, (dict, list)) else [(*at, key)]


def test_any_value_in_any_place_gives_an_experiment_or_an_error() -> None:
    """For each value of each config some of those that are likely to break it: no exception but ConfigError."""
    random = Random(0)
    outcomes = {True: 0, False: 0}
    for path in random.sample(CONFIGS, 12):
        values = read_yaml(str(path))
        for at in places(values):
            changed: dict[Any, Any] = {"whole": copy.deepcopy(values)}
            inner: Any = changed
            for key in (keys := ["whole", *at])[:-1]:
                inner = inner[key]
            inner[keys[-1]] = random.choice(WRONG)
            try:
                experiment = experiment_from_dict(changed["whole"])
            except ConfigError:
                outcomes[False] += 1
            else:
                known = experiment_to_dict(experiment)
                assert experiment_to_dict(experiment_from_dict(json.loads(json.dumps(known)))) == known
                outcomes[True] += 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.lr", None, "'train.lr' must be a number, but is null."),
        ("train.lr", True, "'train.lr' must be a number, but is true."),
        ("train.lr", float("inf"), "'train.lr' is Infinity, but numbers must be finite."),
        ("train.epochs", True, "'train.epochs' must be a whole number, but is true."),
        ("train.epochs", 3.0, "'train.epochs' must be a whole number, but is 3.0."),
        ("train.epochs", 2**63, "9223372036854775808. It is too large."),
        ("train.milestones", [3, "x"], "'train.milestones[1]' must be a whole number, but is 'x'."),
        ("train.milestones", 3, "'train.milestones' must be a list of whole numbers, but is 3."),
        ("train.freeze", "al", "'train.freeze' must be a whole number or 'all', but is 'al'. Did you mean 'all'?"),
        ("train.freeze_norms", 1, "'train.freeze_norms' must be true or false, but is 1."),
        ("input.size", [320], "'input.size' must be a list of 2 whole numbers, but is [320]."),
        ("input.multi_scale", [1, 2, 3], "'input.multi_scale' must be a list of 2 numbers or null, but is [1, 2, 3]."),
        ("train", None, "'train' must be a mapping of keys to values, but is null."),
        ("name", 3, "'name' must be text, but is 3. Write it in quotes."),
        ("name", "a\0b", "It contains a NUL character"),
        ("augment", {"name": "flip"}, "'augment' must be a list of mappings of keys to values, but is {"),
        ("augment", ["flip"], "'augment[0]' must be a mapping of keys to values, but is 'flip'."),
        ("augment", [{"horizontal": 1}], "'augment[0]' needs a 'name'"),
        ("head", {"name": ["ssd"]}, "'head.name' must be text, but is [\"ssd\"]."),
        ("head", {}, "'head' needs a 'name'"),
        ("data.x", {1: 2}, "'data.x' has the key 1, but keys must be text"),
        (
            "data.x",
            [float("nan")],
            "'data.x[0]' is NaN, but numbers must be finite.",
        ),
        ("data." + "x" * 9999, 1, "(10,001 characters), but keys may have at most 200 characters"),
        ("data.x", b"x", "'data.x' must be text, a number"),
        ("train.class_path", "os.system", "'train.class_path' in the experiment is not a key of the config."),
    ],
)
def test_values_of_the_wrong_type_are_named(key: str, value: Any, message: str) -> None:
    values: dict[str, Any] = {
        **{"data": {"name": "shapes"}, "backbone": {"name": "small_ssd"}, "head": {"name": "ssd"}},
        **{"train": {}, "input": {}},
    }  # fmt: skip
    *groups, last = key.split(".")
    for group in groups:
        values = {**values, group: dict(values[group])}
    (values[groups[0]] if groups else values)[last] = value
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(values)
    assert message in str(caught.value)


def test_deep_nesting_is_an_error() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    parts = {"backbone": {"name": "small_ssd"}, "head": {"name": "ssd"}}
    with pytest.raises(ConfigError, match="nested deeper than 50 levels"):
        experiment_from_dict({**parts, "data": {"name": "shapes", "size": deep}})


def test_overrides_are_read_by_the_type_of_their_option(config: Path) -> None:
    texts = ["--name", "2024", "--runs=1.50", "--weights", "null", "--train.lr", "1e-3", "--train.freeze_norms"]
    texts += ["--data.root", "010", "--train.seed", "-0", "--train", "{epochs: 3, lr: 5}", "--head.anchors", "null"]
    texts += ["--head.anchors.sizes", "[[8]]", "--input.size", "[32, 64]"]
    experiment = load_experiment([str(config)], texts)
    assert (experiment.name, experiment.runs, experiment.weights) == ("2024", "1.50", None)
    assert (experiment.train.lr, experiment.train.epochs, experiment.train.freeze_norms) == (5.0, 3, True)
    assert experiment.data["root"] == str(Path("010").absolute())
    assert experiment.head["anchors"] == {"sizes": [[8]]}
    assert experiment.input.size == (32, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.lr"], "'--train.lr' needs a value: --train.lr VALUE."),
        (["train.lr", "3"], "'train.lr' is not an option"),
        (["--train.lr", "1", "2"], "'2' is not an option"),
        (["--train.lr", "[1"], "value of '--train.lr' is not valid YAML"),
        (["--train.lr", "&a [*a]"], "contains the alias itself"),
        (["--train.lr", "!!python/object/apply:os.getcwd []"], "value of '--train.lr' is not valid YAML"),
        (["--name.x", "1"], "'name.x' in the command line is not a key"),
        (["--augment.0.horizontal", "1"], "'augment.0.horizontal' in the command line is not a key"),
        (["--head.name.x", "1"], "'--head.name.x' sets a key within 'head.name', which is not a mapping"),
        (["--train", "{class_path: a.b}"], "'train.class_path' in the command line is not a key"),
        (["--config", "x.yaml"], "'config' in the command line is not a key"),
    ],
)
def test_wrong_overrides_are_named(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment([str(config)], overrides)
    assert message in str(caught.value)


def test_a_config_of_aliases_takes_no_memory(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    config.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="once its aliases are expanded"):
        load_experiment([str(config)])


def test_names_of_the_first_version_keep_loading(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("data: {name: pictures, root: photos}\nbackbone: {name: pixels}\nhead: {name: ssd}\n")
    assert load_experiment([str(config)]).data == {"name": "images", "root": str(tmp_path / "photos")}
