"""The folder of one training run: config, metrics, checkpoints, pictures."""

import csv
from pathlib import Path
from typing import Any

import torch
import yaml

from detkit.config import Experiment, experiment_to_dict, load_experiment
from detkit.errors import CheckpointError, ConfigError
from detkit.torch_file import read_torch

STATE_FORMAT = 1
MAY_CHANGE = frozenset(
    {"data.root", "data.data.root", "name", "proposals.cache", "proposals.path", "runs"}
    | {
        f"train.{name}"
        for name in ("cache", "cache_gb", "device", "devices", "epochs", "patience", "validate_every", "workers")
    }
)


class RunFolder:
    """runs/<task>/<name>, and where each thing lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.pictures = path / "pictures"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.best = self.checkpoints / "best.safetensors"
        self.state = self.checkpoints / "training_state.pt"

    @classmethod
    def create(cls, experiment: Experiment, task: str) -> "RunFolder":
        """A new folder; a name that is taken gets a number: <name>2, <name>3 ..."""
        parent = Path(experiment.runs) / task
        number = 1
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                path = parent / (experiment.name if number == 1 else f"{experiment.name}{number}")
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise ConfigError(f"The folder of runs '{parent}' cannot be made: {error.strerror}. Set 'runs'.") from None
        folder = cls(path)
        folder.pictures.mkdir()
        folder.checkpoints.mkdir()
        folder.write_config(experiment)
        return folder

    def write_config(self, experiment: Experiment) -> None:
        """Write config.yaml, from which `--resume` goes on."""
        self.config.write_text(yaml.safe_dump(experiment_to_dict(experiment), sort_keys=False), encoding="utf-8")

    def check_same_experiment(self, experiment: Experiment) -> None:
        """Refuse to go on with other options than the run began with, but for those in MAY_CHANGE.

        Raises:
            ConfigError: naming what differs.
        """
        before = _flat(experiment_to_dict(load_experiment([str(self.config)])))
        now = _flat(experiment_to_dict(experiment))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in MAY_CHANGE:
                raise ConfigError(
                    f"The run '{self.path}' began with {key} = {before.get(key)!r}, and cannot go on with "
                    f"{now.get(key)!r}. Only {', '.join(sorted(MAY_CHANGE))} may change; start a new run with "
                    f"--weights {self.last} instead."
                )

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.csv; the first one writes the header."""
        columns = list(row)
        new = not self.metrics.exists()
        if not new:
            with self.metrics.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file))
        with self.metrics.open("a", newline="", encoding="utf-8") as file:
            # A run that began with an earlier version of detkit keeps its columns.
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write what `--resume` needs besides the weights, all at once or not at all."""
        temporary = self.state.with_suffix(".part")
        torch.save({"format": STATE_FORMAT, **state}, temporary)
        temporary.replace(self.state)

    def load_state(self) -> dict[str, Any]:
        """What `save_state` wrote.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if not self.state.is_file():
            raise CheckpointError(
                f"There is nothing to resume in '{self.path}': it has no {self.state.relative_to(self.path)}. Give "
                "--resume the folder of a run that finished at least one epoch."
            )
        state: dict[str, Any] = read_torch(self.state, "training state")
        if state.get("format") != STATE_FORMAT:
            raise CheckpointError(f"The training state '{self.state}' has another format, {state.get('format')!r}.")
        return state


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
