"""FCN: bilinear enlargement, skips, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from detkit.errors import ConfigError
from detkit.heads.fcn import FCN, bilinear_kernel, fitted
from detkit.registry import backbones, heads
from detkit.structures import Inputs


def inputs(size: tuple[int, int], count: int = 1) -> Inputs:
    return Inputs(size, (size,) * count)


def randomised(head: FCN) -> FCN:
    for score in head.scores:
        torch.nn.init.normal_(score.weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(score.bias)  # type: ignore[arg-type]
    return head


def enlarged(scores: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 32])
def test_the_kernel_interpolates_bilinearly_but_at_the_border(factor: int) -> None:
    scores = torch.randn(2, 1, 6, 5)
    kernel = bilinear_kernel(factor)[None, None]
    found = F.conv_transpose2d(scores, kernel, stride=factor, padding=factor // 2)
    inside = (..., slice(factor // 2, -factor // 2), slice(factor // 2, -factor // 2))
    torch.testing.assert_close(found[inside], enlarged(scores, factor)[inside])


@pytest.mark.parametrize(("finest", "used"), [(32, 1), (16, 2), (8, 3)])
def test_scores_of_coarse_maps_are_enlarged_and_added_to_finer_ones(finest: int, used: int) -> None:
    head = randomised(FCN((5, 6, 7, 8), (4, 8, 16, 32), 3, finest_stride=finest))
    assert len(head.scores) == used
    maps = [
        torch.randn(2, channels, 256 // stride, 256 // stride) for channels, stride in zip((5, 6, 7, 8), (4, 8, 16, 32))
    ]
    with torch.no_grad():
        found = head(maps, inputs((256, 256), 2)).logits
        total = 0.0
        for layer, level in zip(reversed(head.scores), (3, 2, 1)):
            here = layer(maps[level])
            total = here if level == 3 else enlarged(total, 2) + here
        expected = enlarged(total, finest)
    # At the border the paper's transposed convolution sees zeros, interpolation the last score again.
    inside = (..., slice(64, -64), slice(64, -64))
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-4, atol=1e-5)


def test_border_pixels_are_of_the_class_that_interpolation_gives_them() -> None:
    """One map, enlarged at once: zeros beyond the border make all logits of a pixel smaller by one factor."""
    head = randomised(FCN((4,), (8,), 5))
    maps = [torch.randn(1, 4, 6, 7)]
    found = head(maps, inputs((48, 56))).logits
    expected = enlarged(head.scores[0](maps[0]), 8)
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("size", [(97, 130), (33, 64), (64, 95)])
@pytest.mark.parametrize("network", ["resnet18", "vgg11"])
def test_any_size_of_input_gives_logits_of_that_size(network: str, size: tuple[int, int]) -> None:
    """ResNet rounds the sizes of maps up, VGG down."""
    backbone = backbones.build({"name": network, "levels": [3, 4, 5]}, "backbone").eval()
    head = randomised(heads.build({"name": "fcn", "finest_stride": 4 if network == "vgg11" else 8}, "head",
                                  channels=backbone.channels, strides=backbone.strides, num_classes=2))  # fmt: skip
    with torch.no_grad():
        logits = head(backbone(torch.randn(1, 3, *size)), inputs(size)).logits
    assert tuple(logits.shape) == (1, 2, *size)
    assert torch.isfinite(logits).all()


def test_a_map_that_ends_early_is_continued_by_its_last_row_and_column() -> None:
    scores = torch.arange(6.0).view(1, 1, 2, 3)
    assert fitted(scores, (3, 5))[0, 0].tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5]]
    assert fitted(scores, (1, 2))[0, 0].tolist() == [[0, 1]]


def test_at_the_start_all_classes_are_equally_probable() -> None:
    head = FCN((4, 4), (8, 16), 3)
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    assert (head(maps, inputs((64, 64))).logits == 0).all()
    # 0 for all maps but the score layers, so that the bilinear weights stay what is added up
    assert math.isclose(head.enlargements[0].weight.sum().item(), 3 * 4)


def test_a_hidden_layer_stands_between_the_coarsest_map_and_its_scores_only() -> None:
    head = randomised(FCN((4, 5), (8, 16), 3, hidden=7)).eval()
    assert [score.in_channels for score in head.scores] == [4, 7]  # type: ignore[union-attr]
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 5, 4, 4)]
    assert head.hidden is not None
    plain = FCN((4, 7), (8, 16), 3)
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if not name.startswith("hidden")})
    expected = plain([maps[0], head.hidden(maps[1])], inputs((64, 64))).logits
    assert torch.equal(head(maps, inputs((64, 64))).logits, expected)
    with pytest.raises(ConfigError, match=r"'head\.hidden' must be at least 1"):
        FCN((4,), (8,), 2, hidden=0)


def test_strides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'head\.finest_stride' is 8, but the feature maps have the strides \[16, 32\]"
    ):
        FCN((4, 4), (16, 32), 2)
    with pytest.raises(ConfigError, match=r"even factors, but the feature maps have the strides \[8, 24\]"):
        FCN((4, 4), (8, 24), 2)
    with pytest.raises(ConfigError, match="even factors"):
        FCN((4,), (1,), 2, finest_stride=1)
