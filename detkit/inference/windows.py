"""Prediction on a batch, with overlapping windows for images larger than the network's input.

All predictions (evaluation, Predictor, sample images of a run) are made here. Windows are for semantic segmentation
heads with `input.resize: crop`. They overlap by `input.overlap`; where several windows cover a pixel, their logits are
weighted by the distance of the pixel from the window border, beyond which the network has no context. An image not
larger than the input is one window, and its prediction is exactly that of the network. Predictions in windows do not
depend on the other images of the batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detkit.heads.base import Head, Postprocess
from detkit.heads.parts.semantic import SemanticHead, labels_of
from detkit.heads.parts.size_cache import PerSize
from detkit.model import Model
from detkit.structures import Batch, Prediction, SemanticMap, Target

Size = tuple[int, int]
Network = Callable[[Tensor, tuple[Size, ...], tuple[Tensor, ...] | None], Any]
"""A function from images, sizes and proposals to raw outputs, such as a Model."""


class Window(NamedTuple):
    """A window of one image: the index of the image in the batch, and the first row and column."""

    image: int
    top: int
    left: int


def predict(
    model: Model, batch: Batch, network: Network | None = None, options: Postprocess | None = None
) -> Sequence[Prediction]:
    """Predict on a batch made with `model.fit`: one prediction per image, in pixels of the network's input.

    Args:
        network: computes the outputs instead of the model, for example an optimized version of it.
        options: decoding options of a detector.
    """
    network = network or model
    if not _needs_windows(model, batch):
        return decode(model.head, network(batch.images, batch.sizes, batch.proposals), options)
    return _slide(model, batch, network, None)


def predict_with_losses(
    model: Model, batch: Batch, network: Network | None = None, options: Postprocess | None = None
) -> tuple[Sequence[Prediction], dict[str, float]]:
    """Like `predict`, but also return the losses (with windows, their mean)."""
    if _needs_windows(model, batch):
        losses: dict[str, float] = defaultdict(float)
        return _slide(model, batch, network or model, losses), dict(losses)
    if network is None:
        outputs = model(batch.images, batch.sizes, batch.proposals, batch.features)
    else:
        outputs = network(batch.images, batch.sizes, batch.proposals)
    values = {name: value.item() for name, value in model.head.loss(outputs, batch.targets).items()}
    return decode(model.head, outputs, options), values


def decode(head: Head, outputs: Any, options: Postprocess | None) -> Sequence[Prediction]:
    """Decode raw outputs; third-party heads whose `decode` takes no options are supported if none are given."""
    return head.decode(outputs) if options is None else head.decode(outputs, options)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the start positions of windows along one side: evenly spaced, and as few as `overlap` allows.

    For example, windows of 100 pixels that overlap by half on a side of 300 pixels start at 0, 50, 100, 150, 200.

    Args:
        length: length of the side in pixels, at least `window`.
        window: length of a window in pixels.
        overlap: minimum overlap as a fraction of the window, in [0, 1).
    """
    step = max(1, int(window * (1 - overlap)))
    last = length - window
    count = -(-last // step)
    return [round(number * last / count) for number in range(count)] + [last] if count else [0]


def _needs_windows(model: Model, batch: Batch) -> bool:
    """Return whether an image is larger than the input of a head that requires windows (style transfer does not)."""
    return isinstance(model.head, SemanticHead) and model.fit.resize == "crop" and _size(batch.images) != model.fit.size


def _slide(model: Model, batch: Batch, network: Network, losses: dict[str, float] | None) -> list[SemanticMap]:
    """Predict the maps of a batch window by window; fill `losses`, if given, with the mean over the windows."""
    head, size, overlap = model.head, model.fit.size, model.experiment.input.overlap
    canvases = [_Canvas(model.fit.outer_size(inner), size) for inner in batch.sizes]
    windows = [
        Window(image, top, left)
        for image, canvas in enumerate(canvases)
        for top in window_starts(canvas.size[0], size[0], overlap)
        for left in window_starts(canvas.size[1], size[1], overlap)
    ]
    # At most as many windows at once as the batch has images, to respect the memory limit that the user has chosen.
    for chunk in _chunks(windows, len(batch)):
        sizes = tuple(_inside(batch.sizes[window.image], window, size) for window in chunk)
        images = torch.stack([_cut(batch.images[window.image], window, size) for window in chunk])
        outputs = network(images, sizes, None)
        if losses is not None:
            targets = tuple(_cut_target(batch.targets[window.image], window, size) for window in chunk)
            for name, value in head.loss(outputs, targets).items():
                losses[name] = losses.get(name, 0.0) + value.item() * len(chunk) / len(windows)
        for window, logits in zip(chunk, outputs.logits):
            canvases[window.image].add(window, logits.float())
    return [SemanticMap(canvas.labels()[:height, :width]) for canvas, (height, width) in zip(canvases, batch.sizes)]


class _Canvas:
    """Accumulates the labels of one image from windows that arrive from top to bottom.

    Logits are kept only for rows that later windows may still change, so that memory is bounded by one row of windows.
    """

    def __init__(self, size: Size, window: Size) -> None:
        self.size, self.window = size, window
        self.finished: list[Tensor] = []
        self.first_row = 0
        self.sums: Tensor | None = None

    def add(self, window: Window, logits: Tensor) -> None:
        """Add the logits (C, *window) of the next window."""
        if self.size == self.window:
            self.sums = logits
            return
        height, width = self.window
        if self.sums is None:
            self.sums = logits.new_zeros(len(logits), height, self.size[1])
        self._finish(window.top - self.first_row)
        # Normalizing by the sum of the weights would not change the argmax.
        self.sums[:, :, window.left : window.left + width] += logits * _weights_of(logits.device, self.window)

    def labels(self) -> Tensor:
        """Return the labels, (H, W) uint8, after the last window."""
        assert self.sums is not None
        return torch.cat([*self.finished, labels_of(self.sums)])

    def _finish(self, rows: int) -> None:
        """Convert the first `rows` rows to labels and shift the buffer down by as many."""
        if not rows:
            return
        assert self.sums is not None
        self.finished.append(labels_of(self.sums[:, :rows]))
        left = self.sums[:, rows:].clone()
        self.sums.zero_()
        self.sums[:, : left.shape[1]] = left
        self.first_row += rows


def _weights(size: Size) -> Tensor:
    """Return weights (H, W) in 0..1: 1 at the centre of a window, decreasing linearly to the border, never 0."""
    rows, columns = (_tent(length) for length in size)
    return rows[:, None] * columns


_weights_of = PerSize(_weights)


def _tent(length: int) -> Tensor:
    steps = torch.arange(1, length + 1)
    return torch.minimum(steps, steps.flip(0)) / ((length + 1) // 2)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def _cut(pixels: Tensor, window: Window, size: Size) -> Tensor:
    return pixels[..., window.top : window.top + size[0], window.left : window.left + size[1]]


def _cut_target(target: Target, window: Window, size: Size) -> Target:
    assert target.semantic is not None
    return replace(Target.empty(), semantic=_cut(target.semantic, window, size))


def _inside(inner: Size, window: Window, size: Size) -> Size:
    """Return (height, width) of the image inside a window, which may extend into the padding of a small image."""
    return min(size[0], inner[0] - window.top), min(size[1], inner[1] - window.left)


def _chunks(windows: Sequence[Window], count: int) -> Iterator[list[Window]]:
    remaining = iter(windows)
    while chunk := list(islice(remaining, count)):
        yield chunk
