"""detkit's Faster and Mask R-CNN against torchvision's own, with random weights and a real photograph."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection, get_model
from torchvision_reference import as_tensor, calibrate, counterparts, fit_norms, photograph

from detkit.config import InputOptions
from detkit.errors import CheckpointError
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model, load_model, load_tensors
from detkit.published.rcnn import convert_rcnn
from detkit.structures import ClassList, Target

SHORT, LONG = 192, 320
# Fewer proposals than the models' own, which cost a minute here.
LIMITS = {"candidates": 200, "proposals": 100, "train_candidates": 150, "train_proposals": 120}
NAMES = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"]


@pytest.fixture(scope="module", params=NAMES)
def reference(request: pytest.FixtureRequest) -> nn.Module:
    """Torchvision's model with random weights whose scores are spread out; on small images, to be fast."""
    torch.manual_seed(NAMES.index(request.param))
    model = get_model(
        request.param,
        weights=None,
        weights_backbone=None,
        num_classes=7,
        min_size=SHORT,
        max_size=LONG,
        rpn_pre_nms_top_n_test=LIMITS["candidates"],
        rpn_post_nms_top_n_test=LIMITS["proposals"],
        rpn_pre_nms_top_n_train=LIMITS["train_candidates"],
        rpn_post_nms_top_n_train=LIMITS["train_proposals"],
    )
    with torch.no_grad():
        fit_norms(model)
        calibrate(model, {model.rpn.head.cls_logits: (1.0, 0.0), model.rpn.head.bbox_pred: (0.2, 0.0)})
        predictor = model.roi_heads.box_predictor
        calibrate(model, {predictor.cls_score: (2.0, 0.0), predictor.bbox_pred: (1.0, 0.0)})
    return model.eval()


def converted(reference: nn.Module) -> Model:
    tensors, experiment, classes = convert_rcnn(reference.state_dict())
    head = {**experiment.head, "rpn": {**experiment.head["rpn"], **LIMITS}}
    small = replace(experiment, input=InputOptions((SHORT, LONG), "short_side"), head=head)
    model = build_model(small, classes)
    load_tensors(model, tensors, "torchvision")
    return model.eval()


@pytest.mark.parametrize("crop", [(400, 512), (300, 180), (97, 401)])
def test_same_detections(reference: nn.Module, crop: tuple[int, int]) -> None:
    image = photograph()[: crop[0], : crop[1]]
    with torch.no_grad():
        expected = reference([as_tensor(image)])[0]
    found = Predictor(converted(reference), "cpu").predict(image, conf=0.05)
    assert len(found) == len(expected["scores"])
    assert len(found) > 20
    assert expected["scores"].std() > 1e-2
    assert expected["labels"].unique().numel() >= 2
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-3)
    counterpart = counterparts(found, expected)
    torch.testing.assert_close(found.boxes, expected["boxes"][counterpart], rtol=0, atol=1e-2)
    if "masks" in expected:
        theirs = expected["masks"][counterpart, 0] > 0.5
        assert found.masks is not None
        both = (found.masks & theirs).sum((1, 2))
        either = (found.masks | theirs).sum((1, 2))
        assert either.sum() > 1000
        assert both.sum() > 0.999 * either.sum()
        # Of a random network's few scattered pixels many are near the threshold: one of 50 is 2 %.
        assert (both >= torch.minimum(0.99 * either, either - 1.0)).all()


@pytest.mark.parametrize("targets", ["full", "half", "empty"])
def test_same_losses(reference: nn.Module, targets: str) -> None:
    """All anchors and proposals sampled, so that nothing is left to chance: the four or five losses are equal, also
    where half of the images or all have no object."""
    image = as_tensor(photograph()[:192, :256])
    boxes = torch.tensor([[20.0, 30, 120, 180], [100, 90, 250, 180], [5, 5, 60, 50]])
    labels = torch.tensor([2, 0, 5])
    masks = torch.zeros(3, 192, 256, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top + 5 : bottom, left : right - 7] = True
    model = converted(reference)
    for network in (reference, model):
        network.eval()
    # In training mode torchvision loses batch norm's running values; only its two stages are switched.
    reference.rpn.training = reference.roi_heads.training = True
    reference.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    reference.rpn.fg_bg_sampler.positive_fraction = 1.0
    reference.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    reference.roi_heads.fg_bg_sampler.positive_fraction = 1.0
    model.head.rpn.samples = model.head.regions.samples = 10**6
    model.head.rpn.positive_fraction = model.head.regions.positive_fraction = 1.0
    target, nothing = Target(boxes, labels, masks=masks), replace(Target.empty(), masks=masks[:0])
    batch = {"full": [target], "half": [target, nothing], "empty": [nothing, nothing]}[targets]
    wanted = [
        {"boxes": one.boxes, "labels": one.labels + 1, "masks": one.masks.to(torch.uint8)}  # type: ignore[union-attr]
        for one in batch
    ]
    try:
        with torch.no_grad():
            images, truths = reference.transform([image] * len(batch), wanted)
            features = reference.backbone(images.tensors)
            proposals, first = reference.rpn(images, features, truths)
            _, second = reference.roi_heads(features, proposals, images.image_sizes, truths)
    finally:
        reference.rpn.training = reference.roi_heads.training = False
    with torch.no_grad():
        outputs = model(torch.stack([image] * len(batch)), ((192, 256),) * len(batch))
        mine = model.head.loss(outputs, tuple(batch))
    expected = {
        "objectness": first["loss_objectness"],
        "proposal_box": first["loss_rpn_box_reg"],
        "class": second["loss_classifier"],
        "box": second["loss_box_reg"],
    } | ({"mask": second["loss_mask"]} if "loss_mask" in second else {})
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert (value > 0) == (targets != "empty" or name in ("objectness", "class"))
        torch.testing.assert_close(mine[name], value, rtol=2e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_files_under_the_older_names_load(reference: nn.Module, tmp_path: Any) -> None:
    """Torchvision's published files of the first versions are older than its code."""
    state = reference.state_dict()
    if any("num_batches_tracked" in name and "roi_heads" in name for name in state):
        pytest.skip("the second versions were published under the names of today")
    old = {
        name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        .replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.")
        .replace("_blocks.2.0.", "_blocks.2.").replace("_blocks.3.0.", "_blocks.3.")
        .replace("mask_head.0.0", "mask_head.mask_fcn1").replace("mask_head.1.0", "mask_head.mask_fcn2")
        .replace("mask_head.2.0", "mask_head.mask_fcn3").replace("mask_head.3.0", "mask_head.mask_fcn4"): tensor
        for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }  # fmt: skip
    torch.save(old, tmp_path / "old.pth")
    model = load_model(tmp_path / "old.pth")
    assert model.backbone.bn1.eps == 1e-5  # type: ignore[union-attr]
    assert torch.equal(model.state_dict()["head.rpn.convolutions.0.weight"], state["rpn.head.conv.0.0.weight"])
    assert torch.equal(model.state_dict()["neck.layer_blocks.2.0.bias"], state["backbone.fpn.layer_blocks.2.0.bias"])


def test_coco_classes_and_unknown_tensors(tmp_path: Any) -> None:
    state = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    _, _, classes = convert_rcnn(state)
    assert isinstance(classes, ClassList)
    assert classes.names[0] == "person"
    assert len(classes) == 90
    with pytest.raises(CheckpointError, match=r"'rpn\.head\.extra' is not a tensor of torchvision's"):
        convert_rcnn({**state, "rpn.head.extra": torch.zeros(1)})
    del state["roi_heads.box_head.fc6.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'head\.regions\.trunk\.fc6\.weight'"):
        load_model(tmp_path / "cut.pth")
