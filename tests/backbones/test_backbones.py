"""What every backbone promises: published maps, gradients everywhere, freezing."""

import pytest
import timm
import torch
from torch import nn
from zoo_cases import zoo_cases

from detkit.backbones.base import Backbone, Neck
from detkit.errors import ConfigError
from detkit.registry import backbones

LITE0 = {"name": "timm", "network": "tf_efficientnet_lite0"}

# The options under which each is tried; a backbone registered later is tried with none.
OPTIONS = {
    "small_ssd": [{}, {"widths": [8, 16], "level_channels": 24}],
    "vgg11": [{}, {"levels": [1, 3], "batch_norm": True}],
    "vgg16": [{"levels": [4, 5], "ceil_mode": True}],
    "resnet18": [{}, {"levels": [3, 4]}, {"levels": [5]}],
    "timm": [
        {"network": "tf_efficientnet_lite0"},
        {"network": "tf_efficientnet_lite0", "levels": [1, 4]},
        {"network": "resnet10t", "levels": [3, 4]},
        {"network": "convnext_atto", "levels": [2, 3]},
    ],
    **zoo_cases("BACKBONE_OPTIONS"),
}
# Of their convolutions without or with little padding the maps come out smaller by up to two cells.
LESS_PADDED = zoo_cases("LESS_PADDED")
CASES = [{"name": name, **options} for name in backbones.names() for options in OPTIONS.get(name, [{}])]


def case_id(case: dict) -> str:
    return "-".join(str(value) for value in case.values()).replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_contract(case: dict) -> None:
    """The maps are as published and finite, and every parameter gets a gradient."""
    torch.manual_seed(0)
    backbone = backbones.build(case, "backbone")
    maps = backbone(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    sides = [64 // stride if stride else 1 for stride in backbone.strides]
    assert all(m.shape[-2] == m.shape[-1] for m in maps)
    missing = [side - m.shape[-1] for side, m in zip(sides, maps)]
    assert all(0 <= cells <= 2 for cells in missing) if case["name"] in LESS_PADDED else not any(missing)
    assert all(m.isfinite().all() for m in maps)
    sum(m.square().mean() for m in maps).backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []
    in_stages = {id(parameter) for stage in backbone.stages() for parameter in stage.parameters()}
    assert in_stages == {id(parameter) for parameter in backbone.parameters()}


@pytest.mark.parametrize("case", [case for case in CASES if case["name"] in ("small_ssd", "vgg11", "resnet18", "timm")])
def test_frozen_stages_stay_bitwise(case: dict) -> None:
    """After freeze, train(), a forward pass and a step, the frozen tensors are what they were and others are not."""
    torch.manual_seed(0)
    backbone = backbones.build(case, "backbone")
    stages = backbone.stages()
    count = len(stages) // 2
    backbone.freeze(count)
    backbone.train()
    frozen = {id(t) for stage in stages[:count] for t in (*stage.parameters(), *stage.buffers())}
    tensors = [*backbone.parameters(), *backbone.buffers()]
    before = [t.detach().clone() for t in tensors]
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1)
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, tensors)]
    # Biases of zero may have a gradient of zero; of the learning tensors, most must have moved.
    assert not any(c for c, t in zip(changed, tensors) if id(t) in frozen)
    learning = [c for c, t in zip(changed, tensors) if id(t) not in frozen]
    assert sum(learning) > 0.9 * len(learning)


def test_freezing_less_thaws() -> None:
    backbone = backbones.build({"name": "small_ssd"}, "backbone")
    backbone.freeze(4)
    backbone.freeze(1)
    assert [stage.training for stage in backbone.stages()] == [False, *[True] * 5]
    assert [next(stage.parameters()).requires_grad for stage in backbone.stages()] == [False, *[True] * 5]
    backbone.eval()
    backbone.freeze(0)
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("count", [-1, 7])
def test_freezing_out_of_range(count: int) -> None:
    with pytest.raises(ConfigError, match=f"0 to 6 can be frozen, not {count}"):
        backbones.build({"name": "small_ssd"}, "backbone").freeze(count)


def test_contract_is_abstract() -> None:
    for kind in (Backbone, Neck):
        with pytest.raises(TypeError, match="abstract"):
            kind()


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "timm"])
@pytest.mark.parametrize("levels", [[], [9], [4, 3], [3, 3]])
def test_impossible_levels(name: str, levels: list[int]) -> None:
    network = {"network": "resnet10t"} if name == "timm" else {}
    with pytest.raises(ConfigError, match=r"'levels' of the backbone .* must be some of"):
        backbones.build({"name": name, "levels": levels, **network}, "backbone")


def test_unknown_timm_network() -> None:
    with pytest.raises(ConfigError, match=r"no network named 'efficentnet_lite0'\. Nearest: efficientnet_lite0"):
        backbones.build({"name": "timm", "network": "efficentnet_lite0"}, "backbone")


def test_timm_equals_features_only() -> None:
    """Our pruned network gives what timm's own `features_only` gives."""
    backbone = backbones.build(LITE0, "backbone").eval()
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    reference.load_state_dict(backbone.network.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 64)
    for ours, theirs in zip(backbone(images), reference(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_timm_vision_transformer_gives_its_deepest_map() -> None:
    options = {"name": "timm", "network": "vit_tiny_patch16_224", "levels": [4]}
    backbone = backbones.build(options, "backbone")
    (features,) = backbone(torch.randn(1, 3, 224, 224))
    assert features.shape == (1, 192, 14, 14)
    assert backbone.channels == (192,)
    assert backbone.strides == (16,)
    assert len(backbone.network.blocks) == 12


def test_normalisation() -> None:
    """timm's own for its networks; SSD's own VGG-16 has another, given as options."""
    assert backbones.build(LITE0, "backbone").mean == (0.5, 0.5, 0.5)
    assert backbones.build({"name": "vgg11"}, "backbone").std == (0.229, 0.224, 0.225)
    ssd = {"mean": [0.48235, 0.45882, 0.40784], "std": [1 / 255] * 3}
    backbone = backbones.build({"name": "vgg11", **ssd}, "backbone")
    assert (backbone.mean, backbone.std) == ((0.48235, 0.45882, 0.40784), (1 / 255,) * 3)
    with pytest.raises(ConfigError, match="since it divides the image"):
        backbones.build({"name": "vgg11", "std": [0, 1, 1]}, "backbone")
    with pytest.raises(ConfigError, match=r"backbone\.mean"):
        backbones.build({"name": "vgg11", "mean": [0.5, 0.5]}, "backbone")


def test_vgg_maps_are_activations_before_the_pools() -> None:
    backbone = backbones.build({"name": "vgg16", "levels": [4, 5], "ceil_mode": True}, "backbone")
    pools = [layer for layer in backbone.features if isinstance(layer, nn.MaxPool2d)]
    assert [pool.ceil_mode for pool in pools] == [False, False, True, False]
    assert isinstance(backbone.features[-1], nn.ReLU)
    maps = backbone(torch.randn(1, 3, 75, 75))
    # 75 -> 37 -> 18 -> 9 -> 4: the third pool has an even size here and rounds nothing.
    assert [tuple(m.shape[-2:]) for m in maps] == [(9, 9), (4, 4)]
    odd = backbone(torch.randn(1, 3, 76, 84))
    # 76 -> 38 -> 19 -> 10 and 84 -> 42 -> 21 -> 11, rounded up.
    assert tuple(odd[0].shape[-2:]) == (10, 11)


def test_frozen_norms_stay_while_all_else_learns() -> None:
    backbone = backbones.build({"name": "resnet18", "levels": [3]}, "backbone")
    backbone.freeze(1, norms=True)
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    backbone(torch.randn(2, 3, 64, 64))[0].square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("conv" in name or "downsample.0" in name for name in changed)
    assert "conv1.weight" not in changed


def test_a_backbone_frozen_as_a_whole_stays_in_evaluation_mode() -> None:
    """Also what belongs to no stage: the position embedding of a vision transformer."""
    backbone = backbones.build({"name": "timm", "network": "vit_tiny_patch16_224", "levels": [4]}, "backbone")
    backbone.freeze_all()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_level_6_of_vgg_is_the_pooled_fifth_block() -> None:
    backbone = backbones.build({"name": "vgg11", "levels": [5, 6]}, "backbone")
    fifth, sixth = backbone(torch.randn(1, 3, 64, 96))
    torch.testing.assert_close(sixth, nn.functional.max_pool2d(fifth, 2))
    assert backbone.strides == (16, 32)
