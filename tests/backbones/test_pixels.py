"""The backbone that is no network."""

import pytest
import torch

from detkit.backbones.base import Backbone
from detkit.config import Experiment, InputOptions
from detkit.errors import ConfigError
from detkit.model import Model, build_model
from detkit.registry import backbones
from detkit.structures import ClassList


def build() -> Backbone:
    return backbones.build({"name": "pixels"}, "backbone")


def test_the_image_is_the_one_map() -> None:
    backbone = build()
    images = torch.rand(2, 3, 37, 53, requires_grad=True)
    (found,) = backbone(images)
    assert found is images
    assert (backbone.channels, backbone.strides) == ((3,), (1,))
    assert backbone(images[:0])[0].shape == (0, 3, 37, 53)


def test_there_is_nothing_to_learn_or_freeze() -> None:
    backbone = build()
    assert list(backbone.parameters()) == list(backbone.buffers()) == []
    assert not backbone.state_dict()
    backbone.freeze(0)
    assert not backbone.eval().training
    with pytest.raises(ConfigError, match="has 0 stages, so 0 to 0 can be frozen, not 1"):
        backbone.freeze(1)


def test_a_map_of_a_stage_of_the_image_refuses_options() -> None:
    with pytest.raises(ConfigError, match=r"'backbone\.levels' is not an option of the backbone 'pixels'"):
        backbones.build({"name": "pixels", "levels": [1]}, "backbone")


def rcnn(resize: str) -> Model:
    features = {"name": "warp", "backbone": {"name": "resnet18", "levels": [2]}, "size": 32, "context": 4}
    experiment = Experiment(
        data={"name": "shapes"},
        backbone={"name": "pixels"},
        head={"name": "fast_rcnn", "regions": {"features": features, "trunk": {"name": "mean"}}},
        input=InputOptions((48, 64), resize),  # type: ignore[arg-type]
        name="x",
    )
    return build_model(experiment, ClassList.from_names(("a",))).eval()


def test_the_network_of_the_head_sees_regions_normalised_for_it() -> None:
    """Of an image in the network's mean colour it sees zeros, inside and beyond the border."""
    model = rcnn("stretch")
    network = model.head.regions.features.backbone  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (network.mean, network.std))
    regions = (torch.tensor([[4.0, 4, 28, 28], [50, 30, 80, 60]]),)
    colour = torch.tensor([1.0, -2, 0.5]).view(1, 3, 1, 1)
    with torch.no_grad():
        for image in (mean, mean + std * colour):
            model.head.decode(model(image.expand(1, 3, 48, 64), ((48, 64),), regions))
    plain, coloured = seen
    torch.testing.assert_close(plain, torch.zeros(2, 3, 32, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(coloured[:1], colour.expand(1, 3, 32, 32), rtol=0, atol=1e-5)
    assert not coloured[1, :, -8:].any()
    assert coloured[1, :, :8, :8].any()


def test_padding_between_the_images_of_a_batch_is_nothing_to_that_network() -> None:
    """A region at the border of the smaller image shows the same around it as at that of the larger: zeros."""
    model = rcnn("short_side")
    network = model.head.regions.features.backbone  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(model.fit.padding), torch.tensor(network.mean))
