"""The neck of YOLOX: a top-down feature pyramid followed by a bottom-up path (Liu et al., "Path Aggregation Network
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
    """Fuses three maps and keeps their channels and strides; layer names are those of YOLOX's published weights.

    Top-down, a map is reduced in channels, upsampled (nearest neighbour), concatenated with the finer map and fused by
    a cross-stage partial block; then likewise bottom-up, with convolutions of stride 2.

    Args:
        channels: channels of the input maps.
        strides: strides of the input maps, each twice the previous one.
        depth: bottlenecks of each block, as a multiple of 3; at least one.
        depthwise: replace 3x3 convolutions by a depthwise and a pointwise one.

    Raises:
        ConfigError: the input is not three maps of such strides, or `depth` is out of range.
    """

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], depth: float = 0.33, depthwise: bool = False
    ) -> None:
        super().__init__()
        check_range("neck", 0, 8, depth=depth)
        if len(strides) != 3 or strides[0] < 1 or list(strides) != [strides[0] * factor for factor in (1, 2, 4)]:
            raise ConfigError(
                f"The neck 'pafpn' needs three maps, each half the size of the previous one, but the backbone gives "
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
        """Maps [(B, channels[i], h_i, w_i)] of the input sizes.

        Args:
            features: [(B, channels[i], h_i, w_i)], from fine to coarse, each half the previous size, rounded up.
        """
        fine, middle, coarse = features
        narrow_coarse = self.lateral_conv0(coarse)
        narrow_middle = self.reduce_conv1(self.C3_p4(_beside(narrow_coarse, middle)))
        fine = self.C3_p3(_beside(narrow_middle, fine))
        middle = self.C3_n3(torch.cat((self.bu_conv2(fine), narrow_middle), dim=1))
        coarse = self.C3_n4(torch.cat((self.bu_conv1(middle), narrow_coarse), dim=1))
        return [fine, middle, coarse]


def _beside(coarse: Tensor, fine: Tensor) -> Tensor:
    """Upsample the coarse map to the size of the fine one and concatenate both along the channels."""
    height, width = fine.shape[2:]
    # Doubled and cropped: scaling to an odd size would misalign it with the finer map.
    enlarged = F.interpolate(coarse, scale_factor=2, mode="nearest")[..., :height, :width]
    return torch.cat((enlarged, fine), dim=1)
