"""Lookup of trained models: runs/<task>/<name>/checkpoints/best.safetensors, and shorter ways to name them.

This module imports nothing heavy, so that an unknown name is reported immediately.
"""

import difflib
import os
from pathlib import Path

from detkit.errors import CheckpointError

BEST = Path("checkpoints") / "best.safetensors"
TORCHVISION = "torchvision:"
PREFIXES = (TORCHVISION, "mtcnn:")
"""Prefixes of the names of published models; see detkit.published."""
SHOWN_RUNS = 8
"""Maximum number of runs that the message about a missing run lists."""
CLOSE = 0.5
"""Minimum similarity, in 0..1, of a suggested name."""


def resolve_checkpoint(path: str | Path) -> str:
    """Resolve a run's folder to its best checkpoint; files (`.pth`, `.weights` included) and published names are kept.

    Raises:
        CheckpointError: there is no such checkpoint; the message lists existing runs, the nearest first.
    """
    given = Path(path)
    # Unlike the methods of Path, these return False for names that are too long.
    if os.path.isdir(given):
        for checkpoint in (given / BEST, given / BEST.name):
            if checkpoint.is_file():
                return str(checkpoint)
        raise CheckpointError(f"The folder '{path}' contains no {BEST.as_posix()}. {_advice(given)}")
    if not os.path.isfile(split_options(str(path))[0]) and not str(path).startswith(PREFIXES):
        raise CheckpointError(f"There is no checkpoint '{path}'. {_advice(given)}")
    return str(path)


def split_options(source: str) -> tuple[str, str]:
    """Split "own.pth?input.size=[600, 1000]" into the file and its options, which are usually empty."""
    file, _, options = (source, "", "") if os.path.isfile(source) else source.partition("?")
    return file, options


def runs_near(path: Path) -> list[Path]:
    """Find run folders with a checkpoint, and checkpoint files, by descending similarity to the name of `path`.
    Searches `path`, its nearest existing parent folder, and `runs`.
    """
    folders = [path, next((folder for folder in path.parents if os.path.isdir(folder)), path), Path("runs")]
    runs: dict[Path, Path] = {}
    for folder in filter(os.path.isdir, folders):
        found = [file.parents[1] for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{BEST.as_posix()}")]
        for item in [*found, *folder.glob("*.safetensors")]:
            runs.setdefault(item.resolve(), item)
    return sorted(runs.values(), key=lambda run: (-_likeness(run, path), str(run)))


def _likeness(run: Path, path: Path) -> float:
    return difflib.SequenceMatcher(None, run.name, path.name).ratio()


def _advice(path: Path) -> str:
    runs = runs_near(path)
    if not runs:
        return "Give the folder of a run, runs/<task>/<name>, or a checkpoint file; `detkit train` writes them."
    meant = f"Did you mean '{runs[0]}'? " if _likeness(runs[0], path) >= CLOSE else ""
    more = f" and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else ""
    return f"{meant}Available: {', '.join(map(str, runs[:SHOWN_RUNS]))}{more}."
