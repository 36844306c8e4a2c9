"""The images that a run shows of its training data, where some cannot be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data.formats.yolo import Yolo
from detkit.data.loader import training_loader
from detkit.data.transforms import Augment, Fit
from detkit.engine.images import write_training_batch
from detkit.engine.train import train
from detkit.errors import DataError
from detkit.tasks.base import task_of


def damage(path: Path, how: str) -> None:
    """Make a file whose head is sound but whose pixels are not."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[60:80] = bytes(20)
    path.write_bytes(content)


@pytest.fixture
def damaged(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A YOLO data set whose third image is damaged."""
    suffix, how = request.param
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}{suffix}")
            (tmp_path / "labels" / split / f"{index}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    damage(tmp_path / f"images/train/2{suffix}", how)
    return tmp_path


KINDS = [(".bmp", "cut"), (".png", "overwritten"), (".tif", "cut")]


@pytest.mark.parametrize("damaged", KINDS, indirect=True)
@pytest.mark.parametrize("augmented", [False, True])
def test_an_unreadable_image_among_the_first_is_named(damaged: Path, augmented: bool, tmp_path: Path) -> None:
    dataset, fit = Yolo(str(damaged), "train"), Fit((32, 32))
    augment = Augment([{"name": "flip"}], fit) if augmented else None
    loader, _ = training_loader(dataset, fit, augment, batch_size=2, workers=0, seed=0)
    from detkit.registry import heads

    task = task_of(heads.get("ssd"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"images/train/2\.\w+' .*Set data\.broken to 'skip'"):
        write_training_batch(loader.dataset, task, tmp_path / "batch.jpg", dataset.classes)
    assert not (tmp_path / "batch.jpg").exists()


@pytest.mark.parametrize("damaged", KINDS[:2], indirect=True)
def test_a_training_stops_with_that_error_and_goes_on_without_the_image(damaged: Path, tiny: Any) -> None:
    def options(broken: str) -> list[str]:
        return ["--data", f"{{name: yolo, root: '{damaged}', broken: {broken}}}", "--train.epochs", "1"]

    with pytest.raises(DataError, match=r"images/train/2\.\w+' .*Set data\.broken to 'skip'"):
        train(tiny(*options("fail")))
    assert train(tiny(*options("skip"))) is not None
