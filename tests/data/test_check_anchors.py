"""`detkit check CONFIG --anchors N`."""

from pathlib import Path

import pytest
import torch
import yaml

from detkit.boxes import kmeans_priors
from detkit.cli import main
from detkit.data.formats.shapes import Shapes


def propose(config: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["check", str(config), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_proposes_anchors_in_pixels_of_the_input(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stretched to 128 x 192, boxes of images of 64 x 64 are 3 times as wide and twice as high."""
    status, output, error = propose(tiny_config, "--anchors", "4", "--input.size", "[128, 192]", capsys=capsys)
    assert status == 0, error
    boxes = torch.cat([Shapes("train", train_count=12, size=64).target(index).boxes for index in range(12)])
    sides = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor([3.0, 2.0])
    expected, overlap = kmeans_priors(sides, 4)
    lines = output[output.index("4 anchors for") :].splitlines()
    assert f"the {len(boxes)} objects of the training split" in lines[0]
    assert f"mean IoU with the best {overlap:.3f}" in lines[0]
    proposed = yaml.safe_load("\n".join(lines[1:]))["head"]["anchors"]
    torch.testing.assert_close(torch.tensor(proposed), expected, rtol=0, atol=0.051)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "--anchors must be the number of anchors to propose, at least 1, but is '0'"),
        ("many", "at least 1, but is 'many'"),
        ("-3", "at least 1, but is '-3'"),
        ("9999", "--anchors is 9999, but the objects of the training split have only"),
    ],
)
def test_impossible_numbers(tiny_config: Path, capsys: pytest.CaptureFixture[str], value: str, message: str) -> None:
    status, _, error = propose(tiny_config, "--anchors", value, capsys=capsys)
    assert status == 1
    assert message in error
    assert error.strip().count("\n") == 0


def test_without_the_option_nothing_is_proposed(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "anchors" not in propose(tiny_config, capsys=capsys)[1]
