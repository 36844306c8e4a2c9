"""The folder of a training run: config, metrics, checkpoints, images.

The training state alone defines the progress of a run. It is written first after each epoch, and the other files can be
restored from it, so that a run can be resumed after its process was killed at any moment.
"""

import csv
import errno
import hashlib
import io
import itertools
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from detkit.config import Experiment, experiment_to_dict, load_experiment
from detkit.errors import CheckpointError, ConfigError, WriteError
from detkit.io.files import make_folder, read_text, replacing, write_error
from detkit.io.torch_file import read_torch
from detkit.tasks.base import Scores

STATE_FORMAT, EARLIER_STATE_FORMAT = 2, 1
"""The earlier format has no checksum."""
MAY_CHANGE = frozenset(
    {"data.root", "data.data.root", "name", "proposals.cache", "proposals.path", "runs"}
    | {
        f"train.{name}"
        for name in ("cache", "cache_gb", "device", "devices", "epochs", "patience", "validate_every", "workers")
    }
)


class RunFolder:
    """The folder runs/<task>/<name> and the paths in it.

    Attributes:
        rows: rows of metrics.csv, starting with the header.
        best_scores: validation scores of `best`, if this process evaluated it as `detkit eval` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.best = self.checkpoints / "best.safetensors"
        self.state = self.checkpoints / "training_state.pt"
        self.previous_state = self.checkpoints / "training_state_previous.pt"
        self.rows: list[list[str]] = []
        self.best_scores: Scores | None = None
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, experiment: Experiment, task: str) -> "RunFolder":
        """Create a new folder and lock it; a number is appended to a name that exists: <name>2, <name>3 ...

        It is created under a temporary name, so that a folder with the name of a run can always be resumed.

        Raises:
            WriteError: the folder cannot be created.
        """
        parent = Path(experiment.runs) / task
        target = parent / experiment.name
        folder = cls(target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part"))
        try:
            make_folder(folder.images)
            make_folder(folder.checkpoints)
            folder.acquire()
            folder.write_config(experiment)
            run = cls(_renamed(folder.path, target))
        except BaseException as error:
            shutil.rmtree(folder.path, ignore_errors=True)
            if isinstance(error, WriteError):
                raise WriteError(str(error).replace(str(folder.path), str(target))) from error
            raise
        run._lock = folder._lock
        return run

    def acquire(self) -> None:
        """Lock the run for this process, until `release` or the end of the process.

        Raises:
            ConfigError: another process has locked it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        path = self.path / "train.lock"
        try:
            self._lock = path.open("a+", encoding="utf-8")
            # Unlike flock, worker processes, which outlive a killed parent, do not inherit this lock.
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # the file system does not support locks
                self._lock.seek(0)
                raise ConfigError(
                    f"The run '{self.path}' is being trained by process {self._lock.read().strip() or '(unknown)'}. "
                    f"Wait until it ends or stop it, then give --resume again."
                ) from None
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
        except OSError as error:
            raise write_error(path, error) from error

    def release(self) -> None:
        """Unlock the run for other processes."""
        if self._lock is not None:
            self._lock.close()

    def write_config(self, experiment: Experiment) -> None:
        """Write config.yaml, which `--resume` reads."""
        with replacing(self.config, "w") as file:
            yaml.safe_dump(experiment_to_dict(experiment), file, sort_keys=False)

    def check_same_experiment(self, experiment: Experiment) -> None:
        """Check that no options have changed since the run started, except those in MAY_CHANGE.

        Raises:
            ConfigError: naming the first option that differs.
        """
        before = _flat(experiment_to_dict(load_experiment([str(self.config)])))
        now = _flat(experiment_to_dict(experiment))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in MAY_CHANGE:
                raise ConfigError(
                    f"The run '{self.path}' was started with {key} = {before.get(key)!r} and cannot continue with "
                    f"{now.get(key)!r}. Only {', '.join(sorted(MAY_CHANGE))} may change; start a new run with "
                    f"--weights {self.last} instead."
                )

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.csv; the first one defines the columns of the run."""
        if not self.rows:
            self.rows.append(list(row))
        values = (row.get(column) for column in self.rows[0])
        self.rows.append(["" if value is None else str(value) for value in values])

    def read_metrics(self, epoch: int) -> None:
        """Read the rows of metrics.csv up to an epoch, for a run whose training state does not contain them."""
        if not self.metrics.is_file():
            return
        lines = read_text(self.metrics, "file").replace("\0", "").splitlines()
        header, *rows = list(csv.reader(lines)) or [[]]
        whole = {row[0]: row for row in rows if row and len(row) == len(header) and row[0].isdecimal()}
        self.rows = [header, *(row for number, row in whole.items() if int(number) <= epoch)] if header else []

    def write_metrics(self) -> None:
        """Write metrics.csv."""
        with replacing(self.metrics, "w", newline="") as file:
            csv.writer(file).writerows(self.rows)

    def write_checkpoint(self, path: Path, content: bytes) -> None:
        """Write `last` or `best`."""
        with replacing(path) as file:
            file.write(content)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state that `--resume` needs besides the config; the last one is kept as the previous state.

        Raises:
            WriteError: it cannot be written; the earlier state is unchanged.
        """
        buffer = io.BytesIO()
        torch.save({"format": STATE_FORMAT, **state}, buffer)
        with replacing(self.state) as file:
            file.write(_with_checksum(buffer.getbuffer()))
            file.flush()
            if self.state.exists():
                self.state.replace(self.previous_state)

    def recover(self) -> str:
        """Replace a missing or damaged training state by the previous one.

        Also removes temporary files of a killed process. The run must be locked by this process.

        Returns:
            A line about the recovery; empty if there was nothing to do.
        """
        for left in [*self.path.glob(".*.part"), *self.checkpoints.glob(".*.part")]:
            with suppress(OSError):
                left.unlink()
        if not self.previous_state.is_file():
            return ""
        try:
            if self.state.is_file():
                _read_state(self.state)
                return ""
            reason = f"There is no training state '{self.state}'."
        except CheckpointError as error:
            reason = str(error)
        try:
            epoch = _read_state(self.previous_state)["progress"]["epoch"]
            self.previous_state.replace(self.state)
        except (CheckpointError, LookupError, TypeError):
            return ""  # `load_state` reports the error
        except OSError as error:
            raise write_error(self.state, error) from error
        return f"{reason} The run continues from the previous one, of epoch {epoch}."

    def load_state(self) -> dict[str, Any] | None:
        """Read the training state; None for a run that has not finished its first epoch.

        Raises:
            CheckpointError: it cannot be read, or is missing although the run has checkpoints, or this is not a run.
        """
        if not os.path.isfile(self.config):
            raise CheckpointError(
                f"There is nothing to resume in '{self.path}': it has no {self.config.name}. Give --resume the folder "
                "of a run, or put that file back."
            )
        if self.state.is_file():
            try:
                return _read_state(self.state)
            except CheckpointError as error:
                remedy = f"To go on without it, start a new run with --weights {self.last}."
                raise CheckpointError(f"{error} {remedy}") from None
        for path in (self.last, self.best, self.metrics):
            if path.exists():
                raise CheckpointError(
                    f"There is nothing to resume in '{self.path}': it has a {path.name}, but no training state "
                    f"'{self.state}'. Put that file back, or start a new run with --weights {self.last}."
                )
        return None


def _with_checksum(content: memoryview) -> bytes:
    """Append the SHA-256 of a zip archive as its comment, whose length is the archive's last two bytes."""
    begin = bytes(content[:-2]) + len(_comment(b"")).to_bytes(2, "little")
    return begin + _comment(begin)


def _comment(content: bytes | memoryview) -> bytes:
    return b"sha256 " + hashlib.sha256(content).hexdigest().encode()


def _read_state(path: Path) -> dict[str, Any]:
    state = read_torch(path, "training state")
    form = state.get("format") if isinstance(state, dict) else None
    if form not in (EARLIER_STATE_FORMAT, STATE_FORMAT):
        raise CheckpointError(f"The training state '{path}' cannot be read: its format is {form!r}.")
    if form == STATE_FORMAT:
        content = memoryview(path.read_bytes())
        length = len(_comment(b""))
        if content[-length:] != _comment(content[:-length]):
            raise CheckpointError(f"The training state '{path}' is damaged: it does not match its checksum.")
    return state


def _renamed(folder: Path, target: Path) -> Path:
    """Rename a folder to `target`, or to that name followed by the first free number."""
    for number in itertools.count(1):
        path = target if number == 1 else target.parent / f"{target.name}{number}"
        try:
            if not os.path.lexists(path):
                return folder.rename(path)
        except OSError as error:
            # Another process was faster.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise write_error(path, error) from error
    raise AssertionError


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
