"""The folder of one training run: config, metrics, checkpoints, pictures."""

import csv
from pathlib import Path
from typing import Any

import torch
import yaml

from detkit.config import Experiment, experiment_to_dict
from detkit.errors import CheckpointError

STATE_FORMAT = 1


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
        number = 1
        while True:
            path = Path(experiment.runs) / task / (experiment.name if number == 1 else f"{experiment.name}{number}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        folder = cls(path)
        folder.pictures.mkdir()
        folder.checkpoints.mkdir()
        folder.config.write_text(yaml.safe_dump(experiment_to_dict(experiment), sort_keys=False), encoding="utf-8")
        return folder

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.csv; the first one writes the header."""
        columns = list(row)
        new = not self.metrics.exists()
        if not new:
            with self.metrics.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file))
        with self.metrics.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
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
        try:
            state: dict[str, Any] = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"The training state '{self.state}' cannot be read: {error}") from None
        if state.get("format") != STATE_FORMAT:
            raise CheckpointError(f"The training state '{self.state}' has another format, {state.get('format')!r}.")
        return state


def resolve_checkpoint(path: str) -> Path:
    """The checkpoint file that a user means by a run's folder (its best) or by the file itself."""
    given = Path(path)
    if given.is_dir():
        for folder in (RunFolder(given), RunFolder(given.parent)):
            for checkpoint in (folder.best, folder.last):
                if checkpoint.is_file():
                    return checkpoint
        raise CheckpointError(
            f"The folder '{path}' holds no checkpoints/best.safetensors. Give a run's folder or a file."
        )
    return given
