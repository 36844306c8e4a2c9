"""`detkit train` in which something happens to one process: python rank_driver.py EVENT RANK ARGUMENT..., for
test_processes.py. Events: none, broken-image, kill, kill-after-save, memory (an error that is not detkit's own)."""

import os
import signal
import sys
from typing import Any

from detkit.cli import main
from detkit.data.formats.shapes import Shapes
from detkit.engine import train as engine
from detkit.errors import DataError


def happen(event: str) -> None:
    """Let it happen in this process, in the second epoch or after it is saved."""
    train_epoch, save, read = engine._train_epoch, engine._save, Shapes.__getitem__
    epochs = []

    def reading(self: Shapes, index: int) -> Any:
        if len(epochs) == 2 and event == "broken-image":
            raise DataError("The image 'x.png' is cut off.")
        if len(epochs) == 2 and event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(epochs) == 2 and event == "memory":
            raise MemoryError("no memory is left")
        return read(self, index)

    def training(*arguments: Any) -> Any:
        epochs.append(1)
        return train_epoch(*arguments)

    def saving(setup: Any, progress: Any, *arguments: Any, **options: Any) -> None:
        save(setup, progress, *arguments, **options)
        if progress.epoch == 2 and event == "kill-after-save":
            os.kill(os.getpid(), signal.SIGKILL)

    engine._train_epoch, engine._save = training, saving
    Shapes.__getitem__ = reading  # type: ignore[method-assign]


if __name__ == "__main__":
    event, rank, *arguments = sys.argv[1:]
    if os.environ.get("LOCAL_RANK", "0") == rank:
        happen(event)
    sys.exit(main(["train", *arguments]))
