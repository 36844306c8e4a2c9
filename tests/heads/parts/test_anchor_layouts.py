"""Where heads put their anchors, against torchvision's generator."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detkit.errors import ConfigError
from detkit.heads.parts.anchor_layouts import Pyramid, anchor_layouts

SIZES = ((32.0,), (64.0,), (128.0,))


def torchvision_anchors(image_size: tuple[int, int], map_sizes: list[tuple[int, int]]) -> Tensor:
    generator = AnchorGenerator(tuple((int(size),) for (size,) in SIZES), ((0.5, 1.0, 2.0),) * 3)
    maps = [torch.zeros(1, 1, *size) for size in map_sizes]
    return generator(ImageList(torch.zeros(1, 3, *image_size), [image_size]), maps)[0]


@pytest.mark.parametrize("image_size", [(128, 192), (100, 151), (97, 33), (800, 1333), (64, 64)])
def test_divided_anchors_equal_torchvision(image_size: tuple[int, int]) -> None:
    """Maps whose sizes were rounded up, as those of residual networks are."""
    strides = (8, 16, 32)
    map_sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides]
    expected = torchvision_anchors(image_size, map_sizes)
    divided = Pyramid(SIZES, divide=True)(map_sizes, image_size, strides)
    assert torch.equal(divided, expected)
    by_stride = Pyramid(SIZES)(map_sizes, image_size, strides)
    whole = all(side % 32 == 0 for side in image_size)
    assert torch.equal(by_stride, expected) == whole


def test_by_stride_anchors_stand_a_stride_apart() -> None:
    anchors = Pyramid(((16.0,),), ratios=(1.0,))([(3, 4)], (20, 30), (8,)).view(3, 4, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    assert centres[2, 3].tolist() == [24, 16]
    assert centres[0, 0].tolist() == [0, 0]


def test_a_map_of_the_whole_image_is_divided_always() -> None:
    layout = Pyramid(((16.0,),), ratios=(1.0,))
    assert torch.equal(layout([(1, 1)], (50, 70), (0,)), torch.tensor([[-8.0, -8, 8, 8]]))
    two = layout([(2, 2)], (50, 70), (0,))
    assert ((two[:, :2] + two[:, 2:]) / 2).tolist() == [[0, 0], [35, 0], [0, 25], [35, 25]]


def test_one_entry_serves_all_levels_and_others_must_fit() -> None:
    assert Pyramid(((8.0, 16.0),)).per_location(3) == [6, 6, 6]
    assert Pyramid(SIZES, ratios=(1.0,)).per_location(3) == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"have entries for 3 levels, but the model has 2 feature maps\. Give 2"):
        Pyramid(SIZES).per_location(2)


def test_config_takes_divide() -> None:
    built = anchor_layouts.build({"name": "pyramid", "sizes": [[32.0]], "divide": True}, "head.rpn.anchors")
    assert built.divide
    with pytest.raises(ConfigError, match=r"'head\.rpn\.anchors\.divided' is not an option.*'divide'"):
        anchor_layouts.build({"name": "pyramid", "sizes": [[32.0]], "divided": True}, "head.rpn.anchors")
