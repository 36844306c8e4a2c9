"""Configs by name on the command line."""

from pathlib import Path

import yaml
from cli_runs import Run, fails

from detkit.config import packaged_configs

SMALL = ("--data.train_count", "16", "--data.val_count", "4", "--train.epochs", "1", "--backbone.widths", "[4, 8, 8]")


def test_a_config_that_comes_with_detkit_trains_by_its_name(run: Run) -> None:
    status, output, error = run("train", "quickstart", *SMALL)
    assert status == 0, error
    assert output.startswith(f"config     {packaged_configs()['quickstart']}\n")
    assert Path("runs/detect/quickstart/checkpoints/best.safetensors").is_file()


def test_the_output_names_the_config_of_the_working_folder(run: Run) -> None:
    Path("quickstart.yaml").write_text(packaged_configs()["quickstart"].read_text())
    status, output, error = run("check", "quickstart", *SMALL[:4])
    assert status == 0, error
    assert output.startswith("config     quickstart.yaml\n")
    status, output, _ = run("check", "quickstart.yaml", *SMALL[:4])
    assert "config " not in output


def test_print_config_prints_yaml_alone(run: Run) -> None:
    _, output, _ = run("train", "quickstart", "--print_config")
    assert yaml.safe_load(output)["name"] == "quickstart"


def test_unknown_names(run: Run) -> None:
    fails(run("train", "quickstrat"), "no config named 'quickstrat'", "Did you mean 'quickstart'", "ssd_bccd")
    fails(run("train", "configs/quickstart.yaml"), "no config file", "detkit train quickstart")


def test_models_lists_the_configs(run: Run) -> None:
    _, output, _ = run("models")
    for name in packaged_configs():
        assert f"\n  {name} " in output
    assert "  ssd300_vgg16             SSD300 on VGG-16 (Liu et al. 2016), the model of torchvision's" in output
