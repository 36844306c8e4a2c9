"""detkit's dilated FCN against torchvision's own, with random weights and a real photograph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model
from torchvision_reference import as_tensor, calibrate, fit_norms, photograph

from detkit.config import InputOptions, load_experiment
from detkit.errors import CheckpointError, ConfigError
from detkit.heads.parts.semantic import stacked_target
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model, load_model, load_tensors
from detkit.published.fcn import convert_fcn
from detkit.registry import backbones
from detkit.structures import ClassList, Target

CLASSES = 7
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Features(nn.Module):
    """Torchvision's backbone gives a dict; `fit_norms` and `calibrate` want networks of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.backbone = model, model.backbone

    def forward(self, images: list[torch.Tensor]) -> Any:
        return self.model(torch.stack(images))


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """Torchvision's model with random weights whose logits are spread out."""
    torch.manual_seed(0)
    model = get_model("fcn_resnet50", weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    with torch.no_grad():
        fit_norms(Features(model))
        for head in (model.classifier, model.aux_classifier):
            nn.init.normal_(head[1].running_mean, std=0.1)
            nn.init.uniform_(head[1].running_var, 0.5, 2.0)
        calibrate(Features(model), {model.classifier[4]: (2.0, 0.0), model.aux_classifier[4]: (2.0, 0.0)})
    return model.eval()


def converted(reference: nn.Module) -> Model:
    tensors, experiment, classes = convert_fcn(reference.state_dict())
    # Small, to be fast; a multiple of 32, to which a batch would be padded otherwise.
    model = build_model(replace(experiment, input=InputOptions((160, 640), "short_side")), classes)
    load_tensors(model, tensors, "torchvision")
    return model.eval()


@pytest.mark.parametrize("size", [(160, 224), (97, 131)])
def test_same_logits_of_both_classifiers(reference: nn.Module, size: tuple[int, int]) -> None:
    image = as_tensor(photograph()[: size[0], : size[1]])
    model = converted(reference)
    with torch.no_grad():
        expected = reference(((image - MEAN) / STD)[None])
        outputs = model(image[None], (size,))
        assert outputs.features is not None
        auxiliary = F.interpolate(model.head.auxiliary(outputs.features), size, mode="bilinear")
    assert expected["out"].std() > 0.5
    assert expected["out"].argmax(1).unique().numel() >= 4
    torch.testing.assert_close(outputs.logits, expected["out"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(auxiliary, expected["aux"], rtol=1e-3, atol=1e-3)


def test_same_losses(reference: nn.Module) -> None:
    """Torchvision's reference training: cross-entropy of both, the auxiliary one by half, 255 ignored."""
    size = (96, 128)
    image = as_tensor(photograph()[: size[0], : size[1]])
    semantic = torch.randint(0, CLASSES, size, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    semantic[:20] = 255
    target = replace(Target.empty(), semantic=semantic)
    model = converted(reference)
    with torch.no_grad():
        expected = reference(((image - MEAN) / STD)[None])
        found = model.head.loss(model(image[None], (size,)), (target,))
        theirs = {
            name: F.cross_entropy(logits, semantic[None].long(), ignore_index=255) for name, logits in expected.items()
        }
    torch.testing.assert_close(found["pixel"], theirs["out"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["auxiliary"], 0.5 * theirs["aux"], rtol=1e-3, atol=1e-4)
    assert stacked_target((target,), (size,), expected["out"]).eq(255).float().mean() == 20 / 96


def test_same_labels_of_an_image(reference: nn.Module) -> None:
    image = photograph()[:160, :224]
    with torch.no_grad():
        expected = reference(((as_tensor(image) - MEAN) / STD)[None])["out"][0].argmax(0)
    found = Predictor(converted(reference), "cpu", precision="fp32").predict(image)
    assert (found.labels == expected).float().mean() > 0.999
    assert found.class_names[0] == "class 0"


def test_published_files_load(reference: nn.Module, tmp_path: Path) -> None:
    torch.save(reference.state_dict(), tmp_path / "fcn_resnet50.pth")
    model = load_model(tmp_path / "fcn_resnet50.pth")
    assert model.backbone.strides == (8, 8)
    assert torch.equal(model.state_dict()["head.classifier.4.weight"], reference.state_dict()["classifier.4.weight"])
    without = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("aux_")}
    torch.save(without, tmp_path / "without.pth")
    assert load_model(tmp_path / "without.pth").head.auxiliary is None


def test_the_published_classes_are_vocs_and_background_and_101_layers_are_known() -> None:
    with torch.device("meta"):
        state = get_model("fcn_resnet101", weights=None, weights_backbone=None, aux_loss=True).state_dict()
    tensors, experiment, classes = convert_fcn(state)
    assert experiment.backbone["name"] == "resnet101"
    assert len(classes) == 21
    assert [classes.names[label] for label in (0, 1, 12, 15, 20)] == [
        "background",
        "aeroplane",
        "dog",
        "person",
        "tvmonitor",
    ]
    with torch.device("meta"):
        model = build_model(experiment, classes)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in tensors.items()}


def test_other_state_dicts_are_refused(reference: nn.Module) -> None:
    state = reference.state_dict()
    with pytest.raises(CheckpointError, match=r"'head\.x' is not a tensor of torchvision's fcn_resnet50"):
        convert_fcn({**state, "head.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lacks classifier\.4\.bias"):
        convert_fcn({k: v for k, v in state.items() if k != "classifier.4.bias"})
    with pytest.raises(CheckpointError, match=r"layer3 has 5 blocks"):
        convert_fcn({k: v for k, v in state.items() if ".layer3.5." not in k})


def test_the_config_trains_the_same_model(reference: nn.Module) -> None:
    _, experiment, _ = convert_fcn(reference.state_dict())
    path = Path(__file__).parents[2] / "configs" / "fcn_resnet50.yaml"
    config = load_experiment([str(path)], ["--data.root", "/nowhere"])
    classes = ClassList.from_names(["a", "b"])
    mine = build_model(experiment, classes)
    trained = build_model(config, classes, load_weights=False)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in trained.state_dict().items()}
    assert mine.backbone.strides == trained.backbone.strides


def test_small_resnets_have_no_dilated_form() -> None:
    with pytest.raises(ConfigError, match=r"'backbone\.output_stride' is 8, but resnet18 does not support dilation"):
        backbones.build({"name": "resnet18", "output_stride": 8}, "backbone")
    backbone = backbones.build({"name": "resnet50", "levels": [3, 5], "output_stride": 16}, "backbone").eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert backbone.strides == (8, 16)
    assert [tuple(item.shape[2:]) for item in maps] == [(8, 12), (4, 6)]
