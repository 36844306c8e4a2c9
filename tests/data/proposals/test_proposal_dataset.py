"""Proposals on their way from a source through training, evaluation and prediction."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from toys import Grid, RegionHead, grid

import detkit
from detkit.cli import main
from detkit.config import Experiment
from detkit.data.formats.shapes import Shapes
from detkit.data.proposals.dataset import ProposalDataset, build_source, check_needed, with_proposals
from detkit.engine.train import train
from detkit.errors import ConfigError, DataError
from detkit.inference.predictor import Predictor
from detkit.model import build_model, load_model, read_checkpoint
from detkit.registry import heads

Regions = Callable[..., Experiment]


def dataset(count: int = 4, size: int = 64) -> Shapes:
    return Shapes("val", val_count=count, size=size)


def test_samples_carry_proposals_and_everything_else_passes_through(tmp_path: Path) -> None:
    plain = dataset()
    plain.colour = "red"  # type: ignore[attr-defined]
    proposed = ProposalDataset(plain, Grid(), tmp_path)
    assert len(proposed) == 4
    assert torch.equal(proposed[2].proposals, grid(64, 64))
    assert np.array_equal(proposed[2].image, plain[2].image)
    assert torch.equal(proposed[2].target.boxes, plain[2].target.boxes)
    assert torch.equal(proposed.target(1).boxes, plain.target(1).boxes)
    assert proposed.size(1) == (64, 64)
    assert [proposed.image_id(index) for index in range(4)] == [0, 1, 2, 3]
    assert (proposed.classes, proposed.problems, proposed.colour) == (plain.classes, plain.problems, "red")
    assert proposed.fields == plain.fields | {"proposals"}
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = proposed.nothing_like_it
    again = pickle.loads(pickle.dumps(proposed))
    assert torch.equal(again[3].proposals, proposed[3].proposals)


def test_without_options_the_data_set_is_the_same(tmp_path: Path) -> None:
    plain = dataset()
    assert with_proposals(plain, None, "val", "validation") is plain


def test_the_report_counts(toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(6)
    darkest = int(np.median([data[index].image[0, 0, 0] for index in range(6)]))
    without = sum(int(data[index].image[0, 0, 0]) <= darkest for index in range(6))
    assert 0 < without < 6
    options = {"name": "grid", "darkest": darkest, "cache": str(tmp_path)}
    with_proposals(dataset(2), options, "val", "validation")
    capsys.readouterr()
    proposed = with_proposals(data, options, "val", "validation")
    mean = f"mean {16 * (6 - without) / 6:.0f} proposals per image, {without} images without"
    assert capsys.readouterr().out == f"proposals  validation: 4 computed, 2 from the cache, {mean}\n"
    files = sorted(tmp_path.rglob("*.boxes"))
    assert len(files) == 6
    files[0].write_bytes(files[0].read_bytes()[:-3])
    files[1].write_bytes(b"")
    files[2].write_bytes(bytes(100))
    with_proposals(data, options, "val", "validation")
    damaged = "3 damaged files in the cache were computed again"
    assert capsys.readouterr().out == f"proposals  validation: 3 computed, 3 from the cache, {mean}; {damaged}\n"
    assert all(
        torch.equal(proposed[index].proposals, Grid(darkest=darkest)(data[index].image, 0)) for index in range(6)
    )
    with_proposals(data, options, "val", "validation", quiet=True)
    assert capsys.readouterr().out == ""


def test_an_image_that_cannot_be_read_stops_the_computation(toys: None, tmp_path: Path) -> None:
    class Broken(Shapes):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise DataError("The image 'x' is cut off.")
            return super().__getitem__(index)

    proposed = ProposalDataset(Broken("val", val_count=40, size=64), Grid(), tmp_path)
    with pytest.raises(DataError, match="'x' is cut off"):
        proposed.prepare(Console(file=io.StringIO()))


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder.last)[0]


def test_training_with_workers_and_a_resumed_run(
    regions: Regions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(regions("--train.epochs", "3"))
    output = capsys.readouterr().out
    assert "training: 12 computed, 0 from the cache, mean 16 proposals per image, 0 images without\n" in output
    assert "validation: 6 computed" in output
    for inputs in RegionHead.seen:
        assert inputs.proposals is not None
        assert len(inputs.proposals) == len(inputs.sizes)
        assert all(boxes.dtype == torch.float32 and boxes.shape == (16, 4) for boxes in inputs.proposals)
    workers = train(regions("--train.epochs", "3", "--train.workers", "2"))
    assert "training: 0 computed, 12 from the cache" in capsys.readouterr().out
    # The same run, interrupted in its third epoch, goes on with its cache elsewhere.
    from detkit.engine import train as engine

    calls: list[int] = []
    unbroken = engine._train_epoch

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unbroken(*arguments)

    monkeypatch.setattr(engine, "_train_epoch", interrupted)
    experiment = regions("--train.epochs", "3", "--name", "broken")
    with pytest.raises(KeyboardInterrupt):
        train(experiment)
    monkeypatch.setattr(engine, "_train_epoch", unbroken)
    moved = regions("--train.epochs", "3", "--name", "broken", "--proposals.cache", str(whole.path / "other"))
    resumed = train(moved, str(whole.path.with_name("broken")))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(workers)[name]), name
        assert torch.equal(tensor, weights(resumed)[name]), name
    with pytest.raises(ConfigError, match=r"was started with proposals\.side = None and cannot continue with 8"):
        train(regions("--name", "broken", "--proposals.side", "8"), str(whole.path.with_name("broken")))


@pytest.mark.parametrize("options", [["--proposals.darkest", "255"], ["--proposals.copies", "125"]])
def test_no_proposal_at_all_and_two_thousand_flow_through(regions: Regions, options: list[str]) -> None:
    folder = train(regions("--train.epochs", "1", *options))
    counts = {len(boxes) for inputs in RegionHead.seen for boxes in inputs.proposals or ()}
    assert counts == ({0} if "255" in options else {2000})
    found = detkit.load(folder.last, "cpu").predict(dataset()[0].image, conf=0.0)
    assert len(found) == (0 if "255" in options else 200)


def test_mixed_precision_keeps_proposals_exact_and_holds_in_the_loss(regions: Regions, tmp_path: Path) -> None:
    """As bfloat16 a coordinate such as 1,001 becomes 1,000."""
    train(regions("--train.epochs", "1", "--data.size", "301", "--input.size", "[301, 301]", "--augment", "[]",
                  "--train.precision", "bf16-mixed", "--train.device", "cpu"))  # fmt: skip
    for inputs in RegionHead.seen:
        assert inputs.proposals is not None
        assert all(torch.equal(boxes, grid(301, 301)) for boxes in inputs.proposals)
    assert torch.bfloat16 in RegionHead.loss_dtypes


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "short_side"])
def test_a_source_sees_the_image_itself_and_its_boxes_go_with_it(regions: Regions, resize: str, tmp_path: Path) -> None:
    model = build_model(regions("--input.resize", resize, "--input.size", "[96, 160]"), dataset().classes)
    predictor = Predictor(model, "cpu")
    picture = np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = list(predictor.predict_all([picture, tmp_path / "turned.png"], conf=0.0, batch_size=2))
    assert Grid.calls == [(40, 100), (100, 40)]
    (inputs,) = RegionHead.seen
    assert inputs.proposals is not None
    for proposals, source, inner in zip(inputs.proposals, [(40, 100), (100, 40)], inputs.sizes):
        scale = torch.tensor([inner[1] / source[1], inner[0] / source[0]] * 2)
        torch.testing.assert_close(proposals, grid(*source) * scale)
    for detections, size in zip(found, [(40, 100), (100, 40)]):
        expected = sorted(grid(*size).tolist())
        torch.testing.assert_close(
            torch.tensor(sorted(detections.boxes.round().tolist())), torch.tensor(expected), rtol=0, atol=0
        )
    if resize == "short_side":
        assert inputs.sizes == ((64, 160), (160, 64))
        assert inputs.size == (160, 160)


def test_what_the_head_needs_and_what_it_gets_must_agree(regions: Regions, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head 'regions' needs proposals, but the config has none\. .*--proposals"):
        train(regions("--proposals", "null"))
    with pytest.raises(ConfigError, match=r"has 'proposals' \(grid\), but the head 'ssd' does not use them"):
        train(tiny("--proposals", "{name: grid}"))
    model = build_model(tiny(), dataset().classes)
    with pytest.raises(ConfigError, match="'ssd' does not use them"):
        Predictor(model, "cpu", {"name": "grid"})
    with pytest.raises(ConfigError, match="'regions' needs proposals"):
        Predictor(build_model(regions("--proposals", "null"), dataset().classes), "cpu")
    check_needed(None, frozenset({"boxes"}), "ssd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 3}, r"'proposals' needs a 'name'"),
        ({"name": "gird"}, r"no source of proposals named 'gird'\. Did you mean 'grid'"),
        ({"name": "grid", "sid": 3}, r"'proposals\.sid' is not an option .*Did you mean 'side'"),
        ({"name": "grid", "side": "wide"}, r"'proposals\.side'.*whole number.*wide"),
        ({"name": "grid", "cache": 3}, r"'proposals\.cache' must be the path of a folder, but is 3"),
        (
            {"name": "file", "path": "x.json", "cache": "there"},
            r"'proposals\.cache' is 'there', but .* computes nothing",
        ),
    ],
)
def test_mistakes_in_options_are_named(toys: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source(options, "val")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Proposals of both splits of the tiny data in files."""
    for split, count in (("train", 12), ("val", 6)):
        results = [
            {"image_id": image_id, "bbox": [x, y, right - x, bottom - y], "score": 1.0}
            for image_id in range(count)
            for x, y, right, bottom in grid(64, 64).tolist()
        ]
        (tmp_path / f"proposals_{split}.json").write_text(json.dumps(results))
    return tmp_path / "proposals_{split}.json"


def test_files_train_as_the_source_that_wrote_them(regions: Regions, files: Path, tmp_path: Path) -> None:
    computed = train(regions("--train.epochs", "1"))
    read = train(regions("--train.epochs", "1", "--proposals", f"{{name: file, path: '{files}'}}"))
    for name, tensor in weights(computed).items():
        assert torch.equal(tensor, weights(read)[name]), name


def test_evaluation_and_prediction_take_another_source(
    regions: Regions, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(regions("--train.epochs", "1", "--proposals", f"{{name: file, path: '{files}'}}"))
    image = tmp_path / "image.png"
    Image.fromarray(dataset()[0].image).save(image)
    with pytest.raises(ConfigError, match=r"'file' only supports images of a data set.*--proposals"):
        detkit.load(folder.last, "cpu")
    assert len(detkit.load(folder.last, "cpu", {"name": "grid"}).predict(image, conf=0.0)) == 16
    with pytest.raises(ConfigError, match="proposals of new images are not cached"):
        detkit.load(folder.last, "cpu", {"name": "grid", "cache": "there"})
    infer = ["infer", str(folder.last), "--source", str(image), "--output", str(tmp_path / "out"), "--conf", "0"]
    assert main(infer) == 1
    assert "only supports images of a data set" in capsys.readouterr().err
    assert main([*infer, "--proposals", "{name: grid, side: 32}"]) == 0
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 4
    assert main(["eval", str(folder.last), "--train.device", "cpu"]) == 0
    assert "96 proposals from" in capsys.readouterr().out
    moved = tmp_path / "elsewhere.json"
    (tmp_path / "proposals_val.json").rename(moved)
    assert main(["eval", str(folder.last)]) == 1
    assert "There is no file of proposals" in capsys.readouterr().err
    assert main(["eval", str(folder.last), "--proposals.path", str(moved)]) == 0
    assert main(["eval", str(folder.last), "--proposals", f"{{name: grid, cache: {tmp_path / 'new'}}}"]) == 0
    assert "validation: 6 computed" in capsys.readouterr().out
    assert main(["eval", str(folder.last), "--proposals", "null"]) == 1
    assert "needs proposals" in capsys.readouterr().err


def test_a_head_without_proposals_gets_none(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ssd = heads.get("ssd")
    seen: list[Any] = []
    honest = ssd.forward  # type: ignore[attr-defined]

    def forward(self: Any, features: Any, inputs: Any) -> Any:
        seen.append(inputs.proposals)
        return honest(self, features, inputs)

    monkeypatch.setattr(ssd, "forward", forward)
    folder = train(tiny("--train.epochs", "1"))
    assert load_model(folder.last).experiment.proposals is None
    assert set(seen) == {None}
