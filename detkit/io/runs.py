"""Where trained models lie: runs/<task>/<name>/checkpoints/best.safetensors, and what a user may mean by less.

Nothing heavy is imported, so that a name with no model behind it is refused at once.
"""

import difflib
import os
from pathlib import Path

from detkit.errors import CheckpointError

BEST = Path("checkpoints") / "best.safetensors"
TORCHVISION = "torchvision:"
PREFIXES = (TORCHVISION, "mtcnn:")
"""What the names of published models start with; see detkit.published."""
SHOWN_RUNS = 8
"""As many runs are named where the one asked for is missing."""
CLOSE = 0.5
"""From this similarity on, 0..1, a name may have been meant."""


def resolve_checkpoint(path: str | Path) -> str:
    """The checkpoint that a user means by a run's folder (its best), by a file of detkit's or of others (`.pth`,
    `.weights`), or by a published name.

    Raises:
        CheckpointError: there is none; the message names runs that exist, the nearest first.
    """
    given = Path(path)
    # Unlike Path's, these answer for names that are too long, too.
    if os.path.isdir(given):
        for checkpoint in (given / BEST, given / BEST.name):
            if checkpoint.is_file():
                return str(checkpoint)
        raise CheckpointError(f"The folder '{path}' holds no {BEST.as_posix()}. {_advice(given)}")
    if not os.path.isfile(split_options(str(path))[0]) and not str(path).startswith(PREFIXES):
        raise CheckpointError(f"There is no checkpoint '{path}'. {_advice(given)}")
    return str(path)


def split_options(source: str) -> tuple[str, str]:
    """The file, and the options behind it: "own.pth?input.size=[600, 1000]" is "own.pth" and the rest; mostly ""."""
    file, _, options = (source, "", "") if os.path.isfile(source) else source.partition("?")
    return file, options


def runs_near(path: Path) -> list[Path]:
    """Folders of runs with a checkpoint, and checkpoint files: in `path`, in the folder it is or would be in, and in
    `runs`; those with a name more like that of `path` first."""
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
        return "Give the folder of a run, runs/<task>/<name>, or a checkpoint file; detkit train makes them."
    meant = f"Did you mean '{runs[0]}'? " if _likeness(runs[0], path) >= CLOSE else ""
    more = f" and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else ""
    return f"{meant}There are: {', '.join(map(str, runs[:SHOWN_RUNS]))}{more}."
