"""A model: backbone, neck and head as one network, with its classes, its input, and its file of weights."""

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
from detkit.errors import CheckpointError, ConfigError, nearest
from detkit.heads.base import Head
from detkit.published.read import is_published, read_published
from detkit.registry import backbones, heads, necks, without_weights
from detkit.runs import resolve_checkpoint
from detkit.types import ClassList, Inputs

FORMAT = "detkit 1"
PARTS = ("backbone", "neck", "head")


class Model(nn.Module):
    """From images in 0..1 to the raw outputs of the head.

    Args:
        experiment: what the parts were built from; it travels with the weights.
        classes: the data set's classes, which the labels index.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, neck: Neck | None, head: Head, experiment: Experiment, classes: ClassList
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.experiment, self.classes = experiment, classes
        # The last, since a head may have a backbone of its own (R-CNN's, for the pixels of each region).
        reader = [module for module in self.modules() if isinstance(module, Backbone)][-1]
        fitting = experiment.input
        # Cells that divide the input evenly keep their size only if the input is whole strides, and what is left of it.
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
    ) -> Any:
        """The head's raw outputs.

        Args:
            images: (B, 3, H, W) float32 RGB in 0..1.
            sizes: (height, width) of each image inside the tensor.
            proposals: (P, 4) float32 xyxy pixels of `images` for each image, for a head that needs them.
            features: `maps` of the images, where they are known; of `images` only the size counts then.
        """
        maps = self.maps(images) if features is None else list(features)
        if self.neck is not None:
            maps = self.neck(maps)
        return self.head(maps, Inputs((images.shape[2], images.shape[3]), sizes, proposals))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps [(B, C_i, h_i, w_i)] of images (B, 3, H, W) float32 RGB in 0..1."""
        return self.backbone((images - self.mean) / self.std)

    def freeze(self, stages: int | Literal["all"], norms: bool) -> None:
        """Keep the first `stages` of the backbone, or the whole of it, as they are, and with `norms` all batch norms of
        all backbones."""
        for module in self.modules():
            if isinstance(module, Backbone) and norms:
                module.freeze(module.frozen_stages, norms=True)
        if stages == "all":
            self.backbone.freeze_all()
        else:
            self.backbone.freeze(stages, norms)

    def parameter_groups(self, lr: float, backbone_lr_factor: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: the backbone apart from the rest, and no decay for biases and norms.

        Decay is for the weights of convolutions and linear layers; a bias or the scale of a norm has one
        dimension, and pulling it to zero only hurts.
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

    def save(self, path: Path) -> None:
        """Write weights, experiment and classes to a .safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {
            "format": FORMAT,
            "experiment": json.dumps(experiment_to_dict(self.experiment)),
            "class_names": json.dumps(self.classes.names),
            "raw_ids": json.dumps(self.classes.raw_ids),
        }
        # A run killed while it writes must leave the last good file behind.
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)


def build_model(experiment: Experiment, classes: ClassList, load_weights: bool = True) -> Model:
    """The model that a config describes, with random weights but for what the backbone loads.

    Args:
        load_weights: load what the config says about weights to start from; needless for a model whose weights come
            from a checkpoint, which may be used where those are not at hand.

    Raises:
        ConfigError: a part or option is unknown, or the parts do not fit together.
        CheckpointError: the backbone's weights cannot be had.
    """
    with nullcontext() if load_weights else without_weights():
        backbone: Backbone = backbones.build(experiment.backbone, "backbone")
        channels, strides = backbone.channels, backbone.strides
        neck: Neck | None = None
        if experiment.neck is not None:
            neck = necks.build(experiment.neck, "neck", channels=channels, strides=strides)
            channels, strides = neck.channels, neck.strides
        head: Head = heads.build(experiment.head, "head", channels=channels, strides=strides, num_classes=len(classes))
    whole_picture = not head.any_size and bool(head.needs & {"boxes", "points", "image_labels"})
    if experiment.input.resize == "crop" and whole_picture:
        raise ConfigError(
            f"'input.resize' crop is for heads that say something of each pixel, but the head "
            f"'{experiment.head['name']}' says something of the whole picture. Set input.resize to stretch, letterbox "
            f"or short_side."
        )
    model = Model(backbone, neck, head, experiment, classes)
    if load_weights:
        head.prepare()
        if experiment.weights is not None:
            _start_from(model, experiment.weights, experiment.weights_parts)
    return model


def load_model(path: str | Path) -> Model:
    """The model of a checkpoint, on the CPU: a run's folder or file, or published weights (see detkit.published), which
    are torchvision's by name or file, YOLOX's `.pth` files and Darknet's `.weights` files.

    Raises:
        CheckpointError: the file is missing, is no checkpoint of detkit, or does not fit its own config.
    """
    tensors, experiment, classes = read_checkpoint(path)
    model = build_model(experiment, classes, load_weights=False)
    load_tensors(model, tensors, str(path))
    return model.eval()


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """The tensors of a checkpoint file, the experiment that trained them, and its classes."""
    from safetensors import SafetensorError, safe_open

    path = resolve_checkpoint(path)
    if is_published(path):
        return read_published(path)
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint '{path}' cannot be read: {error}. It may be cut off; use another one."
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' is a safetensors file, but no checkpoint of detkit: its format is "
            f"{metadata.get('format')!r}, not '{FORMAT}'. Weights of a backbone alone go to --backbone.weights."
        )
    classes = ClassList(tuple(json.loads(metadata["class_names"])), tuple(json.loads(metadata["raw_ids"])))
    return tensors, experiment_from_dict(json.loads(metadata["experiment"])), classes


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load all of `tensors` into `module`; a name or shape that does not fit is a CheckpointError naming it."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"'{source}' lacks the tensor '{name}', which this model needs.")
        if name not in expected:
            raise CheckpointError(f"'{source}' has a tensor '{name}', for which this model has no place.")
        if tensors[name].shape != expected[name].shape:
            raise CheckpointError(
                f"The tensor '{name}' of '{source}' is {tuple(tensors[name].shape)}, but this model's is "
                f"{tuple(expected[name].shape)}. Was it trained with other options or another list of classes?"
            )
    module.load_state_dict(dict(tensors))


def check_classes(model: ClassList, data: ClassList, source: str) -> None:
    """Refuse a checkpoint whose labels mean other classes than the data set's."""
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
    """Load `parts` (backbone, neck, head) of a detkit checkpoint into a model about to be trained.

    Raises:
        CheckpointError: the weights do not fit, or the head is asked for and has other classes.
        ConfigError: a part has an unknown name.
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
