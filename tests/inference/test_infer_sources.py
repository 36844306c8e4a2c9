"""`detkit infer` on folders that hold more than images: every file is read, or counted with its reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from detkit.data.formats.shapes import Shapes
from detkit.inference.images import infer
from detkit.inference.predictor import Predictor
from detkit.model import build_model
from detkit.tasks.options import PredictOptions


@pytest.fixture
def predictor(tiny: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(tiny(), Shapes("val", val_count=1).classes), "cpu")


def test_a_mixed_folder(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    pixels = Image.fromarray(np.full((40, 50, 3), 90, dtype=np.uint8))
    kinds = {"png": "PNG", "jfif": "JPEG", "tga": "TGA", "jp2": "JPEG2000"}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    for suffix, kind in kinds.items():
        pixels.save(folder / f"{suffix}.{suffix}", kind)
    for name in ("video.mp4", "notes.txt", "labels.json", "photo.heic"):
        (folder / name).write_bytes(b"x")
    (folder / "parent").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere")
    assert infer(predictor, str(folder), tmp_path / "out", PredictOptions(conf=0.0)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(kinds)} image" in said or f"{len(kinds)} image" in said
    for part in ("videos, which must be given one at a time: 1 (.mp4)", "not images: 2 (.json, .txt)", "1 (.heic)"):
        assert part in said
    assert "broken links: 1 (first:" in said
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {record["image_id"] for record in found} == set(kinds)


def test_a_folder_named_like_a_video(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "clip.mp4" / "a.png")
    assert infer(predictor, str(tmp_path / "clip.mp4"), tmp_path / "out") == 0
    assert Image.open(tmp_path / "out" / "images" / "a.jpg").size == (40, 30)


def test_dark_images_are_counted(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(np.full((30, 30), 4000 * 8**number % 65521, dtype=np.uint16)).save(
            tmp_path / "in" / f"{number}.png"
        )
    infer(predictor, str(tmp_path / "in"), tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "dark: 1 16-bit image, the first:" in said
    assert "use only 12 bits" in said
