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
        images: (B, 3, H, W) RGB in 0..1, the generated images; 0 in the padding.
        contents: (B, 3, H, W), the input images.
        sizes: (height, width) of each image, without padding.
    """

    images: Tensor
    contents: Tensor
    sizes: tuple[tuple[int, int], ...]


@heads.register("style")
class Style(Head):
    """A network that renders images in the style of one style image, and the loss that trains it.

    The loss uses the feature maps of a frozen loss network: features are compared with those of the content image, and
    Gram matrices with those of the style image. `detkit style CONFIG.yaml --content A --style B` uses the loss alone
    and minimizes it over the pixels of one image.

    Checkpoints contain the loss network and the style's Gram matrices, so that evaluation needs no other file.

    Args:
        channels, strides: (3,) and (1,), those of the backbone `pixels`.
        num_classes: not used.
        network: the loss network: `name` and options of a backbone, including the maps to compare (`layers` of a VGG).
            Default: VGG-19 with ImageNet weights, the first convolution of each block and the last one of block 4.
        style_image: path of the style image.
        style_size: length in pixels to which the longer side of the style image is resized; the scale of strokes in the
            result grows with it.
        content_map: index, from 0, of the map of the loss network that is compared with the content.
        style_maps: indices of the maps whose Gram matrices are compared with the style.
        content_weight: factor of the mean squared difference of features.
        style_weights: factors of the mean squared differences of Gram matrices, one for each of `style_maps`; the
            differences of deeper maps are smaller by orders of magnitude.
        variation_weight: factor of the total variation of images in 0..1.
        width, blocks: of the rendering network, see StyleNetwork.

    Raises:
        ConfigError: an option is not valid, or the backbone is not `pixels`.
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
            raise ConfigError("The head 'style' renders images, so it needs backbone {name: pixels} without a neck.")
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
        """Read the style image and compute its Gram matrices.

        Raises:
            ConfigError: no style image is set.
            DataError: it cannot be read.
        """
        if self.style_image is None:
            raise ConfigError("The head 'style' needs 'head.style_image', the path of the style image.")
        pixels = resized(read_image(self.style_image), self.style_size)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            maps = self.maps(image)
            for number, index in enumerate(self.style_maps):
                self.get_buffer(f"gram_{number}").copy_(gram_matrix(maps[index]))

    def forward(self, features: list[Tensor], inputs: Inputs) -> StyleOutputs:
        """Render images from the one map of `pixels`, (B, 3, H, W).

        Raises:
            DataError: an image is too small for the network.
        """
        contents = features[0]
        if min(map(min, inputs.sizes)) < SMALLEST_SIDE:
            raise DataError(
                f"An image has a side of {min(map(min, inputs.sizes))} pixels, but style transfer needs sides of "
                f"{SMALLEST_SIDE} or more."
            )
        if all(size == inputs.size for size in inputs.sizes):
            return StyleOutputs(self.painter(contents), contents, inputs.sizes)
        # One by one: instance norm over the padding would make images depend on the others of their batch.
        images = []
        for content, (height, width) in zip(contents.split(1), inputs.sizes):
            painted = self.painter(content[:, :, :height, :width])
            images.append(F.pad(painted, (0, inputs.size[1] - width, 0, inputs.size[0] - height)))
        return StyleOutputs(torch.cat(images), contents, inputs.sizes)

    def loss(self, outputs: StyleOutputs, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Compute `content`, `style` and `variation`, each the weighted mean over the images.

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
        """Compute the features of contents (B, 3, H, W) in 0..1 for `compare`."""
        return self.maps(contents)[self.content_map]

    def compare(self, images: Tensor, content: Tensor) -> dict[str, Tensor]:
        """Compute the three losses of images (B, 3, H, W) in 0..1 against `content_features` and the style."""
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
        """Compute the loss network's maps of images (B, 3, H, W) in 0..1, normalized as in its training.

        Raises:
            DataError: the images are too small for it.
        """
        stride = max(self.network.strides)
        if min(images.shape[2:]) < stride:
            raise DataError(
                f"An image of {images.shape[3]} x {images.shape[2]} pixels is too small for the loss network, "
                f"whose deepest map has stride {stride}. Use a larger image or size, or fewer maps."
            )
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.network.mean, self.network.std))
        return self.network((images - mean) / std)

    @torch.no_grad()
    def decode(self, outputs: StyleOutputs, options: Postprocess | None = None) -> list[Rendering]:
        """Return the rendered images without padding."""
        return [
            Rendering(image[:, :height, :width].float().clone())
            for image, (height, width) in zip(outputs.images, outputs.sizes)
        ]


DEFAULT_NETWORK = {
    "name": "vgg19",
    "weights": "imagenet",
    "layers": ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv4_4", "conv5_1"],
}
