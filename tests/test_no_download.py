"""Opening a checkpoint needs nothing but the checkpoint: no download, no other file, whatever the defaults name."""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from zoo_cases import zoo_cases

from detkit.backbones.base import Backbone
from detkit.config import experiment_from_dict, experiment_to_dict
from detkit.errors import CheckpointError
from detkit.heads.parts.region_trunks import region_trunks
from detkit.model import Model, build_model, load_model
from detkit.registry import backbones, heads, necks, without_weights
from detkit.structures import ClassList

DATA = {"name": "coco"}
pytestmark = pytest.mark.usefixtures("no_network")


def experiment(**parts: Any) -> Any:
    return experiment_from_dict({"data": DATA, "input": {"size": [64, 64]}, **parts})


NESTED = {
    "backbone": {"name": "resnet18", "levels": [4], "weights": "imagenet"},
    "head": {
        "name": "faster_rcnn",
        "rpn": {"anchors": {"name": "pyramid", "sizes": [[32.0]]}},
        "regions": {
            "features": {"name": "roi_align", "size": 14},
            "trunk": {"name": "resnet_layer4", "network": "resnet18", "weights": "imagenet"},
        },
    },
}


def names_with_weights() -> list[tuple[Any, str]]:
    registries = (backbones, necks, heads, region_trunks)
    return [
        (registry, name)
        for registry in registries
        for name in registry.names()
        if "weights" in inspect.signature(registry.get(name)).parameters
    ]


@pytest.mark.parametrize(
    ("registry", "name"), names_with_weights(), ids=lambda value: str(getattr(value, "kind", value))
)
@pytest.mark.parametrize("weights", ["imagenet", "package", "/nowhere/file.pth"])
def test_no_part_loads_weights(registry: Any, name: str, weights: str, no_network: list[str]) -> None:
    options = {"name": name, "weights": weights, **({"network": "resnet10t"} if name == "timm" else {})}
    given = {"shape": (1024, 14, 14)} if registry is region_trunks else {}
    with without_weights():
        part = registry.build(options, "part", **given)
    assert isinstance(part, nn.Module)
    assert not no_network
    if weights != "package":  # which may be installed
        with pytest.raises((CheckpointError, OSError)):
            registry.build(options, "part", **given)


def test_parts_inside_parts(no_network: list[str]) -> None:
    model = build_model(experiment(**NESTED), ClassList.from_names(["cell"]), load_weights=False)
    assert isinstance(model, Model)
    assert not no_network


class Foreign(Backbone):
    """A part of an installed package, which loads in its own way, and by default."""

    channels, strides = (3,), (1,)

    def __init__(self, weights: str | None = "own", scales: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        if weights is not None:
            raise OSError("downloads")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def stages(self) -> list[nn.Module]:
        return []


class Weighted(Foreign):
    """`weights` are factors here."""

    def __init__(self, weights: tuple[float, ...] = (1.0, 2.0)) -> None:
        super().__init__(None)
        self.factors = weights


def test_parts_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones._parts, "foreign", Foreign)
    monkeypatch.setitem(backbones._parts, "weighted", Weighted)
    with without_weights():
        for options in ({}, {"weights": "own"}, {"weights": "other"}):
            backbones.build({"name": "foreign", **options}, "backbone")
        assert backbones.build({"name": "weighted"}, "backbone").factors == (1.0, 2.0)
        assert backbones.build({"name": "weighted", "weights": [3.0]}, "backbone").factors == (3.0,)
    with pytest.raises(OSError, match="downloads"):
        backbones.build({"name": "foreign"}, "backbone")


def test_an_experiment_keeps_its_weights() -> None:
    """So that the run's config says what it began from."""
    model = build_model(experiment(**NESTED), ClassList.from_names(["cell"]), load_weights=False)
    assert experiment_to_dict(model.experiment)["backbone"]["weights"] == "imagenet"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("torchvision:resnet18", r"torchvision's resnet18, https.* could not be downloaded \(no network\).*its path"),
        ("torchvision:resnet81", "Did you mean 'resnet18'"),
        ("torchvision:", "detkit cannot run torchvision's ''"),
        ("torchvision:\x1b[31m", r"torchvision's '.x1b\[31m'"),
        ("torchvision:../../x", "detkit cannot run"),
    ],
)
def test_names_of_published_weights(source: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "error", [RuntimeError("invalid hash value"), EOFError(), ValueError("unknown url type"), TimeoutError()]
)
def test_any_failing_download_is_one_paragraph(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        load_model("torchvision:resnet18")


def test_a_file_in_the_cache_of_downloads_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub opens a file that is there already, whatever it holds."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *arguments, **options: given.update(options) or {}
    )
    for load in (
        lambda: load_model("torchvision:resnet18"),
        lambda: backbones.build({"name": "resnet18", "weights": "imagenet"}, "backbone"),
        lambda: backbones.build({"name": "vgg11", "weights": "imagenet"}, "backbone"),
        *(
            functools.partial(backbones.build, {"name": name, "weights": "imagenet"}, "backbone")
            for name in zoo_cases("WITH_IMAGENET_WEIGHTS")
        ),
        lambda: region_trunks.build({"name": "resnet_layer4", "weights": "imagenet"}, "trunk", shape=(1024, 14, 14)),
    ):
        given.clear()
        with pytest.raises(CheckpointError):
            load()
        assert given["weights_only"] is True
        assert given["check_hash"] is True
