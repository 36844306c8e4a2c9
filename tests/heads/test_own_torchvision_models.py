"""Torchvision's detectors with a user's own classes, anchors and norms: detkit finds what torchvision finds, and says
what it had to assume."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision_reference import as_tensor, calibrate, counterparts, fit_norms, photograph

import detkit
from detkit.errors import CheckpointError, ConfigError
from detkit.model import load_model
from detkit.published.rcnn import convert_rcnn
from detkit.published.retinanet import convert_retinanet
from detkit.published.ssd import convert_ssd300_vgg16

SIZES = {"min_size": 96, "max_size": 160}
SIZE_OPTION = "input.size=[96, 160]"


def retinanet(classes: int, **options: Any) -> nn.Module:
    """Torchvision's, with random weights whose scores are spread out, class 0's as well."""
    torch.manual_seed(classes)
    given = {"weights": None, "weights_backbone": None, "num_classes": classes, **SIZES, **options}
    model: nn.Module = get_model("retinanet_resnet50_fpn", **given)
    with torch.no_grad():
        fit_norms(model)
        for head in (model.head.classification_head, model.head.regression_head):
            for layer in head.conv:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        calibrate(
            model,
            {model.head.classification_head.cls_logits: (1.0, -3.0), model.head.regression_head.bbox_reg: (0.3, 0.0)},
        )
    return model


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as torchvision's frozen batch norms leave it, which have no counters."""
    return {name: tensor for name, tensor in model.state_dict().items() if "num_batches_tracked" not in name}


def check_same(model: nn.Module, source: str) -> Any:
    image = photograph()[:300, :400]
    with torch.no_grad():
        expected = model.eval()([as_tensor(image)])[0]
    predictor = detkit.load(source, "cpu", precision="fp32")
    found = predictor.predict(image, conf=0.05)
    assert len(found) == len(expected["scores"]) > 50
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-3)
    counterpart = counterparts(found, {**expected, "labels": expected["labels"] + 1})
    torch.testing.assert_close(found.boxes, expected["boxes"][counterpart], rtol=0, atol=1e-2)
    return predictor, found


@pytest.mark.parametrize("classes", [1, 2, 91])
def test_retinanet_finds_every_class(classes: int, tmp_path: Path) -> None:
    """Also the first, for RetinaNet has no background; with norms of 1e-5, as torchvision builds it for a user."""
    model = retinanet(classes)
    torch.save(frozen(model), tmp_path / "own.pt")
    options = f"{SIZE_OPTION}&coco=false" if classes == 91 else SIZE_OPTION
    predictor, found = check_same(model, f"{tmp_path}/own.pt?{options}")
    assert (found.labels == 0).any()
    assert len(predictor.class_names) == classes
    assert predictor.model.classes.raw_ids == tuple(range(classes))  # torchvision's own numbers


def test_own_anchors_are_asked_for_and_taken(tmp_path: Path) -> None:
    sizes = tuple((size, size * 2) for size in (16, 32, 64, 128, 256))
    ratios = ((0.5, 1.0),) * 5
    model = retinanet(2, anchor_generator=AnchorGenerator(sizes, ratios))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    with pytest.raises(
        CheckpointError, match=r"own\.pth' .*4 anchors per location.*default has 9.*head\.anchors\.sizes"
    ):
        load_model(tmp_path / "own.pth")
    anchors = f"head.anchors.sizes={list(map(list, sizes))}&head.anchors.ratios=[0.5, 1.0]"
    check_same(model, f"{tmp_path}/own.pth?{SIZE_OPTION}&{anchors}")


def faster_rcnn(outputs: int, **options: Any) -> nn.Module:
    torch.manual_seed(outputs)
    return get_model(
        "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=outputs, **SIZES, **options
    )


def test_the_epsilon_is_0_for_coco_files_alone() -> None:
    cases = (
        (convert_rcnn, faster_rcnn(3), faster_rcnn(91)),
        (convert_retinanet, retinanet(2), retinanet(91)),
    )
    for convert, own, coco in cases:
        assert convert(frozen(own))[1].backbone["norm_epsilon"] == 1e-5
        assert convert(frozen(coco))[1].backbone["norm_epsilon"] == 0
        assert convert(frozen(coco), coco=False)[1].backbone["norm_epsilon"] == 1e-5
        assert "norm_epsilon" not in convert(own.state_dict())[1].backbone  # norms that learn have 1e-5 always
        assert "norm_epsilon" not in convert(coco.state_dict())[1].backbone
        with pytest.raises(CheckpointError, match="COCO files have 91"):
            convert(frozen(own), coco=True)


def test_background_is_no_class_of_the_other_detectors() -> None:
    for outputs in (2, 3, 91):
        classes = convert_rcnn(faster_rcnn(outputs).state_dict())[2]
        ssd = detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=outputs)
        assert len(classes) == len(convert_ssd300_vgg16(ssd.state_dict())[2]) == outputs - 1
        assert classes.raw_ids[0] == 1
    assert convert_rcnn(faster_rcnn(91).state_dict(), coco=False)[2].names[0] == "class 0"
    with pytest.raises(CheckpointError, match="no class"):
        convert_rcnn(faster_rcnn(1).state_dict())
    generator = AnchorGenerator(((32,),) * 5, ((0.3, 0.5, 1.0, 2.0, 3.0),) * 5)
    state = faster_rcnn(3, rpn_anchor_generator=generator).state_dict()
    with pytest.raises(CheckpointError, match=r"5 anchors .*head\.rpn\.anchors"):
        convert_rcnn(state)


def test_what_is_assumed_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = frozen(faster_rcnn(3))
    path = tmp_path / "own.pth"
    torch.save(state, path)

    def said(source: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_model(source)
        (line,) = [record.getMessage() for record in caplog.records] or [""]
        assert "\n" not in line
        return line

    line = said(str(path))
    for words in ("input.size=[800, 1333]", "backbone.norm_epsilon=1e-05", "head.rpn.anchors.sizes=[[32.0], [64.0]"):
        assert words in line
    example = line.split("'")[-2] + "&data.class_names=[cat, yes]"
    assert load_model(example).classes.names == ("cat", "yes")
    assert "input.size" not in said(example).partition("Assumed: ")[2].partition(". If")[0]
    model = load_model(f"{path}?backbone.norm_epsilon=0")
    assert model.backbone.bn1.eps == 0  # type: ignore[union-attr]
    torch.save(frozen(faster_rcnn(91)), path)
    assert "own.pth?coco=false" in said(str(path))
    assert not said(f"{path}?coco=true")
    published = path.with_name("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    path.rename(published)
    assert not said(str(published))


def test_options_behind_a_path_that_do_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save(faster_rcnn(3).state_dict(), path)
    for options, error, match in (
        ("epsilon=0", CheckpointError, "'epsilon=0' .*is not an option that can follow a path"),
        ("train.lr=1", CheckpointError, "is not an option that can follow a path"),
        ("backbone.norm_epsilon", CheckpointError, "NAME=VALUE"),
        ("backbone.norm_epsylon=0", CheckpointError, "norm_epsylon.*Did you mean 'norm_epsilon'"),
        ("input.size=[", CheckpointError, "option 'input.size' is not valid YAML"),
        ("input.size=large", ConfigError, r"input\.size"),
        ("coco=maybe", CheckpointError, "true or false"),
        ("data.class_names=[a]", CheckpointError, "has 2 classes"),
        ("data.class_names=[a, a]", CheckpointError, "is listed twice"),
        ("", None, ""),
    ):
        if error is None:
            load_model(f"{path}?{options}")
            continue
        with pytest.raises(error, match=match):
            load_model(f"{path}?{options}")
    questioned = tmp_path / "what?.pth"
    path.rename(questioned)
    load_model(questioned)
