"""The training loop and its setup. Devices, precision and processes are handled by lightning-fabric."""

import logging
import math
import os
import time
import uuid
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam, AdamW, Optimizer

from detkit.config import Experiment, TrainOptions
from detkit.data.cache import with_cache
from detkit.data.dataset import Dataset, fingerprint_change
from detkit.data.jpeg_scaling import with_reduced_decoding
from detkit.data.loader import EpochSampler, batches, naming_lost_workers, training_loader
from detkit.data.points import point_rule
from detkit.data.proposals.dataset import check_needed, with_proposals
from detkit.data.splits import open_train_and_val
from detkit.data.transforms import Augment
from detkit.engine.console import TrainingConsole
from detkit.engine.depthwise import depthwise_in_float32
from detkit.engine.ema import AveragedModel
from detkit.engine.evaluate import Evaluation, evaluate
from detkit.engine.feature_store import FeatureStore, check_storable, feature_stores
from detkit.engine.images import write_predictions, write_training_batch
from detkit.engine.malloc import keep_freed_memory
from detkit.engine.processes import detach_children, ending_together
from detkit.engine.profiler import BACKWARD, FORWARD, IMAGES, REST, STEP, STORED, VALIDATION, Stopwatch
from detkit.engine.run_folder import RunFolder
from detkit.engine.schedule import learning_rate_factor
from detkit.errors import CheckpointError, ConfigError, DataError, DetkitError
from detkit.heads.base import Head
from detkit.inference.optimization import bf16_instructions
from detkit.io.terminal import Console
from detkit.model import Model, build_model, check_classes, described_model, read_tensors
from detkit.registry import heads
from detkit.structures import Batch, ClassList
from detkit.tasks.base import task_of


class LossNotFiniteError(DetkitError):
    """A loss became infinite or NaN; training on would destroy the weights."""


@dataclass
class Progress:
    """The progress of a run; saved after each epoch.

    Args:
        best_checksum: checksum of the best checkpoint; empty before the first evaluation.
        run: unique id of the run, which its checkpoints contain.
    """

    epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    evaluations_since_best: int = 0
    best_checksum: str = ""
    run: str = ""


@dataclass
class Setup:
    """The objects of a training.

    Args:
        data: the fingerprint of each split.
    """

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
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    store: FeatureStore | None = None
    val_store: FeatureStore | None = None

    @property
    def evaluated(self) -> Model:
        """The model that is evaluated and saved: the EMA model if there is one."""
        return self.model if self.average is None else self.average.model  # type: ignore[return-value]


def train(experiment: Experiment, resume: str | None = None) -> RunFolder | None:
    """Run an experiment: train, evaluate and save its model.

    Args:
        experiment: the experiment.
        resume: the folder of an unfinished run, which continues exactly after its last complete epoch.

    Returns:
        The run's folder, with checkpoints/best.safetensors and metrics.csv, and the scores of the best epoch unless it
        was before the resume; None in all processes except the first, which alone evaluates and writes.

    Raises:
        DetkitError: a mistake in config, data or weights, found before the first step if possible.
        LossNotFiniteError: naming the loss, the step and the images.
    """
    head: type[Head] = heads.get(str(experiment.head.get("name")))  # type: ignore[assignment]
    fabric, options = _launch(experiment.train, head)
    with ending_together(fabric), naming_lost_workers():
        # The run's config then contains the actual precision.
        return _train(fabric, replace(experiment, train=options), head, resume)


def _train(fabric: Fabric, experiment: Experiment, head: type[Head], resume: str | None) -> RunFolder | None:
    options = experiment.train
    if fabric.device.type == "cpu":
        keep_freed_memory()
    fabric.seed_everything(options.seed, verbose=False)
    check_needed(experiment.proposals, head.needs, str(experiment.head["name"]))
    check_storable(experiment)
    console = Console(quiet=not fabric.is_global_zero)
    folder, state = _run_to_resume(fabric, resume, console)
    train_set, val_set = _open_data(fabric, experiment, head)
    setup = _set_up(fabric, experiment, train_set, load_weights=state is None)
    for dataset in (train_set, val_set):
        task_of(head).check_head(setup.model.head, dataset)
    setup.data = {"train": train_set.fingerprint(), "val": val_set.fingerprint()}
    progress = Progress(run=fabric.broadcast(uuid.uuid4().hex))
    if folder is None:
        folder = _new_run(fabric, experiment, head.task)
    if state is not None:
        progress = _resume(setup, folder, experiment, state, console)
    elif fabric.is_global_zero:
        task = task_of(head)
        write_training_batch(setup.loader.dataset, task, folder.images / "training_batch.jpg", train_set.classes)
    try:
        with (
            feature_stores(experiment, folder.path, len(train_set), len(val_set)) as (setup.store, setup.val_store),
            TrainingConsole(folder, experiment, setup.model, train_set, val_set, fabric) as reports,
        ):
            while progress.epoch < options.epochs and not _patience_is_over(progress, options):
                _epoch(setup, progress, val_set, folder, reports)
            reports.limits(setup.watch)
        if not fabric.is_global_zero:
            return None
        write_predictions(folder, val_set)
        return folder
    finally:
        folder.release()


def _epoch(setup: Setup, progress: Progress, val_set: Dataset, folder: RunFolder, console: TrainingConsole) -> None:
    """Train for one epoch, evaluate if due, and save."""
    fabric, options = setup.fabric, setup.options
    started = time.perf_counter()
    waited = setup.watch.seconds[IMAGES]
    losses = _train_epoch(setup, progress, console)
    seconds = time.perf_counter() - started
    waited = setup.watch.seconds[IMAGES] - waited
    progress.epoch += 1
    evaluation = None
    if progress.epoch % options.validate_every == 0 or progress.epoch == options.epochs:
        evaluation = _validate(setup, progress, val_set, folder, console)
        setup.watch.lap(VALIDATION)
    random_states = fabric.all_gather(torch.get_rng_state())
    if fabric.is_global_zero:
        console.epoch(progress, losses, evaluation, seconds, waited)
        _save(setup, progress, folder, random_states, is_best=evaluation is not None and _is_best(progress))
    fabric.barrier()
    setup.watch.lap(REST)


def _launch(options: TrainOptions, head: type[Head]) -> tuple[Fabric, TrainOptions]:
    """Start the processes, one per device; also return the options with the precision "auto" resolved."""
    fabric = _fabric(options, "32-true")
    if options.precision == "auto":
        exact = head.full_precision or not bf16_instructions(fabric.device)
        options = replace(options, precision="32-true" if exact else "bf16-mixed")
    if options.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ConfigError("'train.precision' 16-mixed needs a GPU. Use auto, bf16-mixed or 32-true on a CPU.")
    if options.precision == "32-true":
        fabric.strategy.precision = _SameInputs()
    else:
        fabric = _fabric(options, options.precision)
        precision = fabric.strategy.precision
        assert isinstance(precision, MixedPrecision)
        fabric.strategy.precision = _ExactInputs(precision.precision, precision.device)
    fabric.launch()
    detach_children(fabric)
    return fabric, options


def _fabric(options: TrainOptions, precision: Any) -> Fabric:
    # Its messages repeat those of the console.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        return Fabric(accelerator=options.device, devices=options.devices, precision=precision)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "'train.device' cuda cannot be used: torch finds no GPU (`nvidia-smi` lists the GPUs of the machine). "
                "Set it to auto or cpu."
            ) from None
        raise ConfigError(
            f"'train.device' {options.device} with 'train.devices' {options.devices} cannot be used: "
            f"{' '.join(str(error).split())}"
        ) from None


class _SameInputs(Precision):
    """Fabric's precision of 32 bits, with the inputs as they are: targets are no tensors that it could convert."""

    def convert_input(self, data: Any) -> Any:
        return data


class _ExactInputs(MixedPrecision):
    """Fabric's mixed precision without conversion of the inputs.

    Rounded to 16 bits, a box near pixel 1,000 would be off by up to 2 pixels, and the padding would differ from the
    mean colour. Layers convert their inputs themselves.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def _open_data(fabric: Fabric, experiment: Experiment, head: type[Head]) -> tuple[Dataset, Dataset]:
    """Open both splits, with proposals for all images if the head needs them."""
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
    # The first process fills the cache for the others.
    with fabric.rank_zero_first():
        train_set = with_proposals(train_set, proposals, str(data.get("train", "train")), "training", quiet)
        val_set = with_proposals(val_set, proposals, str(data.get("val", "val")), "validation", quiet)
    return train_set, val_set


def _run_to_resume(
    fabric: Fabric, resume: str | None, console: Console
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Return the locked folder of the run to resume, and its training state, None if there is none.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: another process is training this run.
    """
    if resume is None:
        return None, None
    folder = RunFolder(Path(resume))
    if fabric.is_global_zero and os.path.isfile(folder.config):
        folder.acquire()
        if line := folder.recover():
            console.print(f"resume     {line}")
    fabric.barrier()
    state = folder.load_state()
    if state is None:
        console.print(f"resume     '{folder.path}' has not finished an epoch; it starts again.")
    return folder, state


def _new_run(fabric: Fabric, experiment: Experiment, task: str) -> RunFolder:
    """Create the folder of a new run in the first process; all processes return the same."""
    folder = RunFolder.create(experiment, task) if fabric.is_global_zero else None
    path = fabric.broadcast(None if folder is None else str(folder.path))
    return RunFolder(Path(path)) if folder is None else folder


def _train_epoch(setup: Setup, progress: Progress, console: TrainingConsole) -> dict[str, float]:
    """Train for one pass over the training images; return the mean of each loss."""
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
        watch.lap(IMAGES if setup.store is None else STORED)
        is_step = number % options.accumulate == 0 or number == setup.sampler.batches
        batch = batch.to(setup.fabric.device)
        factor = learning_rate_factor(progress.step, setup.steps_per_epoch, options)
        for group, peak in zip(optimizer.param_groups, setup.peak_lrs):
            group["lr"] = peak * factor
        share = group_size(number, setup.sampler.batches, options.accumulate)
        with setup.fabric.no_backward_sync(setup.wrapped, enabled=not is_step):
            outputs = setup.wrapped(batch.images, batch.sizes, batch.proposals, batch.features, batch.targets)
            # A head of two stages runs layers in its loss, too.
            with setup.fabric.autocast():
                losses = head.loss(outputs, batch.targets)
            if mixed:
                losses |= {name: torch.zeros_like(losses[name]) for name in head.unmixed_losses & losses.keys()}
            each = torch.stack(list(losses.values()))
            watch.lap(FORWARD)
            setup.fabric.backward(each.sum() / share)
        # The only synchronisation with a GPU per batch, after the backward pass is queued.
        values = dict(zip(losses, each.tolist()))
        _check_finite(values, progress.step, batch)
        watch.lap(BACKWARD)
        if is_step:
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
    """Return the number of batches in the step of batch `number` (from 1); the last step of an epoch may have fewer."""
    first = (number - 1) // accumulate * accumulate
    return min(accumulate, batches - first)


def _check_finite(losses: dict[str, float], step: int, batch: Batch) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            images = ", ".join(meta.source for meta in batch.metas)
            raise LossNotFiniteError(
                f"The loss '{name}' is {value} at step {step}, on the images {images}. Check their boxes (detkit "
                "check), lower train.lr, increase train.warmup_epochs, set train.clip_norm (for example 10), or use "
                "train.precision 32-true."
            )


def _set_up(fabric: Fabric, experiment: Experiment, train_set: Dataset, load_weights: bool) -> Setup:
    options = experiment.train
    model = build_model(experiment, train_set.classes, load_weights=load_weights)
    _check_smallest_size(model, experiment.input.training_sizes)
    model.freeze(options.freeze, options.freeze_norms)
    # Convolutions are faster in channels_last on CPUs and tensor cores.
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
    """Raise ConfigError for mosaic or mixup with a head that learns the class of the whole image.

    Raises:
        ConfigError: with the augmentations that may be used.
    """
    if reader.augment is not None and reader.augment.mixes and "image_labels" in head.needs:
        raise ConfigError(
            "'augment' mixes images (mosaic, mixup), but this head learns the class of the whole image, and a mixed "
            "image has several. Remove them; random_resized_crop, flip and photometric are supported."
        )


@torch.no_grad()
def _check_smallest_size(model: Model, sizes: tuple[tuple[int, int], ...]) -> None:
    """Check that the model accepts the smallest input of input.multi_scale, before it occurs in some epoch.

    Raises:
        ConfigError: with the model's error.
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
            f"'input.multi_scale' gives inputs as small as {[height, width]}, which this model does not support: "
            f"{' '.join(str(error).split())}. Raise its first number, or set it to null for a model of fixed size."
        ) from None
    model.train(training)


def _optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> Optimizer:
    betas = (options.momentum, 0.999)
    # A fused step unscales half-precision gradients itself, after they would be clipped.
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
    """Evaluate the model in the first process, and record whether it is the best so far."""
    evaluation = None
    if setup.fabric.is_global_zero:
        model = setup.evaluated
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
        score = -math.inf if math.isnan(score) else score
        # The first evaluation is the best so far, whatever its score.
        if score > progress.best_score or not progress.best_checksum:
            progress.best_score, progress.evaluations_since_best = score, 0
            # Stored maps have the full padding, which `detkit eval` trims, so the scores may differ.
            folder.best_scores = evaluation.scores if store is None else None
            task_of(model.head).plot(evaluation.scores, folder.images)
        else:
            progress.evaluations_since_best += 1
    # All processes must make the same decision about early stopping.
    shared = setup.fabric.broadcast((progress.best_score, progress.evaluations_since_best))
    progress.best_score, progress.evaluations_since_best = shared
    return evaluation


def _patience_is_over(progress: Progress, options: TrainOptions) -> bool:
    return options.patience is not None and progress.evaluations_since_best >= options.patience


def _is_best(progress: Progress) -> bool:
    """Return whether the last evaluation has the best score so far."""
    return progress.evaluations_since_best == 0


def _save(setup: Setup, progress: Progress, folder: RunFolder, random_states: Any, is_best: bool) -> None:
    """Save the training state, then the files derived from it: last and best weights, and metrics.csv."""
    content, checksum = _serialized(setup, progress)
    if is_best:
        progress.best_checksum = checksum
    folder.save_state(
        {
            "progress": asdict(progress),
            "last": checksum,
            "metrics": folder.rows,
            "data": setup.data,
            "model": setup.model.state_dict(),
            "optimizer": setup.optimizer.state_dict(),
            "average": setup.average.model.state_dict() if setup.average is not None else None,
            "average_updates": setup.average.updates if setup.average is not None else 0,
            "scaler": setup.fabric.strategy.precision.state_dict(),
            "random": random_states.cpu(),
        }
    )
    for path in (folder.last, folder.best) if is_best else (folder.last,):
        folder.write_checkpoint(path, content)
    folder.write_metrics()


def _serialized(setup: Setup, progress: Progress) -> tuple[bytes, str]:
    return setup.evaluated.serialize(run=progress.run, epoch=str(progress.epoch))


def _resume(
    setup: Setup, folder: RunFolder, experiment: Experiment, state: dict[str, Any], console: Console
) -> Progress:
    """Restore weights, optimiser, random state and files of the run's last complete epoch.

    Raises:
        CheckpointError: the state does not match the model, the classes of the data have changed, a checkpoint belongs
            to another run, or the best one is lost.
        ConfigError: an option has changed that must not change within a run.
        DataError: the images or their annotations have changed.
    """
    folder.check_same_experiment(experiment)
    try:
        progress = Progress(**state["progress"])
        setup.model.load_state_dict(state["model"])
        setup.optimizer.load_state_dict(state["optimizer"])
        if setup.average is not None and state["average"] is not None:
            setup.average.model.load_state_dict(state["average"])
            setup.average.updates = state["average_updates"]
        setup.fabric.strategy.precision.load_state_dict(state["scaler"])
        random_states = state["random"].view(-1, torch.get_rng_state().numel())
        # A copy, since torch rejects a view of a larger tensor.
        torch.set_rng_state(random_states[setup.fabric.global_rank % len(random_states)].clone())
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The training state '{folder.state}' does not match this model: {reason}") from error
    if setup.fabric.is_global_zero:
        _check_same_data(setup, state.get("data", {}), folder)
        _restore_files(setup, progress, folder, state, console)
        folder.write_config(experiment)
    progress.run, progress.best_checksum = setup.fabric.broadcast((progress.run, progress.best_checksum))
    return progress


def _check_same_data(setup: Setup, before: dict[str, dict[str, Any]], folder: RunFolder) -> None:
    """Check that the data have not changed since the run started, except for the location of their files.

    Raises:
        CheckpointError: the classes have changed.
        DataError: the images or annotations have changed; the message has the counts.
    """
    for split, fingerprint in before.items():
        if change := fingerprint_change(fingerprint, setup.data[split]):
            check_classes(ClassList.from_names(fingerprint["classes"]), setup.model.classes, str(folder.last))
            raise DataError(
                f"The data of split '{split}' have changed since the run '{folder.path}' was started: {change}. "
                f"Restore them, or start a new run on the new data with --weights {folder.last}."
            )


def _restore_files(
    setup: Setup, progress: Progress, folder: RunFolder, state: dict[str, Any], console: Console
) -> None:
    """Restore files that are missing, damaged or of another epoch from the training state.

    Raises:
        CheckpointError: a checkpoint belongs to another run or has other classes, or the best one is lost.
    """
    classes = setup.model.classes
    last, _ = _problem(folder.last, progress.run, state.get("last", ""), classes)
    best, metadata = "", {"checksum": ""}
    if progress.best_checksum or progress.best_score > -math.inf:
        best, metadata = _problem(folder.best, progress.run, progress.best_checksum, classes)
    progress.run = progress.run or uuid.uuid4().hex
    content, checksum = _serialized(setup, progress)
    lost = []
    if last:
        lost.append((folder.last, last))
    if best and progress.best_checksum and progress.best_checksum == state["last"]:
        lost.append((folder.best, best))
        progress.best_checksum = checksum
    # A best checkpoint of a later epoch remains if the newest state was lost; that epoch writes it again.
    elif best and int(metadata.get("epoch", "0")) <= progress.epoch:
        raise CheckpointError(
            f"'{folder.best}' {best} and cannot be restored. Put the file of this run back, or start a new run from "
            f"its last weights with --weights {folder.last}."
        )
    elif not best:
        progress.best_checksum = metadata["checksum"]
    for path, problem in lost:
        folder.write_checkpoint(path, content)
        console.print(f"resume     '{path}' {problem}; restored from the training state.")
    if "metrics" in state:
        folder.rows = state["metrics"]
    else:
        folder.read_metrics(progress.epoch)
    folder.write_metrics()


def _problem(path: Path, run: str, checksum: str, classes: ClassList) -> tuple[str, dict[str, str]]:
    """Describe how a checkpoint differs from the one that the run saved (empty if it does not), with its metadata.

    Args:
        run: the id of the run; empty if unknown.
        checksum: the checksum of the checkpoint; empty if unknown.

    Raises:
        CheckpointError: it belongs to another run, or has other classes.
    """
    if not path.is_file():
        return "is missing", {}
    try:
        metadata = read_tensors(path)[1]
        _, found = described_model(path, metadata)
    except CheckpointError:
        return "is damaged", {}
    check_classes(found, classes, str(path))
    if run and metadata.get("run") != run:
        raise CheckpointError(
            f"'{path}' belongs to another run than the training state in its folder. Put the files of one run back."
        )
    if checksum and metadata["checksum"] != checksum:
        return f"is of another epoch ({metadata.get('epoch', 'unknown')}) than the training state", metadata
    return "", metadata
