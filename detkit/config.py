"""The typed schema of an experiment, built from YAML files and command-line overrides.

Parts (data, backbone, neck, head, augment, proposals) are written `{name: ssd, option: value}`; their options are the
constructor arguments of the part registered under that name, and are checked when it is built. All other options are
defined here.
"""

import copy
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detkit.errors import ConfigError, nearest
from detkit.io import files
from detkit.schema import build, convert, format_value, from_text, given_options, option_names, option_type, plain, put

logger = logging.getLogger(__name__)

PartOptions = dict[str, Any]
PATHS = (
    ("data", "root"),
    ("head", "style_image"),
    ("data", "data", "root"),
    ("proposals", "path"),
    ("proposals", "cache"),
)
"""Options of parts that are paths."""
RENAMED = (
    ("head", "picture", "style_image"),
    ("head", "picture_size", "style_size"),
)
"""Part options that were renamed after version 0.1: part, old name, new name."""
RENAMED_VALUES = (
    ("data", "name", "pictures", "images"),
    ("head", "normalise", "picture", "image"),
)
"""Values of part options that were renamed: part, option, old value, new value."""
PART_KEYS = ("data", "backbone", "neck", "head", "proposals")
"""Config keys that hold a part."""


@dataclass(frozen=True)
class InputOptions:
    """How images are resized to the network's input.

    Args:
        size: height and width of the network's input in pixels; for short_side the length of the image's shorter side
            and the maximum length of its longer side.
        resize: stretch resizes images to `size`; letterbox keeps the aspect ratio and pads with grey to `size`;
            short_side keeps it too and pads the images of a batch to the largest; crop, for segmentation, takes random
            crops of `size` in training and slides windows of `size` over the whole image in evaluation and prediction.
        multi_scale: smallest and largest factor of `size` in training: each batch gets a random input size with sides
            that are multiples of 32 (Redmon and Farhadi 2017, YOLOv2, section 2). Evaluation and prediction use `size`.
            Null to always use `size`.
        overlap: overlap of neighbouring windows for crop, as a fraction of their sides; more is slower and smoother.
        trim_padding: in evaluation and prediction, pad letterboxed images only to multiples of 32 and to the largest
            image of the batch, which is faster. Applies to heads that do not depend on the input size (yolov2, yolov3,
            yolox) if `size` is a multiple of the coarsest map's stride, up to 32; other heads keep the full padding.
    """

    size: tuple[int, int] = (320, 320)
    resize: Literal["stretch", "letterbox", "short_side", "crop"] = "stretch"
    multi_scale: tuple[float, float] | None = None
    overlap: float = 1 / 3
    trim_padding: bool = True

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            what = (
                "[shorter side, maximum of the longer side]" if self.resize == "short_side" else "the height and width"
            )
            raise ConfigError(f"'input.size' is {what} in pixels, at least 1, but is {list(self.size)}.")
        if self.resize == "short_side" and self.size[0] > self.size[1]:
            raise ConfigError(
                f"'input.size' with input.resize short_side is [shorter side, maximum of the longer side], such as "
                f"[800, 1333], but is {list(self.size)}."
            )
        if not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"'input.overlap' must lie in 0..0.9, but is {self.overlap}.")
        if self.multi_scale is not None:
            self._check_multi_scale(self.multi_scale)

    @property
    def training_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) candidates for the inputs of training batches; empty without multi_scale.

        They have about the aspect ratio of `size`, and a shorter side of a multiple of 32 pixels within multi_scale.
        """
        if self.multi_scale is None:
            return ()
        shorter = min(self.size)
        smallest, largest = (factor * shorter / 32 for factor in self.multi_scale)
        # Tolerate rounding: 0.7 * 320 must give 224.
        first, last = math.ceil(smallest - 1e-6), math.floor(largest + 1e-6)
        shape = [side / shorter for side in self.size]
        return tuple(
            (32 * round(count * shape[0]), 32 * round(count * shape[1])) for count in range(max(first, 1), last + 1)
        )

    def _check_multi_scale(self, factors: tuple[float, float]) -> None:
        if self.resize == "short_side":
            raise ConfigError(
                "'input.multi_scale' cannot be combined with input.resize short_side, which sizes each batch by its "
                "images. Set input.resize to stretch or letterbox, or input.multi_scale to null."
            )
        if not 0 < factors[0] <= factors[1] < math.inf:
            raise ConfigError(
                f"'input.multi_scale' is the smallest and the largest factor of input.size, both greater than 0, such "
                f"as [0.5, 1.5], but is {list(factors)}."
            )
        if not self.training_sizes:
            raise ConfigError(
                f"'input.multi_scale' {list(factors)} of input.size {list(self.size)} leaves no multiple of 32 pixels "
                f"for the shorter side. Give a wider range, such as [0.5, 1.5], or null."
            )


SHORT_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    Args:
        epochs: passes over the training images.
        batch_size: images of one optimiser step in total, over all devices and accumulated batches.
        accumulate: batches whose gradients are accumulated for one step, each of batch_size / accumulate images.
        workers: processes that read and augment images; 0 for the training process itself.
        optimizer: the optimiser.
        lr: peak learning rate, for batch_size images per step.
        backbone_lr_factor: the backbone's learning rate as a multiple of `lr`.
        momentum: momentum of sgd; beta1 of adam and adamw.
        weight_decay: weight decay; not applied to biases and normalisation layers.
        schedule: schedule of the learning rate after the warm-up, updated at every optimiser step.
        warmup_epochs: epochs over which the learning rate rises linearly from 0; may be a fraction.
        milestones: epochs at which `step` multiplies the learning rate by gamma.
        gamma: factor of `step` and, per epoch, of `exponential`; decay of `inverse_time`, lr / (1 + gamma·epoch).
        final_lr_factor: final learning rate of `cosine`, as a multiple of `lr`.
        clip_norm: maximum total norm of the gradients, which are scaled down to it; null to disable.
        ema_decay: decay per step of an exponential moving average of the weights, which is then evaluated and saved;
            null to disable.
        freeze: number of stages of the backbone, from the first, whose weights and batch-norm statistics are frozen;
            all for the whole backbone.
        freeze_norms: freeze all batch norms of the backbone, as is usual with few images per batch.
        store_features: with a fully frozen backbone and without augmentation, compute the feature maps of each image
            in the first epoch only, and store them in files in the run's folder until it ends.
        precision: arithmetic of the forward and backward passes. auto is bf16-mixed (weights, losses and accumulation
            in 32 bits, the operands of convolutions and linear layers in 16) where the hardware accelerates bf16
            (tensor cores, AMX, AVX512-BF16), otherwise, and for heads that require it, 32-true. Evaluation uses 32
            bits. fp32, bf16 and fp16 are short for 32-true, bf16-mixed and 16-mixed.
        device: auto uses a GPU if there is one.
        devices: number of devices.
        validate_every: epochs between evaluations; the last epoch is always evaluated.
        max_dets: detections per class and image, by score, that the COCO metrics consider, above 10, and the minimum
            that the head returns per image in evaluation; null for COCO's 100. Other values give figures that are not
            comparable with published ones.
        patience: evaluations without improvement after which training stops early; null to disable.
        plain_epochs: number of final epochs without augmentation.
        unmixed_epochs: number of final epochs without the augmentations that mix images (mosaic, mixup), as in YOLOX.
        per_class: images of each class in a batch, which then consists of several classes with this many images each
            (P x K sampling of metric learning), for data with one class per image; null for random batches.
        reduced_decoding: in training, decode large JPEGs at 1/2, 1/4 or 1/8 of their size if that leaves twice the
            input's resolution along each axis, and enough for the crops of `augment`. This removes noise that images
            decoded at full size in validation and prediction still have, and lowers the score if there is much of it.
            Not available with proposals.
        cache: keep decoded images in memory or in a file on the disk of `runs`, shared by the workers, so that each
            is decoded once; null to disable. Results do not change.
        cache_gb: maximum size of the cache over all devices, in GB of 10^9 bytes (a 640 x 480 image takes 0.9 MB);
            images that do not fit are decoded each time.
        seed: seed of the weights, the order of the images and their augmentation.
    """

    epochs: int = 50
    batch_size: int = 16
    accumulate: int = 1
    workers: int = 2
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    backbone_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "step", "cosine", "exponential", "inverse_time"] = "cosine"
    warmup_epochs: float = 1.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final_lr_factor: float = 0.01
    clip_norm: float | None = None
    ema_decay: float | None = None
    freeze: int | Literal["all"] = 0
    freeze_norms: bool = False
    store_features: bool = False
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    validate_every: int = 1
    max_dets: int | None = None
    patience: int | None = None
    plain_epochs: int = 0
    unmixed_epochs: int = 0
    per_class: int | None = None
    reduced_decoding: bool = False
    cache: Literal["memory", "disk"] | None = None
    cache_gb: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", SHORT_PRECISIONS.get(self.precision, self.precision))
        positive = ("epochs", "batch_size", "accumulate", "lr", "devices", "validate_every", "cache_gb")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"'train.{name}' must be greater than 0, but is {getattr(self, name)}.")
        for name in (
            "workers",
            "weight_decay",
            "warmup_epochs",
            "plain_epochs",
            "unmixed_epochs",
            "backbone_lr_factor",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"'train.{name}' must not be negative, but is {getattr(self, name)}.")
        if self.freeze != "all" and self.freeze < 0:
            raise ConfigError(f"'train.freeze' must be a number of stages, or all, but is {self.freeze}.")
        if self.batch_size % (self.accumulate * self.devices):
            raise ConfigError(
                f"'train.batch_size' is the total per step, {self.batch_size} images: it must be a multiple of "
                f"train.accumulate x train.devices = {self.accumulate * self.devices}."
            )
        batch = self.batch_size // (self.accumulate * self.devices)
        if self.per_class is not None and (self.per_class < 1 or batch % self.per_class or batch == self.per_class):
            raise ConfigError(
                f"'train.per_class' is {self.per_class}, but the images of a batch, {batch} (train.batch_size over "
                f"train.accumulate x train.devices), must be at least twice it and a multiple of it, so that a batch "
                f"has several classes."
            )
        if self.max_dets is not None and self.max_dets <= 10:
            raise ConfigError(
                f"'train.max_dets' must be above 10, which COCO's AR_10 needs, or null for 100, but is {self.max_dets}."
            )
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"'train.patience' must be at least 1, or null to disable, but is {self.patience}.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"'train.clip_norm' must be greater than 0, or null to disable, but is {self.clip_norm}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"'train.momentum' must lie in 0..1, 1 excluded, but is {self.momentum}.")
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"'train.milestones' must be in ascending order, but are {list(self.milestones)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"'train.ema_decay' must lie between 0 and 1, but is {self.ema_decay}.")


@dataclass(frozen=True)
class Experiment:
    """An experiment: data, model and training options.

    Args:
        data: `name` of a data format (voc, coco, yolo, shapes), its options, the splits `train` and `val`, and
            `allow_leaks` to accept images that are in both splits.
        backbone: `name` of a backbone and its options.
        head: `name` of a head and its options.
        neck: `name` of a neck and its options; null for none.
        augment: augmentations of training images, each a `name` and its options; those that mix images (mosaic,
            mixup) run first, in order, then geometric ones, then the resize to the input, then colour ones.
        proposals: `name` of a source of proposals (selective_search, file) for a head that needs them, its options, and
            the folder `cache` in which they are kept; null for none.
        input: how images are resized to the network's input.
        train: how the model is trained.
        weights: a checkpoint to start from: a run's folder, a .safetensors file, torchvision:NAME, a .pth file of
            torchvision's or YOLOX's, a .weights file of Darknet's; null to start from the backbone's own weights.
        weights_parts: parts to load from the checkpoint; without the head it may have other classes.
        name: name of the run's folder, runs/<task>/<name>.
        runs: the folder of all runs.
    """

    data: PartOptions
    backbone: PartOptions
    head: PartOptions
    neck: PartOptions | None = None
    augment: tuple[PartOptions, ...] = ()
    proposals: PartOptions | None = None
    input: InputOptions = field(default_factory=InputOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    weights: str | None = None
    weights_parts: tuple[str, ...] = ("backbone", "neck", "head")
    name: str = "run"
    runs: str = "runs"


GROUPS: dict[str, type] = {"input": InputOptions, "train": TrainOptions}
"""Config keys that are groups of options defined here."""


def load_experiment(
    configs: list[str], overrides: list[str] | None = None, base: dict[str, Any] | None = None
) -> Experiment:
    """Merge YAML files, later ones winning key by key, then apply overrides ["--train.lr", "0.1"].

    Args:
        configs: YAML files, or names of configs; see `find_config`.
        overrides: arguments of the command line.
        base: an experiment to start from, as returned by `experiment_to_dict`.

    Raises:
        ConfigError: a file is missing or malformed, a key is unknown (with the nearest valid one),
            a value has the wrong type.
    """
    merged: dict[str, Any] = plain(base or {}, "")
    for config in configs:
        values = read_yaml(config)
        _check_keys(values, config)
        merged = _merge(merged, values)
    for name, text in given_options(overrides or [], _is_switch):
        _check_key(name, "the command line")
        keys = name.split(".")
        value = _from_text(text, name)
        if name in GROUPS and isinstance(value, dict):
            _check_keys({name: value}, "the command line")
            merged = _merge(merged, {name: value})
        else:
            put(merged, keys, value, name)
    return experiment_from_dict(merged)


def experiment_from_dict(values: Any) -> Experiment:
    """Build an experiment from the output of `experiment_to_dict`.

    Raises:
        ConfigError: `values`, which may be any JSON value, is not an experiment.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"An experiment must be a mapping (data, backbone, head, ...), but is {format_value(values)}."
        )
    values = _with_current_names(plain(values, ""))
    _check_keys(values, "the experiment")
    for options, key in _paths(values):
        # A run may be evaluated and resumed from another working folder.
        options[key] = str(Path(os.path.expanduser(options[key])).absolute())
    experiment = build(Experiment, values)
    for part in PART_KEYS:
        _check_name(getattr(experiment, part), part)
    for index, options in enumerate(experiment.augment):
        _check_name(options, f"augment[{index}]")
    return experiment


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Convert to plain lists, dicts and numbers, for YAML and JSON."""
    values: dict[str, Any] = plain(dataclasses.asdict(experiment), "")
    return values


def packaged_configs() -> dict[str, Path]:
    """The configs shipped with detkit by name, from the installed package or the checkout."""
    package = Path(__file__).parent
    folder = package / "configs"
    folder = folder if folder.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(config: str) -> tuple[Path, Path]:
    """Find the file of a config, and the folder that relative paths in it refer to.

    A config is given as a file or by name: `quickstart` is quickstart.yaml or configs/quickstart.yaml in the working
    folder, otherwise the one shipped with detkit. Relative paths refer to the folder of the file, but in a config
    shipped with detkit to the working folder, since data is not kept in an installed package.

    Raises:
        ConfigError: there is no such config; the message suggests the nearest one.
    """
    is_name = not config.endswith((".yaml", ".yml"))
    # Unlike Path.is_file, os.path.isfile returns False for names that are too long.
    for path in (config, *((f"{config}.yaml", f"configs/{config}.yaml") if is_name else ())):
        if os.path.isfile(path):
            return Path(path), Path(path).parent
    packaged = packaged_configs()
    if config in packaged:
        return packaged[config], Path()
    folder, stem = Path(config).parent, Path(config).stem
    named = f"configs/{stem}.yaml"
    if not is_name and os.path.isfile(named):
        raise ConfigError(f"There is no config file '{config}'. Did you mean '{named}'?")
    if stem in packaged:
        raise ConfigError(
            f"There is no config file '{config}'. Give only its name to use the config shipped with detkit: detkit "
            f"train {stem}"
        )
    local = [str(other) for other in sorted(folder.glob("*.yaml"))] if os.path.isdir(folder) else []
    if is_name:
        raise ConfigError(f"There is no config named '{config}'. {nearest(config, [*local, *packaged])}")
    raise ConfigError(f"There is no config file '{config}'. {nearest(config, local)}")


def read_yaml(config: str) -> dict[str, Any]:
    """Read a config; relative paths in it (data.root, proposals.path) are made absolute, see `find_config`.

    Raises:
        ConfigError: there is no such config, or it is not YAML, names a key twice, or is not a mapping.
    """
    path, folder = find_config(config)
    values = files.read_yaml(path, "config", ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(
            f"The config '{path}' must be a mapping (data, backbone, head, ...), but is {format_value(values)}."
        )
    values = _with_current_names(values, f"{path}: ")
    for options, key in _paths(values):
        try:
            options[key] = str((folder / os.path.expanduser(options[key])).resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of symbolic links, or NUL
            raise ConfigError(f"The path {format_value(options[key])} in '{path}' cannot be used: {error}.") from None
    return values


def _with_current_names(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Rename keys and values of earlier versions; renames in a user's file (`where`) are logged."""
    values = copy.deepcopy(values)
    for part, old, new in RENAMED:
        options = values.get(part)
        if isinstance(options, dict) and old in options:
            options[new] = options.pop(old)
            _log_renamed(where, f"{part}.{old}", f"{part}.{new}")
    for part, key, old, new in RENAMED_VALUES:
        options = values.get(part)
        if isinstance(options, dict) and options.get(key) == old:
            options[key] = new
            _log_renamed(where, f"{part}.{key}: {old}", f"{part}.{key}: {new}")
    return values


def _log_renamed(where: str, old: str, new: str) -> None:
    if where:
        logger.warning(f"{where}'{old}' is called '{new}' now. The old name is accepted until version 0.3.")


def _is_switch(name: str) -> bool:
    group, _, key = name.partition(".")
    return group in GROUPS and key in option_names(GROUPS[group]) and option_type(GROUPS[group], key) is bool


def _from_text(text: str, name: str) -> Any:
    """Parse the value of an override; paths are always text."""
    group, _, key = name.partition(".")
    kind = (
        option_type(GROUPS[group], key) if key and group in GROUPS else Any if key else option_type(Experiment, group)
    )
    return from_text(text, str if tuple(name.split(".")) in PATHS else kind, name)


def _check_name(options: PartOptions | None, path: str) -> None:
    """Raise ConfigError if a part has no valid `name`."""
    if options is None:
        return
    if "name" not in options:
        raise ConfigError(
            f"'{path}' needs a 'name', as in {{name: NAME}}. `detkit models` lists the heads, backbones and necks."
        )
    convert(options["name"], str, f"{path}.name")


def _paths(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the options of PATHS that `values` contains, as pairs of a dict and the key in it."""
    for *parts, key in PATHS:
        options: Any = values
        for part in parts:
            options = options.get(part) if isinstance(options, dict) else None
        if isinstance(options, dict) and isinstance(options.get(key), str):
            yield options, key


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Update `base` by `extra`, key by key; a part with another name replaces the whole part."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        renamed = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) != old.get("name")
        )
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not renamed else value
    return merged


def _check_keys(values: dict[str, Any], where: str, prefix: str = "") -> None:
    for key, value in values.items():
        _check_key(f"{prefix}{key}", where)
        if isinstance(value, dict) and not prefix and key in GROUPS:
            _check_keys(value, where, f"{key}.")


def _check_key(dotted: str, where: str) -> None:
    """Raise ConfigError if a key is neither an option of the schema nor inside a part."""
    top = option_names(Experiment)
    first, _, rest = dotted.partition(".")
    if first not in top or (rest and first not in (*PART_KEYS, *GROUPS)):
        valid = top | {f"{group}.{name}" for group, schema in GROUPS.items() for name in option_names(schema)}
        raise ConfigError(f"'{dotted}' in {where} is not a key of the config. {nearest(dotted, valid)}")
    if rest and first in GROUPS and rest not in option_names(GROUPS[first]):
        raise ConfigError(
            f"'{dotted}' in {where} is not a key of the config. {nearest(rest, option_names(GROUPS[first]))}"
        )
