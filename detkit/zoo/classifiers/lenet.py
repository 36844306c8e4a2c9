"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from detkit.backbones.base import Backbone
from detkit.registry import backbones

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}


@backbones.register("lenet")
class LeNet(Backbone):
    """The convolutions of LeNet-5: 6 and 16 channels of 5x5, each with an activation and 2x2 average pooling.

    The first is padded by 2, so that 28x28 pixels give 5x5 cells. Its fully connected layers are part of the head:
    {name: classify, pool: 5, widths: [120, 84]}. It reads RGB in -1..1.

    Args:
        activation: tanh as in the paper, sigmoid as in textbooks, or relu.
    """

    channels = (16,)
    strides = (4,)
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, activation: Literal["tanh", "sigmoid", "relu"] = "tanh") -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.block1 = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), act(), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(6, 16, 5), act(), nn.AvgPool2d(2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute one map [(B, 16, (H - 4) // 4, (W - 4) // 4)].

        Args:
            images: (B, 3, H, W) normalized RGB, H and W at least 12.
        """
        return [self.block2(self.block1(images))]

    def stages(self) -> Sequence[nn.Module]:
        """Return the two blocks."""
        return [self.block1, self.block2]
