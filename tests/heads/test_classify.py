"""The classifier head: its losses by hand and by torch, padding, textbook networks, torchvision's complete ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models
from zoo_cases import zoo_cases

import detkit
from detkit.errors import CheckpointError, ConfigError
from detkit.heads.classify import Classify
from detkit.model import load_model
from detkit.registry import heads
from detkit.structures import Inputs, Target

WHOLE = Inputs((64, 64), ((64, 64),) * 2)


def target(*labels: int) -> Target:
    return replace(Target.empty(), image_labels=torch.tensor(labels, dtype=torch.int64))


def built(**options: object) -> Classify:
    head = heads.build({"name": "classify", **options}, "head", channels=(6, 8), strides=(8, 16), num_classes=3)
    assert isinstance(head, Classify)
    return head


def maps(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, 8, 8, generator=generator), torch.randn(2, 8, 4, 4, generator=generator)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class_is_softmax_cross_entropy(smoothing: float) -> None:
    head = built(label_smoothing=smoothing)
    outputs = head(maps(), WHOLE)
    logits = head.predictor(maps()[1].mean((2, 3)))
    spread = F.one_hot(torch.tensor([2, 0]), 3) * (1 - smoothing) + smoothing / 3
    expected = -(spread * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(head.loss(outputs, (target(2), target(0)))["class"], expected)
    torch.testing.assert_close(head.decode(outputs)[1].scores, logits[1].softmax(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_any_number_of_classes_is_binary_cross_entropy(smoothing: float) -> None:
    head = built(multi_label=True, label_smoothing=smoothing)
    outputs = head(maps(), WHOLE)
    truth = torch.tensor([[1.0, 0, 1], [0, 0, 0]]) * (1 - smoothing) + smoothing / 2
    probability = head.predictor(maps()[1].mean((2, 3))).sigmoid()
    expected = -(truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
    torch.testing.assert_close(head.loss(outputs, (target(0, 2), target()))["class"], expected)
    torch.testing.assert_close(head.decode(outputs)[0].scores, probability[0])


def test_an_image_without_class_takes_no_part_where_there_must_be_one() -> None:
    head = built()
    outputs = head(maps(), WHOLE)
    alone = F.cross_entropy(outputs.logits[:1], torch.tensor([1]))
    torch.testing.assert_close(head.loss(outputs, (target(1), target()))["class"], alone)
    with pytest.raises(ValueError, match="several classes"):
        head.loss(outputs, (target(1), target(0, 1)))


def test_auxiliary_classifiers_add_their_weighted_losses() -> None:
    head = built(auxiliary=[0], auxiliary_weight=0.3).eval()
    outputs = head(maps(), WHOLE)
    losses = head.loss(outputs, (target(1), target(2)))
    torch.testing.assert_close(losses["auxiliary"], 0.3 * F.cross_entropy(outputs.auxiliary[0], torch.tensor([1, 2])))
    torch.testing.assert_close(losses["class"], F.cross_entropy(outputs.logits, torch.tensor([1, 2])))


@pytest.mark.parametrize("pool", [1, 3])
def test_padding_has_no_influence(pool: int) -> None:
    head = built(pool=pool).eval()
    inputs = Inputs((64, 64), ((48, 32), (64, 64)))
    padded = maps()
    other = [level.clone() for level in padded]
    other[1][0, :, 3:] = 99.0
    other[1][0, :, :, 2:] = -99.0
    torch.testing.assert_close(head(padded, inputs).logits, head(other, inputs).logits)
    inner = head([level[:1, :, :3, :2] for level in padded], Inputs((48, 32), ((48, 32),)))
    torch.testing.assert_close(head(padded, inputs).logits[:1], inner.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary": [1]}, "0 to 0 can be given"),
        ({"widths": [0]}, "positive numbers"),
        ({"dropout": 1.0}, "head.dropout"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**options)


def test_one_class_alone_is_refused_unless_it_may_be_absent() -> None:
    options = {"channels": (8,), "strides": (16,), "num_classes": 1}
    with pytest.raises(ConfigError, match="multi_label"):
        heads.build({"name": "classify"}, "head", **options)
    heads.build({"name": "classify", "multi_label": True}, "head", **options)


NETWORKS: dict[str, dict[str, Any]] = {"vgg11_bn": {}, "resnet18": {}, **zoo_cases("CLASSIFIERS")}


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvisions_classifiers_run_unchanged(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = models.get_model(name, num_classes=1000 if name == "resnet18" else 7, **NETWORKS[name])
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(theirs.state_dict(), tmp_path / "network.pth")
    model = load_model(tmp_path / "network.pth")
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        ours = model(images, ((224, 224),) * 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        normalised = (images - mean) / std
        expected = theirs.eval()(normalised)
        torch.testing.assert_close(ours.logits, expected, rtol=1e-4, atol=1e-5)
        if name == "googlenet":
            auxiliary = [theirs.aux1, theirs.aux2]
            features = model.maps(images)
            for number, network in enumerate(auxiliary):
                torch.testing.assert_close(ours.auxiliary[number], network(features[number]), rtol=1e-4, atol=1e-5)


def test_imagenets_classes_have_names(tmp_path: Path) -> None:
    torch.save(models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    predictor = detkit.load(tmp_path / "resnet18.pth", "cpu")
    assert predictor.class_names[0] == "tench"
    assert len(predictor.class_names) == 1000


def test_an_unknown_classifier_is_refused(tmp_path: Path) -> None:
    torch.save(models.mobilenet_v2(num_classes=3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="none of"):
        load_model(tmp_path / "other.pth")
    torch.save(models.resnext50_32x4d(num_classes=3).state_dict(), tmp_path / "resnext.pth")
    with pytest.raises(CheckpointError, match="classifiers that detkit supports: alexnet"):
        load_model(tmp_path / "resnext.pth")
