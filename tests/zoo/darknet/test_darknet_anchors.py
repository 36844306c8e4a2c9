"""Anchors that `detkit check CONFIG --anchors N` proposes, in YOLOv2 and v3."""

from pathlib import Path

import pytest
import yaml

from detkit.cli import main
from detkit.registry import heads


def test_the_proposal_fits_into_the_config(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed, it is an option of the heads yolov2 and yolov3."""
    main(["check", str(tiny_config), "--anchors=6"])
    output = capsys.readouterr().out
    options = yaml.safe_load(output[output.index("head:") :])["head"]
    for name, channels in (("yolov2", (4,)), ("yolov3", (4, 4))):
        head = heads.build({"name": name, **options}, "head", channels=channels, strides=(8, 16)[: len(channels)],
                           num_classes=2)  # fmt: skip
        assert sum(len(level) for level in head.anchors) == 6
