"""Error handling across the processes of a training: the first that fails reports its error, the others exit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import distributed

from detkit.errors import DetkitError


def detach_children(fabric: Fabric) -> None:
    """Keep lightning-fabric from killing this process when another one ends, while it reports its error.

    A process that waits for one that has ended gets an error immediately, at least on CPUs, where it waits in gloo.
    """
    children = getattr(fabric.strategy.launcher, "procs", None)
    if children and fabric.device.type == "cpu":
        children.clear()


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Raise only the error of the first process that fails; the others exit with status 1.

    Raises:
        DetkitError: another process ended without an error.
    """
    try:
        yield
    except Exception as error:
        if fabric.world_size == 1:
            raise
        if not _is_first_to_fail():
            raise SystemExit(1) from None
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise DetkitError(
                "Another process of this training has ended; the system kills processes when memory runs out. Lower "
                "train.batch_size or train.workers. Continue from the last complete epoch with --resume RUN."
            ) from error
        raise


def _is_first_to_fail() -> bool:
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return bool(store.add("detkit: processes that failed", 1) == 1)
    except (RuntimeError, ValueError):
        return False  # the first process, which hosts the store, has ended
