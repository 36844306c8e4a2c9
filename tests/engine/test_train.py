"""Training end to end on made-up images."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from detkit.data.formats.shapes import Shapes
from detkit.engine.ema import AveragedModel
from detkit.engine.evaluate import evaluate
from detkit.engine.train import LossNotFiniteError, train
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.heads.ssd import SSD
from detkit.model import build_model, load_model, read_checkpoint
from detkit.structures import ClassList, Inputs, Target


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)[0]


def test_a_run_leaves_everything_behind(tiny: Any) -> None:
    folder = train(tiny())
    names = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/training_state.pt",
        "images/training_batch.jpg",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert sum(name.startswith("images/val_") for name in names) == 6
    rows = list(csv.DictReader(folder.metrics.open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"lr", "seconds", "train_class", "train_box", "val_class", "val_box", "mAP", "mAP50"} <= set(rows[0])
    assert all(float(row["val_class"]) > 0 for row in rows)
    assert train(tiny()).path.name == "tiny2"


def test_the_same_seed_gives_the_same_weights_and_workers_change_nothing(tiny: Any) -> None:
    first, second = train(tiny("--train.epochs", "1")), train(tiny("--train.epochs", "1", "--train.workers", "2"))
    for name, tensor in weights(first.last).items():
        assert torch.equal(tensor, weights(second.last)[name]), name


MIXED_YOLOX = [
    *("--backbone", "{name: csp_darknet, width: 0.0625, depth: 0.1}"),
    *("--head", "{name: yolox, width: 8, l1_weight: 1.0}"),
    *("--augment", "[{name: mosaic}]"),
    *("--train.unmixed_epochs", "2"),
]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train.optimizer", "adamw", "--train.ema_decay", "0.9"],
        ["--augment", "[{name: mosaic, rotation: 10}, {name: mixup}]", "--input.multi_scale", "[1, 1.5]"],
        [*MIXED_YOLOX, "--train.unmixed_epochs", "3"],
    ],
    ids=["plain", "averaged", "mixed", "unmixed"],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    tiny: Any, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny("--train.epochs", "4", *options))
    # The same run, interrupted in its third epoch.
    from detkit.engine import train as engine

    calls = []
    unbroken = engine._train_epoch

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unbroken(*arguments)

    monkeypatch.setattr(engine, "_train_epoch", interrupted)
    experiment = tiny("--train.epochs", "4", "--name", "broken", *options)
    with pytest.raises(KeyboardInterrupt):
        train(experiment)
    monkeypatch.setattr(engine, "_train_epoch", unbroken)
    resumed = train(experiment, str(whole.path.with_name("broken")))
    for name, tensor in weights(whole.last).items():
        assert torch.equal(tensor, weights(resumed.last)[name]), name
    assert [row["epoch"] for row in csv.DictReader(resumed.metrics.open())] == ["1", "2", "3", "4"]


def test_losses_of_unmixed_images_count_in_the_last_epochs_only(tiny: Any) -> None:
    def column(name: str, *overrides: str) -> list[float]:
        rows = csv.DictReader(train(tiny(*MIXED_YOLOX, "--train.epochs", "3", *overrides)).metrics.open())
        return [float(row[name]) for row in rows]

    first, *last = column("train_l1")
    assert first == 0
    assert min(last) > 0
    assert min(column("val_l1", "--train.unmixed_epochs", "0")) > 0  # validation images are never mixed
    assert min(column("train_l1", "--augment", "[{name: flip}]", "--train.unmixed_epochs", "0")) > 0
    *mixed, plain = column("train_l1", "--train.plain_epochs", "1", "--train.unmixed_epochs", "0")
    assert mixed == [0, 0]
    assert plain > 0


def test_a_loss_of_unmixed_images_moves_no_weight_before(tiny: Any) -> None:
    options = (*MIXED_YOLOX, "--train.epochs", "1", "--train.unmixed_epochs", "0")
    with_l1, without = train(tiny(*options)), train(tiny(*options, "--head.l1_weight", "0"))
    for name, tensor in weights(with_l1.last).items():
        assert torch.equal(tensor, weights(without.last)[name]), name


def test_nothing_to_resume_is_said(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tiny(), str(tmp_path))


def test_batches_of_a_step_share_it_equally() -> None:
    from detkit.engine.train import group_size

    assert [group_size(number, 7, 3) for number in range(1, 8)] == [3, 3, 3, 3, 3, 3, 1]
    assert [group_size(number, 4, 1) for number in range(1, 5)] == [1, 1, 1, 1]


def test_accumulated_batches_make_one_step(tiny: Any) -> None:
    folder = train(tiny("--train.epochs", "1", "--train.accumulate", "2"))
    # 12 images in batches of 2 are 6 batches and 3 steps of 4 images.
    assert next(csv.DictReader(folder.metrics.open()))["step"] == "3"


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SSD.loss

    def broken(self: SSD, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        losses = honest(self, outputs, targets)
        return {**losses, "box": losses["box"] * float("nan")}

    monkeypatch.setattr(SSD, "loss", broken)
    with pytest.raises(LossNotFiniteError, match=r"loss 'box' is nan at step 0, on the images .*shapes.*train\.lr"):
        train(tiny())


def test_early_stopping(tiny: Any) -> None:
    folder = train(tiny("--train.epochs", "30", "--train.lr", "1e-12", "--train.patience", "2"))
    assert len(list(csv.DictReader(folder.metrics.open()))) < 30


def test_clipping_precision_and_other_schedules_run(tiny: Any) -> None:
    folder = train(
        tiny(
            *("--train.clip_norm", "0.1"),
            *("--train.precision", "bf16-mixed"),
            *("--train.optimizer", "adam"),
            *("--train.schedule", "exponential"),
            *("--train.plain_epochs", "1"),
        )
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder.last).values() if tensor.is_floating_point())


def test_frozen_stages_do_not_change(tiny: Any) -> None:
    """Frozen means weights and batch-norm statistics, through a whole run."""
    experiment = tiny("--train.freeze", "2")
    torch.manual_seed(0)
    folder = train(experiment)
    again = train(tiny("--train.freeze", "2", "--train.epochs", "1", "--train.lr", "0.1"))
    one, other = load_model(folder.last), load_model(again.last)
    for stage_one, stage_other in zip(one.backbone.stages()[:2], other.backbone.stages()[:2]):
        for name, tensor in stage_one.state_dict().items():
            assert torch.equal(tensor, stage_other.state_dict()[name]), name
    last_one, last_other = one.backbone.stages()[-1], other.backbone.stages()[-1]
    assert any(not torch.equal(a, b) for a, b in zip(last_one.parameters(), last_other.parameters()))


def test_parameter_groups_spare_norms_and_biases(tiny: Any) -> None:
    model = build_model(tiny(), ClassList.from_names(["a"]))
    groups = model.parameter_groups(lr=0.1, backbone_lr_factor=0.5, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.05 if names[id(parameter)].startswith("backbone.") else 0.1)
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)


def test_the_average_follows_its_equation() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = AveragedModel(model, 0.9)
    expected = model[0].weight.detach().clone()
    for update in range(30):
        with torch.no_grad():
            model[0].weight += 1.0
            model[1].num_batches_tracked += 1
        average.update(model)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.model[0].weight.data, expected)
    assert average.model[1].num_batches_tracked == 30


def test_starting_from_a_checkpoint(tiny: Any, tmp_path: Path) -> None:
    first = train(tiny("--train.epochs", "1"))
    second = train(tiny("--train.epochs", "1", "--train.lr", "1e-12", "--weights", str(first.last)))
    mine, theirs = weights(second.last), weights(first.last)
    for name, tensor in load_model(second.last).named_parameters():
        assert torch.allclose(mine[name], theirs[name], atol=1e-6), (name, tensor.shape)
    with pytest.raises(ConfigError, match=r"'weights_parts' names 'hed'.*Did you mean 'head'"):
        train(tiny("--weights", str(first.last), "--weights_parts", "[hed]"))


def test_evaluation_gives_losses_and_scores_of_perfect_detections(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ground truth itself, put through the network's frame and back, scores 1."""
    from detkit.structures import Detections

    dataset = Shapes("val", val_count=6, size=80)
    model = build_model(tiny("--input.resize", "letterbox", "--input.size", "[64, 96]"), dataset.classes)
    targets = iter([model.fit(dataset[index]).target for index in range(6)])
    monkeypatch.setattr(
        SSD,
        "decode",
        lambda self, outputs: [
            Detections(t.boxes, torch.ones(len(t)), t.labels) for t in (next(targets) for _ in outputs.sizes)
        ],
    )
    found = evaluate(model, dataset, batch_size=4, workers=0)
    assert found.scores.coco["mAP"] == pytest.approx(1.0)
    assert set(found.losses) == {"class", "box"}
    assert len(found.results) == found.scores.targets


def test_splits_must_differ_and_agree(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="both name the split 'val'"):
        train(tiny("--data.train", "val"))
    with pytest.raises((ConfigError, DataError), match="tran"):
        train(tiny("--data.train", "tran"))


def test_a_missing_field_is_found_before_training(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SSD, "needs", frozenset({"boxes", "labels", "keypoints"}))
    with pytest.raises(DataError, match="needs keypoints"):
        train(tiny())


def test_a_split_without_objects_is_refused_before_training(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shapes, "target", lambda self, index: Target.empty())
    with pytest.raises(DataError, match="'train' has an object that counts"):
        train(tiny())


def test_a_broken_image_in_a_worker_keeps_its_message(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Shapes, index: int) -> Any:
        raise DataError("The image 'x.png' is cut off.")

    monkeypatch.setattr("detkit.engine.train.write_training_batch", lambda *arguments: None)
    monkeypatch.setattr(Shapes, "__getitem__", broken)
    with pytest.raises(DataError, match=r"^The image 'x\.png' is cut off\.$"):
        train(tiny("--train.workers", "1"))


def test_a_run_cannot_go_on_with_other_options(tiny: Any) -> None:
    folder = train(tiny("--train.epochs", "1"))
    with pytest.raises(ConfigError, match=r"was started with train\.lr = 0\.01 and cannot continue with 0\.5"):
        train(tiny("--train.epochs", "2", "--train.lr", "0.5"), str(folder.path))
    longer = train(tiny("--train.epochs", "2"), str(folder.path))
    assert "epochs: 2" in longer.config.read_text()


def test_classes_that_changed_are_found_on_resume(tiny: Any) -> None:
    folder = train(tiny("--train.epochs", "1"))
    model = load_model(folder.last)
    model.classes = ClassList.from_names(model.classes.names[::-1])
    model.save(folder.last)
    with pytest.raises(CheckpointError, match="the same names in another order"):
        train(tiny("--train.epochs", "2"), str(folder.path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.device", "mps"], r"'train\.device' mps .* cannot be used"),
        (["--train.device", "cpu", "--train.precision", "16-mixed"], "16-mixed needs a GPU"),
        (["--train.patience", "0"], r"'train\.patience' must be at least 1"),
        (["--train.seed", "-1"], r"'train\.seed' must not be negative"),
        (["--augment", "[{name: flip, horizontal: 2}]"], r"'augment\[0\]' cannot be built"),
        (["--head.nms_threshold", "1.5"], "iou threshold must lie in 0..1"),
        (["--input.size", "[0, 64]"], r"'input\.size'"),
    ],
)
def test_options_out_of_range_are_refused_at_the_start(tiny: Any, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny(*options))


def test_a_head_sees_the_targets_in_training_only(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int | None]] = []
    forward = SSD.forward

    def watched(self: SSD, features: list[torch.Tensor], inputs: Inputs) -> Any:
        seen.append((self.training, None if inputs.targets is None else len(inputs.targets)))
        return forward(self, features, inputs)

    monkeypatch.setattr(SSD, "forward", watched)
    train(tiny("--train.epochs", "1"))
    assert {count for training, count in seen if training} == {4}
    assert {count for training, count in seen if not training} == {None}
