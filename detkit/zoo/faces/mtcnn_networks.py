"""The three networks of MTCNN (Zhang et al. 2016, figure 2), as the published Caffe model has them."""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn

POINTS = 5


class StageOutputs(NamedTuple):
    """Outputs of a network for N windows; of the P-Net for each location on a larger image, in trailing dimensions.

    Args:
        logits: (N, 1 + C, ...), of "nothing" first, then of the classes.
        offsets: (N, 4, ...) of left, top, right and bottom edge, as parts of the window's side.
        points: (N, 10, ...) x of the five points, then y, as parts of the window's sides; None but for the O-Net.
    """

    logits: Tensor
    offsets: Tensor
    points: Tensor | None


class Stage(nn.Module):
    """Convolutions with PReLU and pooling, then one layer for each kind of output.

    Attributes:
        side: of its windows in pixels.
    """

    side: int

    def __init__(self, trunk: "OrderedDict[str, nn.Module]", face: nn.Module, box: nn.Module, points: nn.Module | None):
        super().__init__()
        self.trunk, self.face, self.box, self.points = nn.Sequential(trunk), face, box, points

    def forward(self, windows: Tensor) -> StageOutputs:
        """Of (N, 3, side, side) pixels in -1..1."""
        features = self.trunk(windows)
        points = None if self.points is None else self.points(features)
        return StageOutputs(self.face(features), self.box(features), points)


class ProposalNet(Stage):
    """P-Net: of 12 pixels, and fully convolutional, so that it runs over a whole image in steps of 2 pixels."""

    side = 12

    def __init__(self, num_classes: int) -> None:
        layers = OrderedDict(
            [*_convolution(1, 3, 10, 3, (2, 2)), *_convolution(2, 10, 16, 3), *_convolution(3, 16, 32)]
        )
        super().__init__(layers, nn.Conv2d(32, 1 + num_classes, 1), nn.Conv2d(32, 4, 1), None)


class RefineNet(Stage):
    """R-Net: of 24 pixels."""

    side = 24

    def __init__(self, num_classes: int) -> None:
        layers = OrderedDict(
            [
                *_convolution(1, 3, 28, 3, (3, 2)),
                *_convolution(2, 28, 48, 3, (3, 2)),
                *_convolution(3, 48, 64, 2),
                *_dense(4, 576, 128),
            ]
        )
        super().__init__(layers, nn.Linear(128, 1 + num_classes), nn.Linear(128, 4), None)


class OutputNet(Stage):
    """O-Net: of 48 pixels, with the five points."""

    side = 48

    def __init__(self, num_classes: int) -> None:
        layers = OrderedDict(
            [
                *_convolution(1, 3, 32, 3, (3, 2)),
                *_convolution(2, 32, 64, 3, (3, 2)),
                *_convolution(3, 64, 64, 3, (2, 2)),
                *_convolution(4, 64, 128, 2),
                *_dense(5, 1152, 256),
            ]
        )
        super().__init__(layers, nn.Linear(256, 1 + num_classes), nn.Linear(256, 4), nn.Linear(256, 2 * POINTS))


class _ColumnsFirst(nn.Module):
    """(N, C, h, w) to (N, w·h·C), in the order in which the published dense layers read them: Caffe's, of images that
    Matlab had transposed."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 3, 2, 1).flatten(1)


def _convolution(
    number: int, incoming: int, width: int, kernel: int = 3, pool: tuple[int, int] | None = None
) -> list[tuple[str, nn.Module]]:
    """One layer without padding, and where `pool` gives (kernel, stride) a maximum behind it."""
    layers: list[tuple[str, nn.Module]] = [
        (f"conv{number}", nn.Conv2d(incoming, width, kernel)),
        (f"prelu{number}", nn.PReLU(width)),
    ]
    if pool is not None:
        layers.append((f"pool{number}", nn.MaxPool2d(*pool, ceil_mode=True)))
    return layers


def _dense(number: int, incoming: int, width: int) -> list[tuple[str, nn.Module]]:
    return [
        ("flatten", _ColumnsFirst()),
        (f"dense{number}", nn.Linear(incoming, width)),
        (f"prelu{number}", nn.PReLU(width)),
    ]
