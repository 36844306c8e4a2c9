"""detkit's RetinaNet against torchvision's own, with random weights and a real photograph."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision_reference import as_tensor, calibrate, counterparts, fit_norms, photograph

from detkit.config import InputOptions
from detkit.errors import CheckpointError
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model, load_model, load_tensors
from detkit.published.retinanet import convert_retinanet
from detkit.structures import ClassList, Target

SHORT, LONG = 192, 320
CLASSES = 7
NAMES = ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]


@pytest.fixture(scope="module", params=NAMES)
def reference(request: pytest.FixtureRequest) -> nn.Module:
    """Torchvision's model with random weights whose scores are spread out; on small images, to be fast."""
    torch.manual_seed(0)
    model = get_model(
        request.param, weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SHORT, max_size=LONG
    )
    with torch.no_grad():
        fit_norms(model)
        for head in (model.head.classification_head, model.head.regression_head):
            for layer in head.conv:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
                nn.init.normal_(layer[1].bias if isinstance(layer[1], nn.GroupNorm) else layer[0].bias, std=0.1)
        calibrate(
            model,
            {model.head.classification_head.cls_logits: (1.0, -3.0), model.head.regression_head.bbox_reg: (0.3, 0.0)},
        )
    return model


def converted(reference: nn.Module) -> Model:
    tensors, experiment, classes = convert_retinanet(reference.state_dict())
    model = build_model(replace(experiment, input=InputOptions((SHORT, LONG), "short_side")), classes)
    load_tensors(model, tensors, "torchvision")
    return model.eval()


@pytest.mark.parametrize("crop", [(400, 512), (300, 180), (97, 401)])
def test_same_detections(reference: nn.Module, crop: tuple[int, int]) -> None:
    image = photograph()[: crop[0], : crop[1]]
    with torch.no_grad():
        expected = reference([as_tensor(image)])[0]
    found = Predictor(converted(reference), "cpu").predict(image, conf=0.05)
    assert len(found) == len(expected["scores"]) == 300
    assert expected["scores"].std() > 1e-2
    assert expected["labels"].unique().numel() >= 4
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-3)
    # Of a user's own model class 0 is a class like any other.
    counterpart = counterparts(found, {**expected, "labels": expected["labels"] + 1})
    torch.testing.assert_close(found.boxes, expected["boxes"][counterpart], rtol=0, atol=1e-2)


@pytest.mark.parametrize("targets", ["full", "half", "empty"])
def test_same_losses(reference: nn.Module, targets: str) -> None:
    """But for half of the images without objects, which torchvision divides by 1 each and not by the positives."""
    image = as_tensor(photograph()[:192, :256])
    boxes = torch.tensor([[20.0, 30, 120, 180], [100, 90, 250, 180], [5, 5, 60, 50]])
    labels = torch.tensor([2, 0, 5])
    target, nothing = Target(boxes, labels), Target.empty()
    batch = {"full": [target], "half": [target, nothing], "empty": [nothing, nothing]}[targets]
    # In training mode torchvision loses batch norm's running values; only the model's own switch is turned.
    reference.training = True
    try:
        with torch.no_grad():
            theirs = reference([image] * len(batch), [{"boxes": one.boxes, "labels": one.labels} for one in batch])
    finally:
        reference.training = False
    model = converted(reference)
    with torch.no_grad():
        outputs = model(torch.stack([image] * len(batch)), ((192, 256),) * len(batch))
        mine = model.head.loss(outputs, tuple(batch))
    if targets == "half":
        with torch.no_grad():
            alone = model.head.loss(model(image[None], ((192, 256),)), (target,))
        torch.testing.assert_close(mine["box"], 2 * theirs["bbox_regression"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine["class"], alone["class"], rtol=0.1, atol=0)
        assert theirs["classification"] > 3 * mine["class"]
        return
    if targets == "empty":
        assert theirs["classification"] > 1
        assert mine["box"] == theirs["bbox_regression"] == 0
        torch.testing.assert_close(mine["class"], torch.tensor(1.0))
        return
    for name, value in (("class", theirs["classification"]), ("box", theirs["bbox_regression"])):
        assert value > 0
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)


def test_files_under_the_older_names_load(reference: nn.Module, tmp_path: Path) -> None:
    """Torchvision's published file is older than its code."""
    state = reference.state_dict()
    if "head.regression_head.conv.0.1.weight" in state:
        pytest.skip("the second version was published under the names of today")
    old = {}
    for name, tensor in state.items():
        for layer in range(4):
            name = name.replace(f"_head.conv.{layer}.0.", f"_head.conv.old{2 * layer}.")
            name = name.replace(f"_blocks.{layer}.0.", f"_blocks.{layer}.")
        if not name.endswith("num_batches_tracked"):
            old[name.replace("old", "")] = tensor
    assert "head.regression_head.conv.6.weight" in old
    assert "backbone.fpn.inner_blocks.2.bias" in old
    torch.save(old, tmp_path / "old.pth")
    model = load_model(tmp_path / "old.pth")
    assert model.backbone.bn1.eps == 1e-5  # type: ignore[union-attr]
    tensors = model.state_dict()
    pairs = {
        "head.class_tower.3.0.weight": "head.classification_head.conv.3.0.weight",
        "head.box_tower.1.0.bias": "head.regression_head.conv.1.0.bias",
        "neck.layer_blocks.2.0.bias": "backbone.fpn.layer_blocks.2.0.bias",
        "neck.extra_blocks.1.0.weight": "backbone.fpn.extra_blocks.p7.weight",
    }
    for mine, theirs in pairs.items():
        assert torch.equal(tensors[mine], state[theirs]), mine


def test_coco_classes_and_unknown_tensors(tmp_path: Path) -> None:
    state = retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    tensors, _, classes = convert_retinanet(state)
    assert isinstance(classes, ClassList)
    assert classes.names[0] == "person"
    assert len(classes) == 90
    row = 91 * 4 + 17  # of the fifth anchor, torchvision's number 17: cat
    mine = tensors["head.class_predictor.weight"][90 * 4 + classes.names.index("cat")]
    assert torch.equal(mine, state["head.classification_head.cls_logits.weight"][row])
    with pytest.raises(CheckpointError, match=r"'head\.extra' is not a tensor of torchvision's"):
        convert_retinanet({**state, "head.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"it lacks head\.classification_head\.cls_logits\.bias"):
        convert_retinanet({k: v for k, v in state.items() if k != "head.classification_head.cls_logits.bias"})
    del state["backbone.fpn.extra_blocks.p6.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'neck\.extra_blocks\.0\.0\.weight'"):
        load_model(tmp_path / "cut.pth")
