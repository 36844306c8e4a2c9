"""Style transfer: what the head's losses compare, and that its network paints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.errors import ConfigError, DataError
from detkit.registry import heads
from detkit.structures import Inputs, Target
from detkit.tasks.drawing import write_image
from detkit.zoo.style.head import Style, StyleOutputs
from detkit.zoo.style.network import StyleNetwork

OPTIONS: dict[str, Any] = {
    "network": {"name": "vgg11", "layers": ["conv1_1", "conv2_1", "conv3_1"]},
    "content_map": 2,
    "style_maps": [0, 1],
    "style_weights": [3.0, 5.0],
    "content_weight": 2.0,
    "variation_weight": 7.0,
    "style_size": 24,
    "width": 4,
    "blocks": 1,
}


def build(**options: Any) -> Style:
    torch.manual_seed(0)
    head: Style = heads.build(
        {"name": "style", **OPTIONS, **options}, "head", channels=(3,), strides=(1,), num_classes=0
    )
    torch.nn.init.normal_(head.painter.last.weight, std=0.1)  # it paints nothing at first
    return head


@pytest.fixture
def style_image(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (36, 48, 3), dtype=np.uint8)
    write_image(tmp_path / "style.png", pixels)
    return str(tmp_path / "style.png")


def gram(features: Tensor) -> Tensor:
    flat = features[0].flatten(1)
    return torch.einsum("ap,bp->ab", flat, flat) / flat.numel()


def test_losses_are_those_of_the_definitions(style_image: str) -> None:
    head = build(style_image=style_image)
    head.prepare()
    from PIL import Image

    style = np.asarray(Image.open(style_image).resize((24, 18), Image.Resampling.LANCZOS)).copy()
    image, content = torch.rand(1, 3, 32, 40), torch.rand(1, 3, 32, 40)
    found = head.compare(image, head.content_features(content))

    def maps(pixels: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return head.network((pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))

    of_style = maps(torch.from_numpy(style).permute(2, 0, 1)[None] / 255)
    of_image, of_content = maps(image), maps(content)
    torch.testing.assert_close(found["content"], 2 * (of_image[2] - of_content[2]).square().mean())
    expected = sum(
        weight * (gram(of_image[index]) - gram(of_style[index])).square().mean()
        for index, weight in ((0, 3.0), (1, 5.0))
    )
    torch.testing.assert_close(found["style"], expected)
    down, right = (image[:, :, 1:] - image[:, :, :-1]).abs(), (image[..., 1:] - image[..., :-1]).abs()
    torch.testing.assert_close(found["variation"], 7 * 0.5 * (down.mean() + right.mean()))


def test_the_content_itself_has_no_content_loss_and_the_style_itself_no_style_loss(style_image: str) -> None:
    head = build(style_image=style_image, style_size=48)
    head.prepare()
    from PIL import Image

    style = torch.from_numpy(np.asarray(Image.open(style_image)).copy()).permute(2, 0, 1)[None] / 255
    losses = head.compare(style, head.content_features(style))
    assert losses["content"] == 0
    assert float(losses["style"]) == pytest.approx(0, abs=1e-9)


def test_only_the_network_that_paints_learns(style_image: str) -> None:
    head = build(style_image=style_image).train()
    assert not any(parameter.requires_grad for parameter in head.network.parameters())
    assert all(parameter.requires_grad for parameter in head.painter.parameters())


def test_an_image_does_not_depend_on_its_padding_and_its_batch() -> None:
    """Painted and compared alone, and in a batch of larger images."""
    head = build()
    small, large = torch.rand(1, 3, 33, 46), torch.rand(1, 3, 48, 64)
    padded = F.pad(small, (0, 18, 0, 15), value=0.5)
    together = head([torch.cat((padded, large))], Inputs((48, 64), ((33, 46), (48, 64))))
    alone = [head([image], Inputs(size, (size,))) for image, size in ((small, (33, 46)), (large, (48, 64)))]
    for mine, single in zip(head.decode(together), alone):
        torch.testing.assert_close(mine.image, head.decode(single)[0].image)
    losses = head.loss(together, (Target.empty(),) * 2)
    apart = [head.loss(single, (Target.empty(),)) for single in alone]
    for name, value in losses.items():
        torch.testing.assert_close(value, (apart[0][name] + apart[1][name]) / 2)
    same = torch.rand(2, 3, 32, 32)
    both = head([same], Inputs((32, 32), ((32, 32),) * 2))
    singles = [head([image], Inputs((32, 32), ((32, 32),))) for image in same.split(1)]
    for name, value in head.loss(both, (Target.empty(),) * 2).items():
        torch.testing.assert_close(value, sum(head.loss(one, (Target.empty(),))[name] for one in singles) / 2)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (31, 17), (64, 48)])
def test_images_keep_their_size(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    network = StyleNetwork(width=4, blocks=2)
    standardised = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(network(images), standardised.sigmoid(), rtol=1e-3, atol=1e-3)
    torch.nn.init.normal_(network.last.weight)
    painted = network(images)
    assert painted.shape == (2, 3, *size)
    assert ((painted >= 0) & (painted <= 1)).all()
    assert (painted - images).abs().mean() > 0.05


def test_images_that_are_too_small_are_refused() -> None:
    head = build(network={"name": "vgg11", "layers": ["conv1_1", "conv5_1"]}, content_map=1, style_maps=[0, 1])
    with pytest.raises(DataError, match="12 x 20 pixels is too small for the loss network"):
        head.compare(torch.rand(1, 3, 20, 12), torch.zeros(1))
    with pytest.raises(DataError, match="a side of 7 pixels"):
        head([torch.rand(1, 3, 7, 12)], Inputs((7, 12), ((7, 12),)))


def test_outputs_of_many_images_decode_without_their_padding() -> None:
    outputs = StyleOutputs(torch.rand(2, 3, 10, 12), torch.rand(2, 3, 10, 12), ((8, 12), (10, 9)))
    for found, image, (height, width) in zip(build().decode(outputs), outputs.images, outputs.sizes):
        assert torch.equal(found.image, image[:, :height, :width])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content_map": 3}, r"'head\.content_map' must be in 0\.\.2"),
        ({"style_maps": [0, 3]}, r"'head\.style_maps' must be in 0\.\.2"),
        ({"style_weights": [1.0]}, "a number of at least 0 for each of the 2"),
        ({"style_weights": [1.0, -1.0]}, "a number of at least 0"),
        ({"style_maps": [], "style_weights": []}, "at least one is needed"),
        ({"content_weight": -1.0}, r"'head\.content_weight' must be at least 0"),
        ({"width": 0}, r"'head\.width' must be at least 1"),
        ({"network": {"name": "vgg91"}}, "no backbone named 'vgg91'"),
        ({"style_imgae": "a.jpg"}, r"Did you mean 'style_image'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_another_backbone_than_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs backbone \{name: pixels\}"):
        heads.build({"name": "style", **OPTIONS}, "head", channels=(8,), strides=(4,), num_classes=0)


def test_a_style_that_is_not_given_or_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"needs 'head\.style_image'"):
        build().prepare()
    with pytest.raises(DataError, match=r"'nowhere\.jpg' does not exist"):
        build(style_image="nowhere.jpg").prepare()


def test_learns_to_paint_one_image(style_image: str) -> None:
    head = build(style_image=style_image, width=8, content_weight=1.0, style_weights=[1.0, 1.0], variation_weight=0.0)
    head.prepare()
    contents = torch.rand(2, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(head.painter.parameters(), 1e-2)
    totals = []
    for _ in range(60):
        losses = head.loss(head([contents], Inputs((32, 32), ((32, 32),) * 2)), (Target.empty(),) * 2)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.3 * totals[0]
