"""A model's losses and scores on a data set, from one forward pass of each picture."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from detkit.data.dataset import Dataset
from detkit.data.loader import batches, evaluation_loader
from detkit.heads.base import Head
from detkit.model import Model
from detkit.tasks.base import task_of


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        losses: mean over pictures, by name.
        scores: of all predictions, of a class of the task (Detections: DetectionScores).
        results: the predictions as the task writes them (Detections: COCO results).
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
    advance: Callable[[int], None] = lambda pictures: None,
) -> Evaluation:
    """Losses and scores of `model`, which is left in evaluation mode.

    Args:
        advance: called with the number of pictures after each batch.
    """
    task = task_of(model.head)
    evaluator = task.evaluator(dataset.classes, model.head)
    sums: dict[str, float] = defaultdict(float)
    device = next(model.parameters()).device
    model.eval()
    loader = evaluation_loader(dataset, model.fit, batch_size=batch_size, workers=workers)
    position = 0
    # Losses of heads that sample at random: the same choice in every evaluation, and none of training's numbers spent.
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches(loader):
            batch = batch.to(device)
            outputs = model(batch.images, batch.sizes, batch.proposals)
            for name, value in _losses(model.head, outputs, batch.targets):
                sums[name] += value * len(batch)
            # Picture by picture, since the masks of a batch are large.
            for found, meta in zip(model.head.decode(outputs), batch.metas):
                # The truth in the source's own pixels comes straight from the file: no rounding on the way.
                truth = dataset.target(position)
                found = task.undo(found.to("cpu"), meta, dataset.classes.names)
                evaluator.update([found], [truth], [replace(meta, matrix=None)])
                position += 1
            advance(len(batch))
    losses = {name: value / position for name, value in sums.items()}
    return Evaluation(losses, evaluator.compute(), evaluator.results())


def _losses(head: Head, outputs: Any, targets: Any) -> Iterator[tuple[str, float]]:
    for name, value in head.loss(outputs, targets).items():
        yield name, value.item()
