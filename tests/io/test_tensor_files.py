"""Files of weights by their content: endings, wrappers, prefixes, and files that are something else."""

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

import detkit
from detkit.cli import main
from detkit.errors import CheckpointError
from detkit.io.tensor_files import file_format, read_tensors
from detkit.model import load_model
from detkit.registry import backbones

STATE: dict[str, Tensor] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def equal(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "name", ["a.pth", "a.pt", "a.pth.tar", "a.PTH", "a.bin", "a.ckpt", "a", "a.weights", "a.safetensors"]
)
def test_the_ending_does_not_matter(name: str, tmp_path: Path) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        assert equal(read_tensors(saved(STATE, tmp_path / name, **options)))
    save_file(STATE, tmp_path / name)
    assert equal(read_tensors(tmp_path / name))


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


WRAPPED: dict[str, Any] = {
    "state_dict": {"state_dict": STATE, "epoch": 3, "arch": "resnet18", "best_acc1": torch.tensor(0.5)},
    "model": {"model": STATE, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1}]}},
    "ema": {"ema": OrderedDict(STATE), "updates": 5},
    "any name": {"weights_of_the_net": STATE},
    "deeper": {"checkpoint": {"model": STATE, "epoch": 3}},
    "twice the same": {"model": STATE, "ema": STATE},
    "whole model beside": {"state_dict": STATE, "model": nn.Linear(2, 2), "score": np.float64(1)},
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled and parallel": prefixed("module._orig_mod."),
    "compiled inside": {name.replace("0.", "0._orig_mod."): tensor for name, tensor in STATE.items()},
    "Lightning": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2", "callbacks": {}, "loops": {}},
    "AveragedModel": {"n_averaged": torch.tensor(3), **prefixed("module.")},
    "parameters": {name: nn.Parameter(t, requires_grad=t.is_floating_point()) for name, t in STATE.items()},
    "extra state": {**STATE, "head._extra_state": {"version": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(name: str, tmp_path: Path) -> None:
    assert equal(read_tensors(saved(WRAPPED[name], tmp_path / "x.pt")))


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    state = {**prefixed("model."), "loss.weight": torch.ones(1)}
    assert equal(read_tensors(saved(state, tmp_path / "x.pt")), state)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"model": STATE, "ema": prefixed("module.")}, r"several dicts of tensors: \['model'\], \['ema'\]\. "),
        (nn.Linear(2, 2), r"whole pickled object \(torch\.nn\.modules\.linear\.Linear\).*model\.state_dict\(\)"),
        ({"model": nn.Linear(2, 2), "epoch": 1}, r"pickled objects.*'model' \(torch\.nn\.modules\.linear\.Linear\)"),
        ({}, "an empty dict"),
        ([torch.ones(2)], "a value of the type list"),
        (torch.ones(2), "a value of the type Tensor"),
        ({"epoch": 3, "lr": 0.1}, "a dict of epoch, lr"),
        ({3: torch.ones(2)}, "a tensor with the name 3"),
        ({"a\x1b[31m": torch.ones(2)}, r"a tensor with the name 'a.x1b\[31m'"),
        ({"a": torch.tensor([1.0, float("nan")])}, "values in 'a' that are NaN"),
        ({"a": torch.tensor([1.0, float("inf")])}, "values in 'a' that are NaN"),
        ({"bn.running_var": torch.tensor([-1.0])}, r"values in 'bn\.running_var' that are NaN"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"'a' of the type torch\.complex64"),
        ({"a": torch.ones(3, 3).to_sparse()}, "a dict with pickled objects"),
    ],
)  # fmt: skip
def test_what_is_not_one_dict_of_tensors(content: Any, match: str, tmp_path: Path) -> None:
    path = saved(content, tmp_path / "own.pt")
    for read in (read_tensors, detkit.load):
        with pytest.raises(CheckpointError, match=rf"own\.pt.*{match}") as caught:
            read(path)  # type: ignore[operator]
        assert str(caught.value).isprintable()


def others(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Files that people take for weights, with what they are said to be."""
    np.save(folder / "x.npy", np.ones(3))
    np.savez(folder / "x.npz", np.ones(3))
    with zipfile.ZipFile(folder / "x.zip", "w") as file:
        file.writestr("weights/readme.txt", "none")
    save_file({"a": torch.ones(100)}, folder / "x.safetensors")
    whole = (folder / "x.safetensors").read_bytes()
    saved(STATE, folder / "x.pth")
    torch_file = (folder / "x.pth").read_bytes()
    return {
        "empty": (b"", "is empty"),
        "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        "TensorFlow": (b"\x0a\x2b\x0a\x05input\x12\x0bPlaceholder" + bytes(50), "TensorFlow"),
        "SavedModel": (b"\x08\x01\x12\xad\x05\x0a" + bytes(50), "SavedModel"),
        "TFLite": (b"\x1c\x00\x00\x00TFL3" + bytes(50), "TensorFlow Lite"),
        "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.1" + bytes(50), "ONNX"),
        "web page": (b"\n<!DOCTYPE html><html>", "web page"),
        "JSON": (json.dumps({"a": 1}).encode(), "JSON"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), "gzip"),
        "tar": (bytes(257) + b"ustar" + bytes(200), "tar archive"),
        "image": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG"),
        "NumPy": ((folder / "x.npy").read_bytes(), "NumPy"),
        "NumPy archive": ((folder / "x.npz").read_bytes(), r"zip archive of arr_0\.npy"),
        "zip": ((folder / "x.zip").read_bytes(), "zip archive of weights/readme"),
        "pickle": (pickle.dumps({"a": 1}), "pickle that was not written by torch.save"),
        "noise": (bytes(range(200, 255)), "unknown format"),
        "one byte": (b"\x80", "unknown format"),
        "cut safetensors": (whole[:-10], "not a complete safetensors file|cannot be read"),
        "cut header": (whole[:20], "not a complete safetensors file|cannot be read"),
        "cut": (torch_file[:-100], "is damaged or truncated"),
        "cut early": (torch_file[:10], "is damaged or truncated"),
        "cut Darknet": (struct.pack("<5i", 0, 2, 0, 0, 0)[:14], "truncated"),
        "other Darknet": (struct.pack("<5i", 0, 2, 0, 0, 0) + bytes(400), "holds 100 floats"),
    }


def test_other_files_are_named_as_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.png"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(image)
    for name, (content, match) in others(tmp_path).items():
        for ending in (".pth", ".PT", ""):
            path = tmp_path / f"file{ending}"
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=match) as caught:
                load_model(path)
            assert f"file{ending}'" in str(caught.value), name
            assert str(caught.value).isprintable(), name
        assert main(["infer", str(path), "--source", str(image), "--output", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("detkit: ")
        assert error.count("\n") == 1


def test_formats(tmp_path: Path) -> None:
    assert file_format(saved(STATE, tmp_path / "a")) == "torch"
    assert file_format(saved(STATE, tmp_path / "a", _use_new_zipfile_serialization=False)) == "torch"
    save_file(STATE, tmp_path / "a")
    assert file_format(tmp_path / "a") == "safetensors"
    (tmp_path / "a").write_bytes(struct.pack("<3iq", 0, 2, 5, 32_013_312))
    assert file_format(tmp_path / "a") == "darknet"
    for path in (tmp_path, tmp_path / "none", Path("a\0b"), Path("x" * 300)):
        with pytest.raises(CheckpointError, match=r"There is no file|cannot be read"):
            file_format(path)


@pytest.mark.parametrize("name", ["net.pth.tar", "net.PT", "net", "net.safetensors"])
def test_a_whole_model_from_any_of_them(name: str, tmp_path: Path) -> None:
    """Under an attribute of the user's, too."""
    state = models.resnet18(num_classes=3).state_dict()
    wrapped = {f"network.{key}": tensor for key, tensor in state.items()}
    if name.endswith(".safetensors"):
        save_file(wrapped, tmp_path / name)
    else:
        saved({"state_dict": wrapped, "epoch": 1}, tmp_path / name)
    model = load_model(tmp_path / name)
    assert torch.equal(model.head.predictor.weight, state["fc.weight"])  # type: ignore[union-attr]
    assert model.classes.names == ("class 0", "class 1", "class 2")


def test_a_checkpoint_of_detkit_under_another_name(tmp_path: Path) -> None:
    model = load_model(saved(models.resnet18(num_classes=3).state_dict(), tmp_path / "a.pth"))
    model.save(tmp_path / "best.pt")
    assert equal(load_model(tmp_path / "best.pt").state_dict(), model.state_dict())


def test_a_file_of_darknet_is_no_file_of_a_backbone_of_torchvision(tmp_path: Path) -> None:
    (tmp_path / "a.weights").write_bytes(struct.pack("<5i", 0, 2, 0, 0, 0) + bytes(400))
    with pytest.raises(CheckpointError, match=r"a\.weights' is a Darknet weight file"):
        backbones.build({"name": "resnet18", "weights": str(tmp_path / "a.weights")}, "backbone")
