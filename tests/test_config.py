"""Configs: merged, overridden, strict."""

from pathlib import Path

import pytest

from detkit.config import TrainOptions, experiment_from_dict, experiment_to_dict, load_experiment
from detkit.errors import ConfigError
from detkit.model import build_model
from detkit.proposals.dataset import check_needed
from detkit.types import ClassList

CONFIG = """
data: {name: voc, root: pictures}
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
    assert load_experiment([str(config)]).data["root"] == str(config.parent / "pictures")
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
    replaced = load_experiment([str(config)], ["--proposals", "{name: selective_search, cache: here}"]).proposals
    assert replaced == {"name": "selective_search", "cache": "/here"}
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
        ("- 3", r"a\.yaml' must hold keys and values"),
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
# style.yaml trains nothing and has a schema of its own; tests/test_style_transfer.py reads it.
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
    with pytest.raises(ConfigError, match=r"no config file 'ssd_bccd'. Did you mean 'configs/ssd_bccd.yaml'\?"):
        load_experiment(["ssd_bccd"], [])


def test_what_may_be_null_is_named_in_words() -> None:
    with pytest.raises(ConfigError, match=r"'train\.cache' must be 'memory', 'disk' or null, but is 'ram'\."):
        load_experiment([str(FOLDER / "quickstart.yaml")], ["--train.cache", "ram"])
    with pytest.raises(ConfigError, match=r"'train\.patience' must be a whole number or null, but is 'x'\."):
        load_experiment([str(FOLDER / "quickstart.yaml")], ["--train.patience", "x"])
