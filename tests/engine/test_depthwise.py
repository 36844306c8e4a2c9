"""Depthwise convolutions of a network that trains in bf16: exact, and the network otherwise as it was."""

import copy

import pytest
import timm
import torch
from torch import nn

from detkit.engine.depthwise import depthwise_in_float32


@pytest.mark.parametrize("network", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_they_compute_in_float32_and_all_else_in_bf16(network: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=0).train()
    plain, names = copy.deepcopy(model), [name for name, _ in model.named_parameters()]
    assert depthwise_in_float32(model) > 5
    assert [name for name, _ in model.named_parameters()] == names
    types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        types[module.groups == module.in_channels].add(output.dtype)

    averaged = copy.deepcopy(model)
    for module in averaged.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    images = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        averaged(images).sum().backward()
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}
    assert all(weight.grad is not None for weight in averaged.parameters())
    assert all(weight.grad is None for weight in model.parameters())  # the copy's weights are its own
    model.eval(), plain.eval()
    assert torch.equal(model(images), plain(images))
    plain.load_state_dict(model.state_dict())
