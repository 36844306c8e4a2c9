"""The trunk and neck of YOLOX: sizes as published, odd inputs, options out of range. Equality with a forward pass
written from the published names is in tests/published/test_yolox_weights.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.backbones.csp_darknet import CSPDarknet, Focus, block_count
from detkit.errors import ConfigError
from detkit.necks.pafpn import PathAggregation
from detkit.registry import backbones, necks


def built(depth: float, width: float, depthwise: bool = False) -> tuple[CSPDarknet, PathAggregation]:
    trunk = CSPDarknet(depth, width, depthwise)
    return trunk, PathAggregation(trunk.channels, trunk.strides, depth, depthwise)


@pytest.mark.parametrize(
    ("depth", "width", "channels", "blocks"),
    [(0.33, 0.25, (64, 128, 256), 1), (0.67, 0.75, (192, 384, 768), 2), (1.33, 1.25, (320, 640, 1280), 4)],
)
def test_sizes_are_as_published(depth: float, width: float, channels: tuple[int, ...], blocks: int) -> None:
    with torch.device("meta"):
        trunk, neck = built(depth, width)
    assert trunk.channels == neck.channels == channels
    assert [len(stage[-1].m) for stage in (trunk.dark2, trunk.dark3, trunk.dark4, trunk.dark5)] == [
        blocks,
        3 * blocks,
        3 * blocks,
        blocks,
    ]
    assert len(neck.C3_n4.m) == blocks == block_count(depth)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (90, 40)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_any_input_size(size: tuple[int, int], depthwise: bool) -> None:
    trunk, neck = built(0.1, 0.125, depthwise)
    maps = neck.eval()(trunk.eval()(torch.randn(1, 3, *size)))
    sizes = [tuple(math.ceil(side / stride) for side in size) for stride in (8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in maps] == sizes
    assert all(feature.isfinite().all() for feature in maps)


def test_focus_is_a_convolution_of_stride_two() -> None:
    """Its 3x3 over squares of 2x2 pixels sees 6x6 pixels; an odd row is padded with zeros."""
    torch.manual_seed(0)
    focus = Focus(3, 5).eval()
    kernel = torch.zeros(5, 3, 6, 6)
    for index, (top, left) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        kernel[:, :, top::2, left::2] = focus.conv.conv.weight[:, 3 * index : 3 * index + 3]
    images = torch.randn(2, 3, 11, 14)
    expected = F.conv2d(F.pad(images, (2, 2, 2, 3)), kernel, stride=2)
    torch.testing.assert_close(focus(images), F.silu(focus.conv.bn(expected)), rtol=1e-4, atol=1e-5)


def test_norms_and_normalisation_are_as_published() -> None:
    trunk, neck = built(0.1, 0.125)
    norms = [module for part in (trunk, neck) for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    assert (trunk.mean, trunk.std) == ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    assert CSPDarknet(0.1, 0.125, std=(0.2, 0.3, 0.4)).std == (0.2, 0.3, 0.4)


def test_frozen_stages_stay_and_the_rest_learns() -> None:
    trunk, _ = built(0.1, 0.125)
    trunk.freeze(2)
    trunk.train()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    sum(feature.square().mean() for feature in trunk(torch.randn(2, 3, 64, 64))).backward()  # type: ignore[union-attr]
    optimizer.step()
    changed = {name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == {"dark3", "dark4", "dark5"}


@pytest.mark.parametrize(
    ("registry", "options", "injected", "match"),
    [
        (backbones, {"name": "csp_darknet", "width": 0.01}, {}, r"'backbone\.width' must be in"),
        (backbones, {"name": "csp_darknet", "depth": -1}, {}, r"'backbone\.depth' must be in"),
        (backbones, {"name": "csp_darknet", "depthwize": True}, {}, "Did you mean 'depthwise'"),
        (necks, {"name": "pafpn"}, {"channels": (8, 8), "strides": (8, 16)}, "needs three maps"),
        (necks, {"name": "pafpn"}, {"channels": (8, 8, 8), "strides": (8, 16, 64)}, r"strides \[8, 16, 64\]"),
        (necks, {"name": "pafpn"}, {"channels": (8, 8, 8), "strides": (0, 0, 0)}, "needs three maps"),
        (necks, {"name": "pafpn", "depth": 99}, {"channels": (8, 8, 8), "strides": (8, 16, 32)}, r"'neck\.depth'"),
    ],
)
def test_options_that_do_not_fit(registry, options, injected, match) -> None:
    with pytest.raises(ConfigError, match=match):
        registry.build(options, "neck" if registry is necks else "backbone", **injected)
