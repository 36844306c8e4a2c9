"""The typed schema of an experiment, and how YAML files and command-line overrides become one.

Parts (data, backbone, neck, head, augment, proposals) are written `{name: ssd, option: value}`; their options are the
constructor arguments of the part registered by that name, and are checked when it is built. Everything else
is listed here, once.
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
from detkit.schema import build, convert, from_text, given_options, option_names, option_type, plain, put, shown

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
"""Options of parts that had another name up to version 0.1: part, old name, new name."""
RENAMED_VALUES = (
    ("data", "name", "pictures", "images"),
    ("head", "normalise", "picture", "image"),
)
"""Values likewise: part, option, old value, new value."""
OF_PARTS = ("data", "backbone", "neck", "head", "proposals")
"""Those keys of a config that are parts."""


@dataclass(frozen=True)
class InputOptions:
    """How an image becomes the network's input.

    Args:
        size: height and width of the network's input in pixels; for short_side the length of an image's shorter side,
            and the most that its longer side may have.
        resize: stretch images to `size`; letterbox keeps their aspect ratio and pads them with grey to `size`;
            short_side keeps it too, and pads the images of a batch to the largest of them; crop, for segmentation,
            cuts parts of `size` at random in training, and goes over whole images in windows of it afterwards.
        multi_scale: smallest and largest factor of `size` in training: each batch gets another input at random, with
            sides that are multiples of 32 (Redmon and Farhadi 2017, YOLOv2, section 2). Evaluation and prediction keep
            to `size`. Null for always `size`.
        overlap: of neighbouring windows under crop, as a fraction of their sides; more is slower and smoother.
        trim_padding: evaluate and predict letterboxed images with no more padding than to multiples of 32 and to the
            largest image of the batch, which saves its time. For heads that do not depend on the size of the input:
            yolov2, yolov3, yolox, where `size` is a multiple of the coarsest map's stride, up to 32; others have all of
            the padding.
    """

    size: tuple[int, int] = (320, 320)
    resize: Literal["stretch", "letterbox", "short_side", "crop"] = "stretch"
    multi_scale: tuple[float, float] | None = None
    overlap: float = 1 / 3
    trim_padding: bool = True

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            what = "[shorter side, most of the longer side]" if self.resize == "short_side" else "the height and width"
            raise ConfigError(f"'input.size' is {what} in pixels, at least 1, but is {list(self.size)}.")
        if self.resize == "short_side" and self.size[0] > self.size[1]:
            raise ConfigError(
                f"'input.size' with input.resize short_side is [shorter side, most of the longer side], such as "
                f"[800, 1333], but is {list(self.size)}."
            )
        if not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"'input.overlap' must lie in 0..0.9, but is {self.overlap}.")
        if self.multi_scale is not None:
            self._check_multi_scale(self.multi_scale)

    @property
    def training_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) that the inputs of training batches are drawn from: all that have about the shape of
        `size` and a shorter side of a multiple of 32 pixels within multi_scale; none without multi_scale."""
        if self.multi_scale is None:
            return ()
        shorter = min(self.size)
        smallest, largest = (factor * shorter / 32 for factor in self.multi_scale)
        # 0.7 of 320 is 224, whatever the last bit says.
        first, last = math.ceil(smallest - 1e-6), math.floor(largest + 1e-6)
        shape = [side / shorter for side in self.size]
        return tuple(
            (32 * round(count * shape[0]), 32 * round(count * shape[1])) for count in range(max(first, 1), last + 1)
        )

    def _check_multi_scale(self, factors: tuple[float, float]) -> None:
        if self.resize == "short_side":
            raise ConfigError(
                "'input.multi_scale' cannot go with input.resize short_side, where each batch is as large as its "
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
        batch_size: images of one optimiser step, in all: over all devices and accumulated batches.
        accumulate: batches whose gradients are summed up to one step, each batch_size / accumulate images.
        workers: processes that read and augment images; 0 does it in the training process.
        optimizer: the rule of the step.
        lr: learning rate at its peak, for batch_size images a step.
        backbone_lr_factor: the backbone's learning rate as a multiple of `lr`.
        momentum: of sgd; first beta of adam and adamw.
        weight_decay: not applied to biases and to the weights of normalisation layers.
        schedule: how the learning rate falls after the warm-up, by optimiser steps.
        warmup_epochs: epochs over which the learning rate rises linearly from 0; may be a fraction.
        milestones: epochs at which `step` multiplies the learning rate by gamma.
        gamma: factor of `step` and, per epoch, of `exponential`; decay of `inverse_time`, lr / (1 + gamma·epoch).
        final_lr_factor: where `cosine` ends, as a multiple of `lr`.
        clip_norm: gradients are scaled down to this total norm; null for never.
        ema_decay: decay per step of an exponential moving average of the weights, which is then what is
            evaluated and saved; null for none.
        freeze: the first stages of the backbone that keep their weights and batch-norm statistics; all for the whole
            backbone.
        freeze_norms: all batch norms of the backbone keep theirs, as is the custom where a batch is a few images.
        store_features: with a backbone that is frozen as a whole and without augmentation, compute its maps of each
            image in the first epoch only, and keep them in files in the run's folder until its end.
        precision: arithmetic of the forward and backward passes. auto is bf16-mixed (weights, losses and sums in 32
            bits, the factors of convolutions and linear layers in 16) where the hardware multiplies bf16 faster:
            tensor cores, AMX, AVX512-BF16; else, and for heads that need it, 32-true. Evaluation is in 32 bits.
            fp32, bf16 and fp16 mean 32-true, bf16-mixed and 16-mixed.
        device: auto takes a GPU where there is one.
        devices: how many of them.
        validate_every: epochs between evaluations; the last epoch is always evaluated.
        max_dets: the best detections of each class in an image that COCO's figures count, above 10, and the least that
            the head gives for an image in evaluations; null for COCO's 100. With another number the figures cannot be
            compared with published ones.
        patience: evaluations without a better score after which training stops early; null for never.
        plain_epochs: last epochs, trained on images without augmentation.
        unmixed_epochs: last epochs, trained without those augmentations that mix images (mosaic, mixup), the others
            staying on, as YOLOX does.
        per_class: so many images of one class stand together in a batch, which then has as many of each of several
            classes (metric learning's P x K), for data with one class an image; null for any.
        reduced_decoding: decode large JPEGs at 1/2, 1/4 or 1/8 of their sides in training, where that leaves twice the
            input's pixels along each axis, and enough for what `augment` cuts out. It takes noise out of them, which
            stays in the whole images of validation and prediction, and costs score where there is much of it. Not
            with proposals.
        cache: keep decoded images in memory or in a file on the disk of `runs`, shared by the workers, so that each
            is decoded once; null for never. It changes no result.
        cache_gb: the most it may take, over all devices, in GB of 10^9 bytes (an image of 640 x 480 has 0.9 MB); the
            images beyond are decoded each time.
        seed: of the weights, the order of images and their augmentation.
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
                f"'train.batch_size' is the total, {self.batch_size} images a step: it must be a multiple of "
                f"train.accumulate x train.devices = {self.accumulate * self.devices}."
            )
        batch = self.batch_size // (self.accumulate * self.devices)
        if self.per_class is not None and (self.per_class < 1 or batch % self.per_class or batch == self.per_class):
            raise ConfigError(
                f"'train.per_class' is {self.per_class}, but the images of a batch, {batch} (train.batch_size over "
                f"train.accumulate x train.devices), must be a multiple of it, twice at least, so that a batch has "
                f"several classes."
            )
        if self.max_dets is not None and self.max_dets <= 10:
            raise ConfigError(
                f"'train.max_dets' must be above 10, which COCO's AR_10 needs, or null for 100, but is {self.max_dets}."
            )
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"'train.patience' must be at least 1, or null for never, but is {self.patience}.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"'train.clip_norm' must be greater than 0, or null for never, but is {self.clip_norm}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"'train.momentum' must lie in 0..1, 1 excluded, but is {self.momentum}.")
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"'train.milestones' must be in ascending order, but are {list(self.milestones)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"'train.ema_decay' must lie between 0 and 1, but is {self.ema_decay}.")


@dataclass(frozen=True)
class Experiment:
    """One experiment: data, model, and how it is trained.

    Args:
        data: `name` of a data format (voc, coco, yolo, shapes), its options, the splits `train` and `val`, and
            `allow_leaks` to accept images that are in both.
        backbone: `name` of a backbone and its options.
        head: `name` of a head and its options.
        neck: `name` of a neck and its options; null for none.
        augment: augmentations of training images, each a `name` and its options; those that mix images (mosaic,
            mixup) run first, in order, then those that move pixels, then the resize to the input, then those that only
            change colours.
        proposals: `name` of a source of proposals (selective_search, file) for a head that needs them, its options, and
            the folder `cache` in which they are kept; null for none.
        input: how an image becomes the network's input.
        train: how the model is trained.
        weights: a checkpoint to start from: a run's folder, a .safetensors file, torchvision:NAME, a .pth file of
            torchvision's or YOLOX's, a .weights file of Darknet's; null to start from the backbone's own weights.
        weights_parts: what to take from it; without the head it may have been trained on other classes.
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
"""Those keys of a config that have keys of their own, listed here."""


def load_experiment(
    configs: list[str], overrides: list[str] | None = None, base: dict[str, Any] | None = None
) -> Experiment:
    """Merge YAML files, later ones winning key by key, then apply overrides ["--train.lr", "0.1"].

    Args:
        configs: YAML files, or names of configs; see `find_config`.
        overrides: arguments of the command line.
        base: an experiment to start from, as `experiment_to_dict` wrote it.

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
    """The experiment that `experiment_to_dict` wrote.

    Raises:
        ConfigError: `values`, which may be anything that JSON can hold, is not an experiment.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"An experiment has keys and values (data, backbone, head, ...), but is {shown(values)}.")
    values = _with_current_names(plain(values, ""))
    _check_keys(values, "the experiment")
    for options, key in _paths(values):
        # A run is evaluated and resumed from other folders than it was started in.
        options[key] = str(Path(os.path.expanduser(options[key])).absolute())
    experiment = build(Experiment, values)
    for part in OF_PARTS:
        _check_name(getattr(experiment, part), part)
    for index, options in enumerate(experiment.augment):
        _check_name(options, f"augment[{index}]")
    return experiment


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain lists, dicts and numbers, for YAML and JSON."""
    values: dict[str, Any] = plain(dataclasses.asdict(experiment), "")
    return values


def packaged_configs() -> dict[str, Path]:
    """The configs that come with detkit, by name: those in the installed package, or in the checkout."""
    package = Path(__file__).parent
    folder = package / "configs"
    folder = folder if folder.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(config: str) -> tuple[Path, Path]:
    """The file of a config, and the folder at which relative paths in it start.

    A config is given as a file, or by its name: `quickstart` is quickstart.yaml or configs/quickstart.yaml in the
    working folder, else the one that comes with detkit. Relative paths in a file start at its own folder, but those in
    a config that comes with detkit at the working folder: data are not kept in an installed package.

    Raises:
        ConfigError: there is no such config; the message has the nearest one.
    """
    is_name = not config.endswith((".yaml", ".yml"))
    # Unlike Path's, os.path.isfile answers for names that are too long, too.
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
            f"There is no config file '{config}'. Give its name alone to use the config that comes with detkit: detkit "
            f"train {stem}"
        )
    local = [str(other) for other in sorted(folder.glob("*.yaml"))] if os.path.isdir(folder) else []
    if is_name:
        raise ConfigError(f"There is no config named '{config}'. {nearest(config, [*local, *packaged])}")
    raise ConfigError(f"There is no config file '{config}'. {nearest(config, local)}")


def read_yaml(config: str) -> dict[str, Any]:
    """The content of a config; relative paths in it (data.root, proposals.path) are made absolute, see `find_config`.

    Raises:
        ConfigError: there is no such config, or it is not YAML, names a key twice, or is not a mapping.
    """
    path, folder = find_config(config)
    values = files.read_yaml(path, "config", ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(
            f"The config '{path}' must hold keys and values (data, backbone, head, ...), but is {shown(values)}."
        )
    values = _with_current_names(values, f"{path}: ")
    for options, key in _paths(values):
        try:
            options[key] = str((folder / os.path.expanduser(options[key])).resolve())
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, NUL
            raise ConfigError(f"The path {shown(options[key])} in '{path}' cannot be used: {error}.") from None
    return values


def _with_current_names(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """`values` of an experiment of an earlier version under the current names; those of a user's file (`where`) are
    logged."""
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
    """The value of an override; paths are text whatever they look like."""
    group, _, key = name.partition(".")
    kind = (
        option_type(GROUPS[group], key) if key and group in GROUPS else Any if key else option_type(Experiment, group)
    )
    return from_text(text, str if tuple(name.split(".")) in PATHS else kind, name)


def _check_name(options: PartOptions | None, path: str) -> None:
    """Refuse a part without the name of one."""
    if options is None:
        return
    if "name" not in options:
        raise ConfigError(
            f"'{path}' needs a 'name', as in {{name: NAME}}. `detkit models` lists those of heads, backbones and necks."
        )
    convert(options["name"], str, f"{path}.name")


def _paths(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where in `values` the options of PATHS stand, as far as they are given: the dict and the key in it."""
    for *parts, key in PATHS:
        options: Any = values
        for part in parts:
            options = options.get(part) if isinstance(options, dict) else None
        if isinstance(options, dict) and isinstance(options.get(key), str):
            yield options, key


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` updated by `extra`, key by key; a part with another name replaces the old part with its options."""
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
    """Refuse a key that is neither an option of the schema nor inside a part."""
    top = option_names(Experiment)
    first, _, rest = dotted.partition(".")
    if first not in top or (rest and first not in (*OF_PARTS, *GROUPS)):
        valid = top | {f"{group}.{name}" for group, schema in GROUPS.items() for name in option_names(schema)}
        raise ConfigError(f"'{dotted}' in {where} is not a key of the config. {nearest(dotted, valid)}")
    if rest and first in GROUPS and rest not in option_names(GROUPS[first]):
        raise ConfigError(
            f"'{dotted}' in {where} is not a key of the config. {nearest(rest, option_names(GROUPS[first]))}"
        )
