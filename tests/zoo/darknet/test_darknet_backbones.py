"""Darknet's networks and files."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detkit.backbones.base import Backbone
from detkit.errors import CheckpointError, ConfigError
from detkit.registry import backbones
from detkit.zoo.darknet.weight_file import DarknetConvolution, convolutions, count_floats, read_floats, take_tensors

TINY = {"name": "darknet_tiny", "widths": [2, 3, 4, 5, 6, 7, 8]}


def build(options: dict) -> Backbone:
    return backbones.build(options, "backbone")


def write(path: Path, floats: np.ndarray, major: int = 0, minor: int = 2) -> Path:
    seen = "<q" if major * 10 + minor >= 2 else "<i"
    path.write_bytes(struct.pack("<3i", major, minor, 0) + struct.pack(seen, 64) + floats.astype("<f4").tobytes())
    return path


@pytest.mark.parametrize(
    ("name", "layers", "floats"),
    [
        # Darknet's own darknet53.conv.74 has 162,482,580 bytes, 20 of them the header
        ("darknet19", 18, 19_831_776),
        ("darknet53", 52, 40_620_640),
        ("darknet_tiny", 7, 6_298_480),
    ],
)
def test_sizes(name: str, layers: int, floats: int) -> None:
    with torch.device("meta"):
        backbone = build({"name": name})
    units = convolutions(backbone, "")
    assert len(units) == layers
    assert count_floats(units) == floats


@pytest.mark.parametrize("name", ["darknet19", "darknet53", "darknet_tiny"])
def test_every_level_can_be_had(name: str) -> None:
    backbone = build({**(TINY if name == "darknet_tiny" else {"name": name}), "levels": [1, 2, 3, 4, 5]})
    maps = backbone.eval()(torch.rand(1, 3, 64, 96))
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in (2, 4, 8, 16, 32)]
    assert backbone.strides == (2, 4, 8, 16, 32)
    assert [m.shape[1] for m in maps] == list(backbone.channels)


def test_blocks_behind_the_last_level_are_not_kept() -> None:
    assert len(build({**TINY, "levels": [3]}).blocks) == 4
    with pytest.raises(ConfigError, match="must be some of 1, 2, 3, 4, 5"):
        build({**TINY, "levels": [0]})


def test_pool_of_stride_one_keeps_the_size() -> None:
    """Each value is the largest of itself and its neighbours to the right, below and diagonally."""
    pool = build(TINY).blocks[5][2]
    features = torch.randn(2, 3, 5, 4)
    pooled = pool(features)
    assert pooled.shape == features.shape
    for row in range(5):
        for column in range(4):
            window = features[:, :, row : row + 2, column : column + 2]
            assert torch.equal(pooled[:, :, row, column], window.amax((2, 3)))


def test_images_are_not_normalised() -> None:
    backbone = build(TINY)
    assert (backbone.mean, backbone.std) == ((0.0,) * 3, (1.0,) * 3)


def test_residual_block_of_darknet53() -> None:
    block = build({"name": "darknet53", "levels": [1]}).eval().blocks[1]
    features = torch.randn(1, 64, 4, 4)
    narrow, wide = block[1].layers
    assert torch.equal(block[1](features), features + wide(narrow(features)))
    assert narrow[0].weight.shape == (32, 64, 1, 1)
    assert block[0][0].stride == (2, 2)


@pytest.mark.parametrize("minor", [1, 2])
def test_trunk_from_a_file(tmp_path: Path, minor: int) -> None:
    """Biases, scales, means, variances, weights; with 32 or 64 bits for the images seen."""
    count = count_floats(convolutions(build(TINY), ""))
    floats = np.random.default_rng(0).random(count, dtype=np.float32)
    path = write(tmp_path / "tiny.conv.13", floats, minor=minor)
    backbone = build({**TINY, "weights": str(path), "levels": [2, 4]})
    first = backbone.blocks[0][0]
    assert isinstance(first, DarknetConvolution)
    norm = first[1]
    for tensor, expected in zip(
        (norm.bias, norm.weight, norm.running_mean, norm.running_var), floats[:8].reshape(4, 2)
    ):
        assert np.array_equal(tensor.detach().numpy(), expected)
    weights = floats[8 : 8 + 2 * 3 * 9].reshape(2, 3, 3, 3)
    assert np.array_equal(first[0].weight.detach().numpy(), weights)
    second = backbone.blocks[1][1][1]
    assert np.array_equal(second.bias.detach().numpy(), floats[8 + 54 : 8 + 54 + 3])
    image = torch.rand(1, 3, 32, 32)
    mean, scale = floats[4:6].reshape(1, 2, 1, 1), floats[2:4] / np.sqrt(floats[6:8] + 1e-5)
    plain = (F.conv2d(image, torch.from_numpy(weights), padding=1) - torch.from_numpy(mean)) * torch.from_numpy(
        scale.reshape(1, 2, 1, 1)
    ) + torch.from_numpy(floats[:2].reshape(1, 2, 1, 1))
    torch.testing.assert_close(backbone.eval().blocks[0](image), torch.where(plain > 0, plain, 0.1 * plain))


def test_trunk_with_its_classifier(tmp_path: Path) -> None:
    count = count_floats(convolutions(build(TINY), ""))
    floats = np.random.default_rng(0).random(count + 1000 * 9, dtype=np.float32)
    backbone = build({**TINY, "weights": str(write(tmp_path / "tiny.weights", floats))})
    assert backbone.blocks[5][3][0].weight[-1, -1, -1, -1] == floats[count - 1]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    floats = np.zeros(100)
    with pytest.raises(
        CheckpointError, match=r"holds 100 floats, but the backbone 'darknet_tiny' has \d+, or \d+ with"
    ):
        build({**TINY, "weights": str(write(tmp_path / "a.weights", floats))})
    cut = write(tmp_path / "b.weights", floats)
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"b\.weights' is truncated"):
        read_floats(cut)
    cut.write_bytes(cut.read_bytes()[:14])
    with pytest.raises(CheckpointError, match=r"b\.weights' is truncated"):
        read_floats(cut)
    for content in (b"<!DOCTYPE html><html>", struct.pack("<5i", -1, 2, 0, 0, 0), bytes(8)):
        cut.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"b\.weights' is not a Darknet weight file"):
            read_floats(cut)
    cut.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"b\.weights' is empty"):
        read_floats(cut)
    floats[50] = np.nan
    with pytest.raises(CheckpointError, match=r"d\.weights' has values in 'a.* that are NaN"):
        take_tensors(
            [("a", torch.nn.Conv2d(1, 99, 1))], read_floats(write(tmp_path / "d.weights", floats)), "d.weights"
        )
    with pytest.raises(CheckpointError, match=r"There is no file of weights .*c\.weights"):
        read_floats(tmp_path / "c.weights")


def test_wrong_widths() -> None:
    for widths in ([8, 8], [0] * 7):
        with pytest.raises(ConfigError, match="seven positive 'widths'"):
            build({"name": "darknet_tiny", "widths": widths})


def test_a_file_of_torch_is_no_file_of_darknet(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"b\.pth' is not a Darknet weight file.*torch\.save"):
        backbones.build({"name": "darknet_tiny", "weights": str(tmp_path / "b.pth")}, "backbone")
