"""Style transfer: an image with the content of one and the style of another.

Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks", and Johnson et al. 2016, "Perceptual
Losses for Real-Time Style Transfer and Super-Resolution".
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.backbones.base import Backbone
from detkit.data.image import read_image, resized
from detkit.errors import ConfigError, DataError, check_range
from detkit.heads.base import Head, Postprocess, check_count
from detkit.heads.parts.losses import gram_matrix, style_loss, total_variation
from detkit.registry import backbones, heads
from detkit.structures import Inputs, Target
from detkit.zoo.style.network import SMALLEST_SIDE, StyleNetwork
from detkit.zoo.style.structures import Rendering


class StyleOutputs(NamedTuple):
    """Raw outputs of the style head.

    Args:
        images: (B, 3, H, W) RGB in 0..1, what the network made; 0 where there is padding.
        contents: (B, 3, H, W) what it was given.
        sizes: (height, width) of each image, without padding.
    """

    images: Tensor
    contents: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("style")
class Style(Head):
    """A network that paints every image in the style of one, and the loss that it learns by.

    The loss compares feature maps of a frozen network, the loss network: with those of the content where things are,
    with the Gram matrices of the style how they look. It alone, without the network that paints, is what
    `detkit style CONFIG.yaml --content A --style B` lowers by changing the pixels of one image.

    Checkpoints hold the loss network and the style's Gram matrices, so that an evaluation needs no other file.

    Args:
        channels, strides: (3,) and (1,), those of the backbone `pixels`.
        num_classes: of no use here.
        network: the loss network, `name` of a backbone and its options, among them the maps that it gives: of a VGG
            `layers`. Default: VGG-19 with its ImageNet weights, the first convolution of each block, and the last one
            of block 4.
        style_image: the file with the style.
        style_size: to how many pixels the longer side of the style is brought; strokes are larger in the result the
            larger they are in it.
        content_map: which of the network's maps, counted from 0, is compared with the content's.
        style_maps: likewise, with the style's.
        content_weight: factor of the mean squared difference of features.
        style_weights: factor of the mean squared difference of Gram matrices, for each of `style_maps`; those of deeper
            maps are smaller by orders of magnitude.
        variation_weight: factor of the total variation, that of images in 0..1.
        width, blocks: of the network that paints, see StyleNetwork.

    Raises:
        ConfigError: an option makes no sense, or the backbone is another one.
        CheckpointError: the loss network's weights are not available.
    """

    task: ClassVar[str] = "style"
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_sizes: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        network: dict[str, Any] | None = None,
        style_image: str | None = None,
        style_size: int = 256,
        content_map: int = 4,
        style_maps: tuple[int, ...] = (0, 1, 2, 3, 5),
        content_weight: float = 1.0,
        style_weights: tuple[float, ...] = (1e3, 1e3, 1e3, 1e3, 1e3),
        variation_weight: float = 10.0,
        width: int = 32,
        blocks: int = 5,
    ) -> None:
        super().__init__()
        if tuple(channels) != (3,) or tuple(strides) != (1,):
            raise ConfigError("The head 'style' paints images themselves: it needs backbone {name: pixels}, no neck.")
        check_range("head", 0, content_weight=content_weight, variation_weight=variation_weight)
        check_range("head", 1, style_size=style_size, width=width)
        check_range("head", 0, blocks=blocks)
        self.network: Backbone = backbones.build(DEFAULT_NETWORK if network is None else network, "head.network")
        self.network.freeze(len(self.network.stages()))
        self.network.requires_grad_(False)
        self._check_maps(content_map, style_maps, style_weights)
        self.style_image, self.style_size = style_image, style_size
        self.content_map, self.style_maps = content_map, style_maps
        self.content_weight, self.style_weights, self.variation_weight = content_weight, style_weights, variation_weight
        self.painter = StyleNetwork(width, blocks)
        for number, index in enumerate(style_maps):
            count = self.network.channels[index]
            self.register_buffer(f"gram_{number}", torch.zeros(1, count, count))

    def _check_maps(self, content: int, styles: tuple[int, ...], weights: tuple[float, ...]) -> None:
        count = len(self.network.channels)
        for name, index in (("content_map", content), *(("style_maps", index) for index in styles)):
            check_range("head", 0, count - 1, **{name: index})
        if not styles or len(styles) != len(weights) or min(weights) < 0:
            raise ConfigError(
                f"'head.style_weights' must be a number of at least 0 for each of the {len(styles)} "
                f"'head.style_maps', of which at least one is needed, but is {list(weights)}."
            )

    def prepare(self) -> None:
        """Take in the style from its file.

        Raises:
            ConfigError: there is none.
            DataError: it cannot be read.
        """
        if self.style_image is None:
            raise ConfigError("The head 'style' needs 'head.style_image', the file with the style.")
        pixels = resized(read_image(self.style_image), self.style_size)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            maps = self.maps(image)
            for number, index in enumerate(self.style_maps):
                self.get_buffer(f"gram_{number}").copy_(gram_matrix(maps[index]))

    def forward(self, features: list[Tensor], inputs: Inputs) -> StyleOutputs:
        """The painted images, for the one map of `pixels`, (B, 3, H, W).

        Raises:
            DataError: an image is smaller than the network can paint.
        """
        contents = features[0]
        if min(map(min, inputs.sizes)) < SMALLEST_SIDE:
            raise DataError(
                f"An image has a side of {min(map(min, inputs.sizes))} pixels, but can only be painted with sides of "
                f"{SMALLEST_SIDE} or more."
            )
        if all(size == inputs.size for size in inputs.sizes):
            return StyleOutputs(self.painter(contents), contents, inputs.sizes)
        # One by one: an instance norm over the padding would let an image depend on the others of its batch.
        images = []
        for content, (height, width) in zip(contents.split(1), inputs.sizes):
            painted = self.painter(content[:, :, :height, :width])
            images.append(F.pad(painted, (0, inputs.size[1] - width, 0, inputs.size[0] - height)))
        return StyleOutputs(torch.cat(images), contents, inputs.sizes)

    def loss(self, outputs: StyleOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """`content`, `style` and `variation`, each the weighted mean over the images.

        Raises:
            ValueError: the number of targets differs from the number of images.
            DataError: an image is too small for the loss network.
        """
        check_count(targets, outputs.sizes)
        images, contents = outputs.images, outputs.contents
        whole = all(size == tuple(images.shape[2:]) for size in outputs.sizes)
        groups = [(images, contents)] if whole else [
            (image[:, :, :height, :width], content[:, :, :height, :width])
            for image, content, (height, width) in zip(images.split(1), contents.split(1), outputs.sizes)
        ]  # fmt: skip
        losses = [self.compare(painted, self.content_features(content)) for painted, content in groups]
        return {name: torch.stack([group[name] for group in losses]).mean() for name in losses[0]}

    @torch.no_grad()
    def content_features(self, contents: Tensor) -> Tensor:
        """The reference for `compare`, from (B, 3, H, W) contents in 0..1."""
        return self.maps(contents)[self.content_map]

    def compare(self, images: Tensor, content: Tensor) -> dict[str, Tensor]:
        """The three losses of (B, 3, H, W) images in 0..1, against `content_features` and the style."""
        maps = self.maps(images)
        style = [
            weight * style_loss(maps[index], self.get_buffer(f"gram_{number}"))
            for number, (index, weight) in enumerate(zip(self.style_maps, self.style_weights))
        ]
        return {
            "content": self.content_weight * F.mse_loss(maps[self.content_map], content),
            "style": torch.stack(style).sum(),
            "variation": self.variation_weight * total_variation(images),
        }

    def maps(self, images: Tensor) -> list[Tensor]:
        """The loss network's maps of (B, 3, H, W) images in 0..1, standardised as it was trained.

        Raises:
            DataError: the images are too small for it.
        """
        stride = max(self.network.strides)
        if min(images.shape[2:]) < stride:
            raise DataError(
                f"An image of {images.shape[3]} x {images.shape[2]} pixels is too small for the loss network, "
                f"whose deepest map has one step for {stride}. Take a larger image or size, or fewer maps."
            )
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.network.mean, self.network.std))
        return self.network((images - mean) / std)

    @torch.no_grad()
    def decode(self, outputs: StyleOutputs, options: Postprocess | None = None) -> list[Rendering]:
        """The painted images, without padding."""
        return [
            Rendering(image[:, :height, :width].float().clone())
            for image, (height, width) in zip(outputs.images, outputs.sizes)
        ]


DEFAULT_NETWORK = {
    "name": "vgg19",
    "weights": "imagenet",
    "layers": ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv4_4", "conv5_1"],
}
