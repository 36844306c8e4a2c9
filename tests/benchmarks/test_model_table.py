"""The table of models through the command line, on networks of a few thousand parameters."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from benchmarks.__main__ import main
from benchmarks.model_table import scores_of
from benchmarks.models import made_up_image
from detkit.config import load_experiment
from detkit.errors import CheckpointError
from detkit.model import build_model
from detkit.structures import ClassList

CONFIG = {
    "data": {"name": "shapes"},
    "backbone": {"name": "small_ssd", "widths": [4] * 3, "level_channels": 4},
    "head": {"name": "ssd"},
    "input": {"size": [64, 96]},
}
METRICS = """epoch,step,lr,seconds,train_box,mAP,mAP50,mAP75
1,5,0.1,30.0,2.5,0.25,0.75,0.1
2,10,0.1,60.0,1.5,,,
3,15,0.1,45.0,1.0,0.5,0.7,0.4
4,20,0.1,45.0,1.0,0.45,0.8,0.3
"""


@pytest.fixture
def model(tmp_path):
    """That of CONFIG; its config is written to tiny.yaml, its run to runs/tiny, for five and two classes."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "name": "tiny"}))
    experiment = load_experiment([str(tmp_path / "tiny.yaml")])
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.csv").write_text(METRICS)
    model = build_model(experiment, ClassList.from_names(("cat", "dog")))
    model.save(tmp_path / "runs" / "tiny" / "checkpoints" / "best.safetensors")
    Image.fromarray(made_up_image(50, 70, seed=1)).save(tmp_path / "image.png")
    return model.eval()


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        given = ("--device", "cpu", "--rounds", "2", "--source", "image.png", "--output", "out.json", *arguments)
        status = main(["model_table", *given])
        printed = capsys.readouterr()
        written = Path("out.json")
        return status, printed.out, printed.err, json.loads(written.read_text()) if written.exists() else None

    return call


def flops_by_hand(model: nn.Module, size: tuple[int, int]) -> int:
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        total += 2 * output.numel() * layer.weight[0].numel()

    hooks = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, *size), (size,))
    for hook in hooks:
        hook.remove()
    return total


def test_a_run_and_a_config(bench, model):
    status, output, error, report = bench("--models", "runs/*, tiny.yaml", "--classes", "5")
    assert status == 0, error
    of_run, of_config = report["cases"]
    assert (of_run["kind"], of_run["size"], of_run["device"]) == ("tiny", "64 x 96", "cpu")
    facts = of_run["facts"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["flops"] == flops_by_hand(model, (64, 96))
    assert facts["weights"] == "of the run"
    assert (facts["mAP"], facts["mAP50"]) == (0.5, 0.7)
    assert (facts["epochs"], facts["training_minutes"]) == (4, 3.0)
    # Two classes and background become five and background: twice the outputs of the class predictors.
    more = sum(parameter.numel() for name, parameter in model.head.named_parameters() if "class" in name)
    assert of_config["facts"]["parameters"] == facts["parameters"] + more
    assert of_config["facts"]["weights"] == "random"
    assert "mAP" not in of_config["facts"]
    for case in report["cases"]:
        [row] = case["rows"]
        assert len(row["samples_us"]) == 2
        assert row["median_us"] > 0
    lines = [line for line in output.splitlines() if line.startswith("| `tiny` | 64 x 96 | 0.0 M | 0.0 |")]
    assert [line.endswith("| 0.700 | 0.500 | 3 |") for line in lines] == [True, False]


@pytest.mark.parametrize("text", [None, METRICS.splitlines()[0], "\n".join(METRICS.splitlines()[0:3:2])])
def test_a_run_that_was_not_evaluated_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text + "\n")
    with pytest.raises(CheckpointError, match=r"no scores in '.*metrics\.csv'.*Give the folder of a run"):
        scores_of(tmp_path / "metrics.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "The table needs models. Give runs' folders and configs"),
        (["--models", "tiny.yaml,configs/none_*.yaml"], "--models holds 'configs/none_*.yaml', which is no run"),
        (["--models", "tiny.yaml", "--classes", "0"], "--classes must be at least 1, but is 0"),
        (["--models", "runs"], "The folder 'runs' contains no checkpoints/best.safetensors"),
        (["--models", "tiny.yaml", "--source", "nothing.jpg"], "nothing.jpg"),
    ],
)
def test_mistakes(bench, model, arguments, message):
    status, _, error, report = bench(*arguments)
    assert (status, report) == (1, None)
    assert message in error
