"""The processes of one training: if one of them fails, it says why, and the others end without a word."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import distributed

from detkit.errors import DetkitError


def forget_children(fabric: Fabric) -> None:
    """Keep lightning-fabric from killing this process at the end of another one, in the middle of its own message.

    A process that waits for one that has ended gets an error at once, at least on CPUs, where it waits in gloo.
    """
    children = getattr(fabric.strategy.launcher, "procs", None)
    if children and fabric.device.type == "cpu":
        children.clear()


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Let only the first process that fails raise its error; the others, which wait for it in vain, exit with status 1.

    Raises:
        DetkitError: another process has ended without an error of its own.
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
                "Another process of this training has ended; the system ends processes when memory runs out. Lower "
                "train.batch_size or train.workers. The run goes on from its last whole epoch with --resume RUN."
            ) from error
        raise


def _is_first_to_fail() -> bool:
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return bool(store.add("detkit: processes that failed", 1) == 1)
    except (RuntimeError, ValueError):
        return False  # the first process, which keeps the store, has ended
