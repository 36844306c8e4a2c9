"""The max-unpooling decoder."""

from pathlib import Path

import pytest
import torch
from torch import nn

from detkit.config import load_experiment
from detkit.engine.train import train
from detkit.errors import ConfigError
from detkit.registry import backbones
from detkit.structures import Inputs
from detkit.zoo.segnet.head import Unpool

SMALL = {"name": "vgg11", "batch_norm": True, "levels": [2]}


def built(**options: object) -> Unpool:
    return Unpool((3,), (1,), 4, **{"encoder": SMALL, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_each_maximum_returns_to_the_pixel_it_came_from(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    head = built()
    monkeypatch.setattr(head.backbone, "stages", lambda: [nn.Sequential(nn.Identity())] * 2)
    head.decoder = nn.ModuleList([nn.Identity(), nn.Identity()])
    image = torch.rand(2, 3, *size)
    found = head([image * head.std + head.mean], Inputs(size, (size,) * 2)).logits
    # After two pools only the largest of each 4x4 block is left, where it was.
    expected = torch.zeros_like(image)
    for picture in range(2):
        for channel in range(3):
            for top in range(0, size[0], 4):
                for left in range(0, size[1], 4):
                    block = image[picture, channel, top : top + 4, left : left + 4]
                    row, column = divmod(int(block.argmax()), block.shape[1])
                    expected[picture, channel, top + row, left + column] = block.max()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 48), (33, 50), (3, 5)])
def test_any_size_of_input_gives_logits_of_that_size(size: tuple[int, int]) -> None:
    logits = built().eval()([torch.rand(2, 3, *size)], Inputs(size, (size,) * 2)).logits
    assert tuple(logits.shape) == (2, 4, *size)


def test_the_decoder_is_the_mirror_image_of_the_encoder() -> None:
    head = Unpool((3,), (1,), 4, encoder={"name": "vgg16", "batch_norm": True})
    shapes = [tuple(m.weight.shape[:2]) for m in head.decoder.modules() if isinstance(m, nn.Conv2d)]
    encoder = [tuple(m.weight.shape[:2]) for m in head.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(shapes) == 13
    assert shapes[:-1] == [(channels_in, channels_out) for channels_out, channels_in in reversed(encoder)][:-1]
    assert shapes[-1] == (4, 64)
    norms = [m for m in head.decoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 12


def test_what_cannot_be_unpooled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Use backbone: \{name: pixels\}"):
        Unpool((64,), (8,), 2)
    with pytest.raises(ConfigError, match=r"'head\.encoder' .* must be a VGG network.*'resnet18'"):
        built(encoder={"name": "resnet18"})


def test_padding_of_images_is_the_encoders_mean() -> None:
    from detkit.model import build_model
    from detkit.structures import ClassList

    config = load_experiment([str(Path(__file__).parents[3] / "configs" / "unpool_shapes.yaml")])
    model = build_model(config, ClassList.from_names(list("abcde")), load_weights=False)
    assert model.fit.padding == backbones.build({"name": "vgg11"}, "backbone").mean


@pytest.mark.slow
def test_training_finds_the_shapes(tmp_path: Path) -> None:
    config = str(Path(__file__).parents[3] / "configs" / "unpool_shapes.yaml")
    fewer = ["--train.epochs", "10", "--train.validate_every", "10", "--train.workers", "0"]
    folder = train(load_experiment([config], ["--runs", str(tmp_path), *fewer]))
    assert folder is not None
    rows = (folder.path / "metrics.csv").read_text().splitlines()
    figures = dict(zip(rows[0].split(","), rows[-1].split(",")))
    assert float(figures["mIoU"]) > 0.3  # 0.18 where all is taken for background
