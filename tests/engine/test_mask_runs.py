"""A head that predicts masks, trained and evaluated; its networks' part is made up, so that the target is found."""

import csv
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

from detkit.data.formats.shapes import Shapes
from detkit.engine.evaluate import evaluate
from detkit.engine.images import write_training_batch
from detkit.engine.train import train
from detkit.heads.ssd import SSD
from detkit.inference.images import infer
from detkit.inference.predictor import Predictor
from detkit.model import build_model
from detkit.structures import ClassList, Detections, Meta, Sample, Target
from detkit.tasks.detection.task import Detect
from detkit.tasks.drawing import write_image


def patches_of(target: Target, cells: int = 28) -> torch.Tensor:
    """(N, cells, cells): the ground truth, cut to each box."""
    patches = [torch.zeros(0, cells, cells)]
    for (left, top, right, bottom), mask in zip(target.boxes.round().int().tolist(), target.masks):
        part = mask[top : max(bottom, top + 1), left : max(right, left + 1)]
        patches.append(F.interpolate(part[None, None].float(), (cells, cells), mode="bilinear")[0])
    return torch.cat(patches)


@pytest.fixture
def truthful(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes SSD a head with masks that answers with given targets, in turn; truthful(targets, patches=None)."""

    def make(targets: list[Target], patches: Any = patches_of) -> None:
        answers = cycle(targets)

        def decode(self: SSD, outputs: Any, options: Any = None) -> list[Detections]:
            return [
                Detections(target.boxes, torch.ones(len(target)), target.labels, mask_patches=patches(target))
                for _, target in zip(outputs.sizes, answers)
            ]

        monkeypatch.setattr(SSD, "needs", frozenset({"boxes", "labels", "masks"}))
        monkeypatch.setattr(SSD, "decode", decode)

    return make


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_evaluation_scores_masks_in_the_source(tiny: Any, truthful: Any, resize: str) -> None:
    dataset = Shapes("val", val_count=6, size=150, masks=True)
    model = build_model(tiny("--input.resize", resize, "--input.size", "[128, 160]"), dataset.classes)
    truthful([model.fit(dataset[index]).target for index in range(6)])
    found = evaluate(model, dataset, batch_size=4, workers=0)
    assert found.scores.masks is not None
    assert found.scores.coco["mAP"] > 0.99
    assert found.scores.masks["mAP50"] > 0.99
    assert found.scores.masks["mAP"] > 0.7
    assert found.scores.decisive is found.scores.masks
    records = [record for record in found.results if record["image_id"] == 0]
    target = dataset.target(0).masks.numpy()
    assert len(records) == len(target)
    for record, mask in zip(records, target):
        pixels = coco_mask.decode(record["segmentation"]).astype(bool)
        assert (pixels & mask).sum() > 0.75 * (pixels | mask).sum()


def test_a_run_reports_masks_and_is_judged_by_them(
    tiny: Any, truthful: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny("--train.validate_every", "2")
    dataset = Shapes("val", val_count=6, size=64, masks=True)
    model = build_model(experiment, dataset.classes)
    # All boxes are right, and no mask is.
    truthful([model.fit(dataset[index]).target for index in range(6)], lambda target: torch.zeros(len(target), 28, 28))
    folder = train(experiment)
    rows = list(csv.DictReader(folder.metrics.open()))
    assert (rows[0]["mask_mAP"], rows[0]["mask_mAP50"]) == ("", "")
    assert (float(rows[1]["mask_mAP"]), float(rows[1]["mask_mAP50"])) == (0, 0)
    assert float(rows[1]["mAP"]) > 0.9
    assert folder.load_state()["progress"]["best_score"] == 0
    assert "mask mAP 0.000  mask mAP50 0.000  best" in capsys.readouterr().out


def test_images_show_masks_also_where_they_are_enlarged(tmp_path: Path) -> None:
    """A black image of 40 x 40 is shown eight times as large."""
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 10:30, 15:25] = True
    target = Target(torch.tensor([[5.0, 5.0, 35.0, 35.0]]), torch.tensor([0]), masks=mask)
    sample = Sample(np.zeros((40, 40, 3), np.uint8), target, Meta(0, "black", (40, 40)))

    class Reader:
        dataset = (sample,)

        def __getitem__(self, key: tuple[int, int]) -> Any:
            from detkit.data.transforms import Fit

            return Fit((40, 40))(sample)

    write_training_batch(Reader(), Detect(), tmp_path / "batch.png", ClassList.from_names(["cat"]))
    image = np.asarray(Image.open(tmp_path / "batch.png"))[2:322, 2:322]
    assert image.shape == (320, 320, 3)
    # Away from lines and label: inside of the mask, and inside of the box but outside of the mask.
    assert image[100:220, 130:190, 0].min() > 60
    assert image[100:220, 60:110].max() == 0


def test_infer_writes_masks(tiny: Any, truthful: Any, tmp_path: Path) -> None:
    dataset = Shapes("val", val_count=1, size=150, masks=True)
    model = build_model(tiny(), dataset.classes)
    truthful([model.fit(dataset[0]).target])
    write_image(tmp_path / "7.png", dataset[0].image)
    infer(Predictor(model, "cpu"), str(tmp_path / "7.png"), tmp_path / "out")
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    target = dataset.target(0).masks.numpy()
    assert len(records) == len(target) > 0
    for record, mask in zip(records, target):
        assert record["image_id"] == 7
        pixels = coco_mask.decode(record["segmentation"]).astype(bool)
        assert (pixels & mask).sum() > 0.75 * (pixels | mask).sum()
    assert (tmp_path / "out" / "images" / "7.jpg").is_file()
