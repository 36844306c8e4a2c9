"""What every neck promises, and agreement with torchvision's own layers."""

import math

import pytest
import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detkit.errors import CheckpointError, ConfigError
from detkit.necks.ssd_vgg import SSDVGG, from_torchvision
from detkit.registry import backbones, necks

SMALL = {"channels": (8, 16, 24), "strides": (8, 16, 32)}
VGG = {"channels": (512, 512), "strides": (8, 16)}

# (options, injected, image size); a neck registered later is tried without options.
CASES = {
    "fpn": [
        ({"width": 16}, SMALL, 128),
        ({"width": 16, "extra_levels": 2, "norm": True}, SMALL, 130),
        ({"width": 16, "extra_levels": 2, "extra": "pool"}, SMALL, 130),
    ],
    "ssd_extras": [({}, SMALL, 256), ({"count": 1, "width": 32}, SMALL, 130)],
    "ssd_vgg": [({}, VGG, 300), ({"size": 512}, VGG, 512)],
}
ALL_CASES = [(name, *case) for name in necks.names() for case in CASES.get(name, [({}, SMALL, 256)])]


@pytest.mark.parametrize(("name", "options", "injected", "size"), ALL_CASES)
def test_contract(name: str, options: dict, injected: dict, size: int) -> None:
    """The maps are as published and finite, and every parameter gets a gradient."""
    torch.manual_seed(0)
    neck = necks.build({"name": name, **options}, "neck", **injected)
    features = [
        torch.randn(2, channels, math.ceil(size / stride), math.ceil(size / stride))
        for channels, stride in zip(injected["channels"], injected["strides"])
    ]
    copies = [feature.clone() for feature in features]
    maps = neck(features)
    assert all(torch.equal(feature, copy) for feature, copy in zip(features, copies, strict=True))
    assert [m.shape[1] for m in maps] == list(neck.channels)
    assert [tuple(m.shape[-2:]) for m in maps] == [(math.ceil(size / s),) * 2 for s in neck.strides]
    assert all(m.isfinite().all() for m in maps)
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, parameter in neck.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("extra", "norm"), [("conv", False), ("pool", False), ("pool", True), (None, False), (None, True)]
)
def test_fpn_equals_torchvision(extra: str | None, norm: bool) -> None:
    """With torchvision's weights under renamed keys, the same maps, at sizes that are not multiples."""
    torch.manual_seed(0)
    blocks = {"conv": LastLevelP6P7(16, 16), "pool": LastLevelMaxPool(), None: None}[extra]
    reference = FeaturePyramidNetwork(
        [8, 16, 24], 16, extra_blocks=blocks, norm_layer=torch.nn.BatchNorm2d if norm else None
    )
    options = {
        "width": 16,
        "norm": norm,
        "extra": extra or "conv",
        "extra_levels": {"conv": 2, "pool": 1, None: 0}[extra],
    }
    neck = necks.build({"name": "fpn", **options}, "neck", **SMALL)
    renamed = {
        name.replace("extra_blocks.p6.", "extra_blocks.0.0.").replace("extra_blocks.p7.", "extra_blocks.1.0."): tensor
        for name, tensor in reference.state_dict().items()
    }
    neck.load_state_dict(renamed)
    features = [torch.randn(2, 8, 25, 19), torch.randn(2, 16, 13, 10), torch.randn(2, 24, 7, 5)]
    theirs = reference({str(i): feature for i, feature in enumerate(features)})
    for ours, expected in zip(neck(features), theirs.values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def ssd_pair(state: dict, size: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    backbone = backbones.build({"name": "vgg16", "levels": [4, 5], "ceil_mode": True}, "backbone")
    neck = necks.build({"name": "ssd_vgg", "size": size}, "neck", **VGG)
    for module, part in zip((backbone, neck), from_torchvision(state), strict=True):
        module.load_state_dict(part)
    return backbone, neck


@torch.no_grad()
def test_ssd300_equals_torchvision() -> None:
    torch.manual_seed(0)
    reference = ssd300_vgg16(weights=None, weights_backbone=None)
    reference.backbone.scale_weight.uniform_(10, 30)
    backbone, neck = ssd_pair(reference.state_dict(), 300)
    images = torch.randn(1, 3, 300, 300)
    theirs = reference.backbone(images)
    ours = neck(backbone(images))
    assert [m.shape[-1] for m in ours] == [38, 19, 10, 5, 3, 1]
    for mine, expected in zip(ours, theirs.values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ssd512_has_the_maps_of_the_paper() -> None:
    neck = SSDVGG((512, 512), (8, 16), size=512)
    maps = neck([torch.randn(1, 512, 64, 64), torch.randn(1, 512, 32, 32)])
    assert [feature.shape[2] for feature in maps] == [64, 32, 16, 8, 4, 2, 1]
    assert [512 // feature.shape[2] for feature in maps] == list(neck.strides)


@pytest.mark.parametrize(
    "name", ["backbone.extra.0.8.weight", "backbone.features.23.weight", "backbone.extra.6.0.weight", "banana"]
)
def test_unmapped_tensor_of_torchvision_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' is not a tensor of torchvision's ssd300_vgg16"):
        from_torchvision({name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "injected", "match"),
    [
        ({"name": "fpn"}, {"channels": (8, 8), "strides": (8, 0)}, "needs maps of ascending strides"),
        ({"name": "fpn", "extra_levels": -1}, SMALL, "no negative 'extra_levels'"),
        ({"name": "fpn", "width": 0}, SMALL, "positive 'width'"),
        ({"name": "fpn", "extra": "banana"}, SMALL, r"neck\.extra"),
        ({"name": "ssd_extras", "count": 0}, SMALL, "'count' of at least 1"),
        ({"name": "ssd_extras"}, {"channels": (8, 8), "strides": (8, 0)}, "cannot follow a map that is pooled"),
        ({"name": "ssd_vgg"}, SMALL, "needs the backbone {name: vgg16"),
        ({"name": "ssd_vgg", "size": 400}, VGG, r"neck\.size"),
    ],
)
def test_options_that_do_not_fit(options: dict, injected: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        necks.build(options, "neck", **injected)
