"""Evaluation of a model on a data set: losses and scores from one forward pass per image."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from detkit.data.dataset import Dataset
from detkit.data.loader import batches, evaluation_loader, naming_lost_workers
from detkit.engine.feature_store import FeatureStore
from detkit.inference.optimization import FastNetwork
from detkit.inference.windows import predict_with_losses
from detkit.model import Model
from detkit.structures import Batch
from detkit.tasks.base import task_of


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        losses: mean over images, by name.
        scores: the scores, of a class that depends on the task (detection: DetectionScores).
        results: the predictions in the task's file format (detection: COCO results).
    """

    losses: dict[str, float]
    scores: Any
    results: list[dict[str, Any]]


def evaluate(
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    advance: Callable[[int], None] = lambda images: None,
    store: FeatureStore | None = None,
    network: FastNetwork | None = None,
    max_dets: int | None = None,
) -> Evaluation:
    """Compute losses and scores of `model`, which is left in evaluation mode.

    Args:
        advance: called with the number of images after each batch.
        store: the stored feature maps of these images, for a frozen backbone.
        network: the optimised model to evaluate instead; not with a store.
        max_dets: see `TrainOptions.max_dets`.
    """
    task = task_of(model.head)
    sums: dict[str, float] = defaultdict(float)
    device = next(model.parameters()).device
    model.eval()
    # Stored maps have the same size for all images.
    fit = model.fit if store is None else model.fit.untrimmed()
    on_gpu = device.type == "cuda"
    loader = evaluation_loader(dataset, fit, batch_size=batch_size, workers=workers, pin=on_gpu)
    position = 0
    # Only an open-set head may be evaluated on other classes than its own (check_classes); it has no loss for them.
    known = not model.head.open_set or dataset.classes.names == model.classes.names
    # Heads with random sampling in the loss: use the same samples in every evaluation, and leave training's generator
    # unchanged.
    arithmetic = torch.inference_mode() if network is None else network.arithmetic()
    evaluator, decoding = task.scoring(dataset.classes, model.head, max_dets)
    fork = torch.random.fork_rng([device] if on_gpu else [])
    with naming_lost_workers(), arithmetic, fork:
        torch.manual_seed(0)
        for batch in batches(loader) if store is None else store.batches(loader, model):
            batch = batch.to(device) if known else _without_labels(batch.to(device))
            predictions, losses = predict_with_losses(model, batch, network, decoding)
            for name, value in losses.items():
                sums[name] += value * len(batch)
            # One image at a time, since masks are large.
            for found, meta in zip(predictions, batch.metas):
                # Targets in source pixels come directly from the data set, without rounding.
                target = dataset.target(position)
                found = task.undo(found.to("cpu"), meta, dataset.classes.names)
                evaluator.update([found], [target], [replace(meta, matrix=None)])
                position += 1
            advance(len(batch))
    means = {name: value / position for name, value in sums.items()} if known else {}
    return Evaluation(means, task.scored(evaluator.compute(), means), evaluator.results())


def _without_labels(batch: Batch) -> Batch:
    """Remove the image labels, which are not among the model's classes."""
    none = torch.zeros(0, dtype=torch.int64, device=batch.images.device)
    return replace(batch, targets=tuple(replace(target, image_labels=none) for target in batch.targets))
