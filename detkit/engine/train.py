"""Training: the loop, and what surrounds it. Devices, precision and processes are lightning-fabric's."""

import logging
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam, AdamW, Optimizer

from detkit.config import Experiment, TrainOptions
from detkit.data.cache import with_cache
from detkit.data.dataset import Dataset
from detkit.data.loader import EpochSampler, batches, training_loader
from detkit.data.points import point_rule
from detkit.data.reduced import with_reduced_decoding
from detkit.data.splits import open_train_and_val
from detkit.data.transforms import Augment
from detkit.engine.average import AveragedModel
from detkit.engine.console import TrainingConsole
from detkit.engine.depthwise import depthwise_in_float32
from detkit.engine.evaluate import Evaluation, evaluate
from detkit.engine.feature_store import FeatureStore, check_storable, feature_stores
from detkit.engine.memory import keep_freed_memory
from detkit.engine.pictures import write_predictions, write_training_batch
from detkit.engine.run_folder import RunFolder
from detkit.engine.schedule import learning_rate_factor
from detkit.engine.stages import BACKWARD, FORWARD, PICTURES, REST, STEP, STORED, VALIDATION, Stopwatch
from detkit.errors import ConfigError, DetkitError
from detkit.heads.base import Head
from detkit.model import Model, build_model, check_classes, read_checkpoint
from detkit.optimize import bf16_instructions
from detkit.proposals.dataset import check_needed, with_proposals
from detkit.registry import heads
from detkit.tasks.base import task_of
from detkit.terminal import Console
from detkit.types import Batch


class LossNotFiniteError(DetkitError):
    """A loss became infinite or not a number; going on would only destroy the weights."""


@dataclass
class Progress:
    """Where a run stands; saved after each epoch."""

    epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    evaluations_since_best: int = 0


@dataclass
class Setup:
    """Everything the loop works with."""

    fabric: Fabric
    options: TrainOptions
    model: Model
    wrapped: Any
    average: AveragedModel | None
    optimizer: Optimizer
    peak_lrs: list[float]
    loader: Any
    sampler: EpochSampler
    steps_per_epoch: int
    watch: Stopwatch
    store: FeatureStore | None = None
    val_store: FeatureStore | None = None


def train(experiment: Experiment, resume: str | None = None) -> RunFolder | None:
    """Train, evaluate and save what `experiment` describes.

    Args:
        resume: the folder of an unfinished run, which goes on exactly where its last whole epoch ended.

    Returns:
        The run's folder, with checkpoints/best.safetensors and metrics.csv in it; None in all processes but the
        first, which alone evaluates and writes.

    Raises:
        DetkitError: a mistake in config, data or weights, found before the first step where possible.
        LossNotFiniteError: naming the loss, the step and the pictures.
    """
    head: type[Head] = heads.get(str(experiment.head.get("name")))  # type: ignore[assignment]
    fabric, options = _launch(experiment.train, head)
    # The run's config then says what was computed.
    experiment = replace(experiment, train=options)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    fabric.seed_everything(options.seed, verbose=False)
    check_needed(experiment.proposals, head.needs, str(experiment.head["name"]))
    check_storable(experiment)
    train_set, val_set = _open_data(fabric, experiment, head)
    setup = _set_up(fabric, experiment, train_set, load_weights=resume is None)
    for dataset in (train_set, val_set):
        task_of(head).check_head(setup.model.head, dataset)
    progress = Progress()
    folder = _run_folder(fabric, experiment, head.task, resume)
    if resume is not None:
        progress = _resume(setup, folder, experiment)
    elif fabric.is_global_zero:
        task = task_of(head)
        write_training_batch(setup.loader.dataset, task, folder.pictures / "training_batch.jpg", train_set.classes)
    with (
        feature_stores(experiment, folder.path, len(train_set), len(val_set)) as (setup.store, setup.val_store),
        TrainingConsole(folder, experiment, setup.model, train_set, val_set, fabric) as console,
    ):
        while progress.epoch < options.epochs and not _patience_is_over(progress, options):
            started = time.perf_counter()
            waited = setup.watch.seconds[PICTURES]
            losses = _train_epoch(setup, progress, console)
            seconds = time.perf_counter() - started
            waited = setup.watch.seconds[PICTURES] - waited
            progress.epoch += 1
            evaluation = None
            if progress.epoch % options.validate_every == 0 or progress.epoch == options.epochs:
                evaluation = _validate(setup, progress, val_set, folder, console)
                setup.watch.lap(VALIDATION)
            random_states = fabric.all_gather(torch.get_rng_state())
            if fabric.is_global_zero:
                console.epoch(progress, losses, evaluation, seconds, waited)
                _save(setup, progress, folder, random_states)
            fabric.barrier()
            setup.watch.lap(REST)
        console.limits(setup.watch)
    if not fabric.is_global_zero:
        return None
    write_predictions(folder, val_set)
    return folder


def _launch(options: TrainOptions, head: type[Head]) -> tuple[Fabric, TrainOptions]:
    """Start the processes, one for each device; also the options with the precision that "auto" stands for."""
    fabric = _fabric(options, "32-true")
    if options.precision == "auto":
        exact = head.full_precision or not bf16_instructions(fabric.device)
        options = replace(options, precision="32-true" if exact else "bf16-mixed")
    if options.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ConfigError("'train.precision' 16-mixed needs a GPU. Use auto, bf16-mixed or 32-true on a CPU.")
    if options.precision != "32-true":
        fabric = _fabric(options, options.precision)
        precision = fabric.strategy.precision
        assert isinstance(precision, MixedPrecision)
        fabric.strategy.precision = _ExactInputs(precision.precision, precision.device)
    fabric.launch()
    return fabric, options


def _fabric(options: TrainOptions, precision: Any) -> Fabric:
    # It says of itself what the console says of the run.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        return Fabric(accelerator=options.device, devices=options.devices, precision=precision)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "'train.device' cuda cannot be used: torch finds no GPU (`nvidia-smi` lists those of the machine). Set "
                "it to auto or cpu."
            ) from None
        raise ConfigError(
            f"'train.device' {options.device} with 'train.devices' {options.devices} cannot be used: "
            f"{' '.join(str(error).split())}"
        ) from None


class _ExactInputs(MixedPrecision):
    """Fabric's mixed precision, but for the inputs: rounded to 16 bits, a box near pixel 1,000 would be off by up to 2,
    and the colour of the padding would no longer be the mean. Each layer rounds what it gets anyway."""

    def convert_input(self, data: Any) -> Any:
        return data


def _open_data(fabric: Fabric, experiment: Experiment, head: type[Head]) -> tuple[Dataset, Dataset]:
    """Both splits, with the proposals of all their pictures where the head needs them."""
    data, proposals = experiment.data, experiment.proposals
    train_set, val_set = open_train_and_val(data, head.needs, head.open_set)
    task = task_of(head)
    task.check_max_dets(experiment.train.max_dets)
    task.check_data(train_set, str(data.get("train", "train")))
    task.check_data(val_set, str(data.get("val", "val")))
    quiet = not fabric.is_global_zero
    console = Console(quiet=quiet)
    if experiment.train.reduced_decoding and proposals is None:
        train_set, line = with_reduced_decoding(train_set, experiment.input, experiment.augment)
        if line:
            console.print(f"decoding   {line}")
    if experiment.train.cache is not None:
        bound = int(experiment.train.cache_gb * 1e9 / fabric.world_size)
        train_set, val_set, line = with_cache(train_set, val_set, experiment.train.cache, bound, Path(experiment.runs))
        console.print(f"cache      {line}")
    # The first process fills the cache that the others then read.
    with fabric.rank_zero_first():
        train_set = with_proposals(train_set, proposals, str(data.get("train", "train")), "training", quiet)
        val_set = with_proposals(val_set, proposals, str(data.get("val", "val")), "validation", quiet)
    return train_set, val_set


def _run_folder(fabric: Fabric, experiment: Experiment, task: str, resume: str | None) -> RunFolder:
    """The run's folder, made by the first process and the same in all."""
    path = resume
    if path is None and fabric.is_global_zero:
        path = str(RunFolder.create(experiment, task).path)
    return RunFolder(Path(fabric.broadcast(path)))


def _train_epoch(setup: Setup, progress: Progress, console: TrainingConsole) -> dict[str, float]:
    """One pass over the training pictures; the mean of each loss."""
    options, optimizer, head, watch = setup.options, setup.optimizer, setup.model.head, setup.watch
    setup.wrapped.train()
    setup.sampler.epoch = progress.epoch
    mixed = setup.loader.dataset.mixes(progress.epoch)
    sums: dict[str, float] = defaultdict(float)
    source = batches(setup.loader)
    if setup.store is not None:
        source = setup.store.batches(setup.loader, setup.model, setup.fabric.autocast)
    watch.start()
    for number, batch in enumerate(source, start=1):
        watch.lap(PICTURES if setup.store is None else STORED)
        whole_step = number % options.accumulate == 0 or number == setup.sampler.batches
        batch = batch.to(setup.fabric.device)
        factor = learning_rate_factor(progress.step, setup.steps_per_epoch, options)
        for group, peak in zip(optimizer.param_groups, setup.peak_lrs):
            group["lr"] = peak * factor
        share = group_size(number, setup.sampler.batches, options.accumulate)
        with setup.fabric.no_backward_sync(setup.wrapped, enabled=not whole_step):
            outputs = setup.wrapped(batch.images, batch.sizes, batch.proposals, batch.features)
            # A head of two stages runs layers in its loss, too.
            with setup.fabric.autocast():
                losses = head.loss(outputs, batch.targets)
            if mixed:
                losses |= {name: torch.zeros_like(losses[name]) for name in head.unmixed_losses & losses.keys()}
            each = torch.stack(list(losses.values()))
            watch.lap(FORWARD)
            setup.fabric.backward(each.sum() / share)
        # Once a batch, and after the way back is queued: a GPU is waited for here.
        values = dict(zip(losses, each.tolist()))
        _check_finite(values, progress.step, batch)
        watch.lap(BACKWARD)
        if whole_step:
            if options.clip_norm is not None:
                setup.fabric.clip_gradients(
                    setup.wrapped, optimizer, max_norm=options.clip_norm, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            if setup.average is not None:
                setup.average.update(setup.model)
            progress.step += 1
        for name, value in values.items():
            sums[name] += value
        console.step(progress, number, setup.sampler.batches, values, options.lr * factor, len(batch))
        watch.lap(STEP)
    return {name: value / setup.sampler.batches for name, value in sums.items()}


def group_size(number: int, batches: int, accumulate: int) -> int:
    """How many batches make up the step of batch `number` (from 1); the last step of an epoch may have fewer."""
    first = (number - 1) // accumulate * accumulate
    return min(accumulate, batches - first)


def _check_finite(losses: dict[str, float], step: int, batch: Batch) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            pictures = ", ".join(meta.source for meta in batch.metas)
            raise LossNotFiniteError(
                f"The loss '{name}' is {value} at step {step}, on the pictures {pictures}. Look at their boxes "
                "(detkit check), lower train.lr, lengthen train.warmup_epochs, set train.clip_norm (10, say), or use "
                "train.precision 32-true."
            )


def _set_up(fabric: Fabric, experiment: Experiment, train_set: Dataset, load_weights: bool) -> Setup:
    options = experiment.train
    model = build_model(experiment, train_set.classes, load_weights=load_weights)
    _check_smallest_size(model, experiment.input.training_sizes)
    model.freeze(options.freeze, options.freeze_norms)
    # Convolutions on the CPU and on tensor cores run faster with the channels of a pixel side by side.
    model = model.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.precision == "bf16-mixed" and fabric.device.type == "cpu":
        depthwise_in_float32(model)
    average = AveragedModel(model, options.ema_decay) if options.ema_decay is not None else None
    groups = model.parameter_groups(options.lr, options.backbone_lr_factor, options.weight_decay)
    optimizer = _optimizer(groups, options)
    peak_lrs = [group["lr"] for group in groups]
    wrapped, optimizer = fabric.setup(model, optimizer)
    fit = model.fit.untrimmed()
    loader, sampler = training_loader(
        train_set,
        fit,
        Augment(experiment.augment, fit, points=point_rule(train_set)) if experiment.augment else None,
        batch_size=options.batch_size // (options.accumulate * fabric.world_size),
        workers=options.workers,
        seed=options.seed,
        plain_from_epoch=options.epochs - options.plain_epochs if options.plain_epochs else None,
        unmixed_from_epoch=options.epochs - options.unmixed_epochs if options.unmixed_epochs else None,
        sizes=experiment.input.training_sizes,
        per_class=options.per_class,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin=fabric.device.type == "cuda",
    )
    _refuse_mixes(model.head, loader.dataset)
    steps_per_epoch = -(-sampler.batches // options.accumulate)
    watch = Stopwatch(detailed=fabric.device.type == "cpu")
    return Setup(fabric, options, model, wrapped, average, optimizer, peak_lrs, loader, sampler, steps_per_epoch, watch)


def _refuse_mixes(head: Head, reader: Any) -> None:
    """Refuse mosaic and mixup where the truth is of the picture as a whole, which a mixed one is not.

    Raises:
        ConfigError: naming the head.
    """
    if reader.augment is not None and reader.augment.mixes and "image_labels" in head.needs:
        raise ConfigError(
            "'augment' mixes pictures (mosaic, mixup), but this head learns the class of a picture as a whole, and a "
            "mixed one has several. Leave them out; random_resized_crop, flip and photometric go with it."
        )


@torch.no_grad()
def _check_smallest_size(model: Model, sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse input.multi_scale where the model cannot take the smallest input, before it comes up in some epoch.

    Raises:
        ConfigError: with what the model says.
    """
    if not sizes:
        return
    height, width = sizes[0]
    whole = torch.tensor([[0.0, 0.0, width, height]])
    proposals = (whole,) if "proposals" in model.head.needs else None
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, height, width), ((height, width),), proposals)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"'input.multi_scale' makes inputs as small as {[height, width]}, which this model cannot take: "
            f"{' '.join(str(error).split())}. Raise its first number, or set it to null for a model of one size only."
        ) from None
    model.train(training)


def _optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> Optimizer:
    betas = (options.momentum, 0.999)
    # A fused step unscales half-precision gradients itself, too late for clipping them.
    fused = options.precision != "16-mixed"
    match options.optimizer:
        case "sgd":
            return SGD(groups, lr=options.lr, momentum=options.momentum, fused=fused)
        case "adam":
            return Adam(groups, lr=options.lr, betas=betas, fused=fused)
        case "adamw":
            return AdamW(groups, lr=options.lr, betas=betas, fused=fused)


def _validate(
    setup: Setup, progress: Progress, val_set: Dataset, folder: RunFolder, console: TrainingConsole
) -> Evaluation | None:
    """Score the model on the first process, and keep it if it is the best so far."""
    evaluation = None
    if setup.fabric.is_global_zero:
        model: Model = setup.average.model if setup.average is not None else setup.model  # type: ignore[assignment]
        batch_size = setup.options.batch_size // (setup.options.accumulate * setup.fabric.world_size)
        with console.validation(len(val_set)) as advance:
            workers, store = setup.options.workers, setup.val_store
            evaluation = evaluate(
                model,
                val_set,
                batch_size=batch_size,
                workers=workers,
                advance=advance,
                store=store,
                max_dets=setup.options.max_dets,
            )
        for each in (model, setup.model):
            task_of(each.head).keep(each.head, evaluation.scores)
        score = task_of(model.head).score(evaluation.scores, model.head)
        if score > progress.best_score:
            progress.best_score, progress.evaluations_since_best = score, 0
            model.save(folder.best)
            task_of(model.head).plot(evaluation.scores, folder.pictures)
        else:
            progress.evaluations_since_best += 1
    # Every process must come to the same decision about stopping early.
    shared = setup.fabric.broadcast((progress.best_score, progress.evaluations_since_best))
    progress.best_score, progress.evaluations_since_best = shared
    return evaluation


def _patience_is_over(progress: Progress, options: TrainOptions) -> bool:
    return options.patience is not None and progress.evaluations_since_best >= options.patience


def _save(setup: Setup, progress: Progress, folder: RunFolder, random_states: Any) -> None:
    """The last weights, and what a resumed run needs to go on as if nothing had happened."""
    model: Model = setup.average.model if setup.average is not None else setup.model  # type: ignore[assignment]
    model.save(folder.last)
    folder.save_state(
        {
            "progress": asdict(progress),
            "model": setup.model.state_dict(),
            "optimizer": setup.optimizer.state_dict(),
            "average": setup.average.model.state_dict() if setup.average is not None else None,
            "average_updates": setup.average.updates if setup.average is not None else 0,
            "scaler": setup.fabric.strategy.precision.state_dict(),
            "random": random_states.cpu(),
        }
    )


def _resume(setup: Setup, folder: RunFolder, experiment: Experiment) -> Progress:
    """Put weights, optimiser and random state back to the end of the run's last whole epoch.

    Raises:
        CheckpointError: there is nothing to resume, or the data have other classes now.
        ConfigError: the experiment differs in what cannot change within a run.
    """
    state = folder.load_state()
    folder.check_same_experiment(experiment)
    check_classes(read_checkpoint(folder.last)[2], setup.model.classes, str(folder.last))
    setup.model.load_state_dict(state["model"])
    setup.optimizer.load_state_dict(state["optimizer"])
    if setup.average is not None and state["average"] is not None:
        setup.average.model.load_state_dict(state["average"])
        setup.average.updates = state["average_updates"]
    setup.fabric.strategy.precision.load_state_dict(state["scaler"])
    random_states = state["random"].view(-1, torch.get_rng_state().numel())
    torch.set_rng_state(random_states[setup.fabric.global_rank % len(random_states)])
    if setup.fabric.is_global_zero:
        folder.write_config(experiment)
    return Progress(**state["progress"])
