"""Historic classifiers beside their papers and torchvision's names of their tensors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from detkit.errors import ConfigError
from detkit.model import load_model
from detkit.registry import backbones, heads, without_weights
from detkit.structures import Inputs


def test_lenet_has_the_sizes_of_the_paper() -> None:
    backbone = backbones.build({"name": "lenet"}, "backbone")
    head = heads.build(
        {"name": "classify", "pool": 5, "widths": [120, 84], "activation": "tanh"},
        "head", channels=backbone.channels, strides=backbone.strides, num_classes=10,
    )  # fmt: skip
    (features,) = backbone(torch.zeros(2, 3, 28, 28))
    assert features.shape == (2, 16, 5, 5)
    assert head([features], Inputs((28, 28), ((28, 28),) * 2)).logits.shape == (2, 10)
    # 61,706 for one channel, and 2 * 6 * 25 more for three
    assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == 61_706 + 300


def test_nin_takes_the_mean_before_its_last_layer_as_well_as_behind() -> None:
    backbone = backbones.build({"name": "nin"}, "backbone").eval()
    head = heads.build({"name": "classify"}, "head", channels=(1024,), strides=(32,), num_classes=4)
    (features,) = backbone(torch.randn(1, 3, 96, 128))
    per_cell = F.conv2d(features, head.predictor.weight[:, :, None, None], head.predictor.bias)
    torch.testing.assert_close(head([features], Inputs((96, 128), ((96, 128),))).logits, per_cell.mean((2, 3)))


def test_densenets_older_names_are_known(tmp_path: Path) -> None:
    state = models.densenet121(num_classes=5).state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv1.", "conv.1.") if "denselayer" in name else name: tensor
        for name, tensor in state.items()
    }
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet121.pth")
    model = load_model(tmp_path / "densenet121.pth")
    assert torch.equal(model.head.predictor.weight, state["classifier.weight"])  # type: ignore[union-attr]


def test_what_the_name_of_the_weights_sets_stays() -> None:
    """GoogLeNet's ImageNet weights have a normalisation of their own, which a checkpoint trained from them needs."""
    with without_weights():
        assert backbones.build({"name": "googlenet", "weights": "imagenet"}, "backbone").mean == (0.5, 0.5, 0.5)
        assert backbones.build({"name": "googlenet"}, "backbone").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("levels", [[], ["inception4b"], ["inception5b", "conv3"]])
def test_impossible_levels_of_googlenet(levels: list[str]) -> None:
    with pytest.raises(ConfigError, match="'levels' of the backbone 'googlenet' must be some of conv3"):
        backbones.build({"name": "googlenet", "levels": levels}, "backbone")
