"""The model: backbone, neck and head as one network, with its classes, input transform and checkpoint file."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detkit.backbones.base import Backbone, Neck
from detkit.config import Experiment, experiment_from_dict, experiment_to_dict
from detkit.data.transforms import BATCH_STRIDE, Fit
from detkit.errors import CheckpointError, ConfigError, nearest, printable
from detkit.heads.base import Head
from detkit.io.files import parse_json, replacing
from detkit.io.runs import resolve_checkpoint
from detkit.published.read import is_published, read_published
from detkit.registry import backbones, heads, necks, without_weights
from detkit.structures import ClassList, Inputs, Target

FORMAT = "detkit 1"
METADATA = frozenset({"format", "experiment", "class_names", "raw_ids"})
"""Metadata keys of every checkpoint."""
LATER_METADATA = frozenset({"checksum", "run", "epoch"})
"""Metadata keys added later; `run` and `epoch` are only in checkpoints written by a training run."""
PARTS = ("backbone", "neck", "head")


class Model(nn.Module):
    """A network from images in 0..1 to the raw outputs of its head.

    Args:
        experiment: the config that the parts were built from; saved with the weights.
        classes: the classes of the data set, indexed by labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, neck: Neck | None, head: Head, experiment: Experiment, classes: ClassList
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.experiment, self.classes = experiment, classes
        # The last one, since a head may have its own backbone (R-CNN's reads the pixels of each region).
        reader = [module for module in self.modules() if isinstance(module, Backbone)][-1]
        fitting = experiment.input
        # Cells that divide the input evenly keep their size only if the full and the trimmed input are multiples of the
        # stride.
        stride = max(1, *(backbone if neck is None else neck).strides)
        whole = BATCH_STRIDE % stride == 0 and all(side % stride == 0 for side in fitting.size)
        trim = fitting.trim_padding and head.trims_padding and whole
        self.fit = Fit(fitting.size, fitting.resize, reader.mean, trim=trim)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor,
        sizes: tuple[tuple[int, int], ...],
        proposals: tuple[Tensor, ...] | None = None,
        features: tuple[Tensor, ...] | None = None,
        targets: tuple[Target, ...] | None = None,
    ) -> Any:
        """Compute the head's raw outputs.

        Args:
            images: (B, 3, H, W) float32 RGB in 0..1.
            sizes: (height, width) of each image inside the tensor.
            proposals: (P, 4) float32 xyxy pixels of `images` for each image, for a head that needs them.
            features: precomputed `maps` of the images; only the size of `images` is then used.
            targets: of each image, in training; see Inputs.
        """
        maps = self.maps(images) if features is None else list(features)
        if self.neck is not None:
            maps = self.neck(maps)
        return self.head(maps, Inputs((images.shape[2], images.shape[3]), sizes, proposals, targets))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the backbone's maps [(B, C_i, h_i, w_i)] of images (B, 3, H, W) float32 RGB in 0..1."""
        return self.backbone((images - self.mean) / self.std)

    def freeze(self, stages: int | Literal["all"], norms: bool) -> None:
        """Freeze the first `stages` (or all) of the backbone and, with `norms`, the batch norms of all backbones."""
        for module in self.modules():
            if isinstance(module, Backbone) and norms:
                module.freeze(module.frozen_stages, norms=True)
        if stages == "all":
            self.backbone.freeze_all()
        else:
            self.backbone.freeze(stages, norms)

    def parameter_groups(self, lr: float, backbone_lr_factor: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer parameter groups: the backbone separate from the rest, no weight decay for biases and norms.

        Decay applies to the weights of convolutions and linear layers; biases and the scales of norms, recognized by
        having one dimension, should not be pulled towards zero.
        """
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("backbone" in name.split("."), parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": lr * (backbone_lr_factor if in_backbone else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (in_backbone, decays), parameters in groups.items()
        ]

    def save(self, path: str | Path) -> None:
        """Write weights, experiment and classes atomically to a .safetensors file.

        Raises:
            WriteError: the file cannot be written; an existing file is left unchanged.
        """
        with replacing(path) as file:
            file.write(self.serialize()[0])

    def serialize(self, **origin: str) -> tuple[bytes, str]:
        """Return the content of the .safetensors file and the checksum in its metadata.

        Args:
            origin: `run` and `epoch` that the weights come from.
        """
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {
            "format": FORMAT,
            "experiment": json.dumps(experiment_to_dict(self.experiment)),
            "class_names": json.dumps(self.classes.names),
            "raw_ids": json.dumps(self.classes.raw_ids),
            **origin,
        }
        metadata["checksum"] = _checksum(tensors, metadata)
        return save(tensors, metadata), metadata["checksum"]


def build_model(experiment: Experiment, classes: ClassList, load_weights: bool = True) -> Model:
    """Build the model that a config describes, randomly initialized except for the pretrained weights it loads.

    Args:
        load_weights: whether to load the pretrained weights named in the config; false for a model whose weights come
            from a checkpoint, so that it works where the pretrained weights are not available.

    Raises:
        ConfigError: a part or option is unknown, or the parts do not fit together.
        CheckpointError: the pretrained weights are not available.
    """
    with nullcontext() if load_weights else without_weights():
        backbone: Backbone = backbones.build(experiment.backbone, "backbone")
        channels, strides = backbone.channels, backbone.strides
        neck: Neck | None = None
        if experiment.neck is not None:
            neck = necks.build(experiment.neck, "neck", channels=channels, strides=strides)
            channels, strides = neck.channels, neck.strides
        head: Head = heads.build(experiment.head, "head", channels=channels, strides=strides, num_classes=len(classes))
    whole_image = not head.any_size and bool(head.needs & {"boxes", "points", "image_labels"})
    if experiment.input.resize == "crop" and whole_image:
        raise ConfigError(
            f"'input.resize' crop is for heads that predict for each pixel, but the head "
            f"'{experiment.head['name']}' predicts for the whole image. Set input.resize to stretch, letterbox or "
            f"short_side."
        )
    model = Model(backbone, neck, head, experiment, classes)
    if load_weights:
        head.prepare()
        if experiment.weights is not None:
            _start_from(model, experiment.weights, experiment.weights_parts)
    return model


def load_model(path: str | Path) -> Model:
    """Load a model from a checkpoint onto the CPU.

    Args:
        path: a run folder, a checkpoint file, or published weights (see detkit.published): torchvision's by name or
            file, YOLOX `.pth` files and Darknet `.weights` files.

    Raises:
        CheckpointError: the file is missing, is not a detkit checkpoint, or does not match its own config.
    """
    tensors, experiment, classes = read_checkpoint(path)
    try:
        model = build_model(experiment, classes, load_weights=False)
    # The options come from the file, and a part may fail in any way on arbitrary values.
    except Exception as error:
        raise CheckpointError(f"The model that '{path}' describes cannot be built: {_described(error)}") from error
    load_tensors(model, tensors, str(path))
    return model.eval()


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Read the tensors of a checkpoint file, the experiment that trained them, and its classes.

    Raises:
        CheckpointError: the file is missing, damaged or not a detkit checkpoint.
    """
    path = resolve_checkpoint(path)
    if is_published(path):
        return read_published(path)
    tensors, metadata = read_tensors(path)
    return tensors, *described_model(path, metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a detkit checkpoint file and verify its checksum.

    If the file was written before checksums existed, one is added to the returned metadata.

    Raises:
        CheckpointError: the file is missing, damaged or not a detkit checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    # Non-UTF-8 names raise ValueError, dtypes unknown to torch AttributeError or KeyError.
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint '{path}' cannot be read: {_described(error)}. It may be truncated; use another one."
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' is a safetensors file, but not a detkit checkpoint: its format is {metadata.get('format')!r}, "
            f"not '{FORMAT}'. To load weights of a backbone alone, use --backbone.weights."
        )
    for key in sorted(METADATA ^ metadata.keys()):
        if key not in LATER_METADATA:
            problem = "lacks the metadata" if key in METADATA else "has unknown metadata"
            raise CheckpointError(f"The checkpoint '{path}' {problem} {key!r}. It is damaged; use another one.")
    checksum = _checksum(tensors, metadata)
    if metadata.setdefault("checksum", checksum) != checksum:
        raise CheckpointError(
            f"The checkpoint '{path}' is damaged: its content does not match its checksum. Use another one, or a copy."
        )
    return tensors, metadata


def described_model(path: str | Path, metadata: Mapping[str, str]) -> tuple[Experiment, ClassList]:
    """Parse the experiment and the classes from the metadata of a checkpoint.

    Raises:
        CheckpointError: they are not valid.
    """
    names, ids, options = (
        parse_json(metadata[key], f"metadata '{key}' of the checkpoint '{path}'", CheckpointError)
        for key in ("class_names", "raw_ids", "experiment")
    )
    for key, values, kind in (("class_names", names, str), ("raw_ids", ids, int)):
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise CheckpointError(f"The metadata '{key}' of the checkpoint '{path}' is not a list of {kind.__name__}.")
    if not isinstance(options, dict):
        raise CheckpointError(f"The metadata 'experiment' of the checkpoint '{path}' is not a mapping.")
    try:
        return experiment_from_dict(options), ClassList(tuple(names), tuple(ids))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint '{path}' does not describe a model: {_described(error)} It is damaged; use another one."
        ) from error


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the SHA-256 of the tensors (names, dtypes, shapes, values) and of all metadata but the checksum."""
    names = sorted(tensors)
    described = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    others = sorted((key, value) for key, value in metadata.items() if key != "checksum")
    digest = hashlib.sha256(json.dumps([others, described]).encode())
    for name in names:
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(error: Exception) -> str:
    """Format a library's error in one line, with its type if the text alone says little."""
    text = printable(" ".join(str(error).split()))
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load `tensors` into `module`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"'{source}' lacks the tensor '{name}', which this model needs.")
        if name not in expected:
            raise CheckpointError(f"'{source}' has a tensor '{name}', which this model does not have.")
        if tensors[name].shape != expected[name].shape:
            raise CheckpointError(
                f"The tensor '{name}' of '{source}' is {tuple(tensors[name].shape)}, but this model's is "
                f"{tuple(expected[name].shape)}. Was it trained with other options or another list of classes?"
            )
    module.load_state_dict(dict(tensors))


def check_classes(model: ClassList, data: ClassList, source: str) -> None:
    """Raise CheckpointError if the classes of a checkpoint differ from those of the data set."""
    if model.names == data.names:
        return
    missing = [name for name in data.names if name not in model.names]
    extra = [name for name in model.names if name not in data.names]
    difference = "the same names in another order" if not missing and not extra else (
        f"only in the data: {', '.join(missing) or 'none'}; only in the checkpoint: {', '.join(extra) or 'none'}"
    )  # fmt: skip
    raise CheckpointError(
        f"The checkpoint '{source}' was trained on other classes than this data set has: {difference}. If the data set "
        f"has all classes of the checkpoint, choose these: --data.class_names '[{', '.join(model.names)}]' "
        f"--data.other_classes drop. To train on new classes, start from its backbone and neck alone: "
        f"--weights {source} --weights_parts '[backbone, neck]'."
    )


def _start_from(model: Model, path: str, parts: tuple[str, ...]) -> None:
    """Initialize `parts` (backbone, neck, head) of a model from a detkit checkpoint.

    Raises:
        CheckpointError: the weights do not fit, or `parts` contains the head and its classes differ.
        ConfigError: a part is unknown.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"'weights_parts' names '{part}'. {nearest(part, PARTS)}")
    tensors, _, classes = read_checkpoint(path)
    if "head" in parts:
        check_classes(classes, model.classes, path)
    for part in parts:
        module = getattr(model, part)
        if module is not None:
            prefix = f"{part}."
            chosen = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            load_tensors(module, chosen, path)
