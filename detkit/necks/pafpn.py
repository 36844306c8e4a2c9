"""The neck of YOLOX: a feature pyramid, then a path back up from fine to coarse (Liu et al., "Path Aggregation Network
for Instance Segmentation", CVPR 2018; Ge et al. 2021, "YOLOX")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.backbones.base import Neck
from detkit.backbones.csp_darknet import Convolution, CrossStage, block_count, convolution
from detkit.errors import ConfigError, check_range
from detkit.registry import necks


@necks.register("pafpn")
class PathAggregation(Neck):
    """Three maps in, three of the same channels and strides out; layers are named as in YOLOX's published weights.

    From coarse to fine a map is narrowed, enlarged (nearest neighbour), put beside the finer one and mixed with it by
    cross-stage partial blocks; then the same from fine to coarse, with convolutions of stride 2.

    Args:
        channels: channels of the maps that come in.
        strides: their strides, each twice the one before.
        depth: bottlenecks of each block, as a multiple of 3; at least one.
        depthwise: 3x3 convolutions become a depthwise and a pointwise one.

    Raises:
        ConfigError: there are not three maps of such strides, or `depth` is out of range.
    """

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], depth: float = 0.33, depthwise: bool = False
    ) -> None:
        super().__init__()
        check_range("neck", 0, 8, depth=depth)
        if len(strides) != 3 or strides[0] < 1 or list(strides) != [strides[0] * factor for factor in (1, 2, 4)]:
            raise ConfigError(
                f"The neck 'pafpn' needs three maps, each of half the size of the one before, but the backbone gives "
                f"maps of strides {list(strides)}. Choose others by the backbone's 'levels'."
            )
        self.channels, self.strides = tuple(channels), tuple(strides)
        fine, middle, coarse = channels
        blocks = block_count(depth)

        def mix(channels_in: int, channels_out: int) -> CrossStage:
            return CrossStage(channels_in, channels_out, blocks, shortcut=False, depthwise=depthwise)

        self.lateral_conv0 = Convolution(coarse, middle, 1)
        self.C3_p4 = mix(2 * middle, middle)
        self.reduce_conv1 = Convolution(middle, fine, 1)
        self.C3_p3 = mix(2 * fine, fine)
        self.bu_conv2 = convolution(fine, fine, 2, depthwise)
        self.C3_n3 = mix(2 * fine, middle)
        self.bu_conv1 = convolution(middle, middle, 2, depthwise)
        self.C3_n4 = mix(2 * middle, coarse)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps [(B, channels[i], h_i, w_i)] of the sizes that came in.

        Args:
            features: [(B, channels[i], h_i, w_i)], finest first, each half as large as the one before, rounded up.
        """
        fine, middle, coarse = features
        narrow_coarse = self.lateral_conv0(coarse)
        narrow_middle = self.reduce_conv1(self.C3_p4(_beside(narrow_coarse, middle)))
        fine = self.C3_p3(_beside(narrow_middle, fine))
        middle = self.C3_n3(torch.cat((self.bu_conv2(fine), narrow_middle), dim=1))
        coarse = self.C3_n4(torch.cat((self.bu_conv1(middle), narrow_coarse), dim=1))
        return [fine, middle, coarse]


def _beside(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarse map, enlarged to the size of the fine one, and that one as further channels."""
    height, width = fine.shape[2:]
    # Doubled and cut, not scaled to an odd size, which would move it against the finer map.
    enlarged = F.interpolate(coarse, scale_factor=2, mode="nearest")[..., :height, :width]
    return torch.cat((enlarged, fine), dim=1)
