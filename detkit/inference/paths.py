"""Checks of the source and output paths of a prediction, before the model is loaded.

This module imports nothing slow, so that the command line reports errors immediately.
"""

import glob
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detkit.data.sources import find_images
from detkit.data.video import VideoReader, is_video
from detkit.errors import ConfigError
from detkit.io.files import make_folder, write_error

CLAIM = ".detkit-infer"
"""Name of the file that marks an output folder as in use during a run."""


def check_source(source: str) -> None:
    """Check that the source contains images or is a readable video.

    Raises:
        DataError: nothing is found, or the video cannot be opened.
    """
    if is_video(source):
        with VideoReader(source):
            return
    find_images(source)


def check_output(folder: Path, source: str | Path | None = None) -> None:
    """Raise ConfigError if the output path is not a writable directory or contains the source.

    Raises:
        ConfigError: naming the file or folder at fault.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The folder {str(folder)!r} cannot be used: {error}. Give another --output.") from None
    if not existing.is_dir():
        raise ConfigError(f"The results cannot be written to '{folder}': '{existing}' is a file. Give --output FOLDER.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The results cannot be written to '{folder}': '{existing}' is not writable. Give another --output FOLDER."
        )
    if source is not None and existing == folder and source_folder(source).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"The output folder '{folder}' contains the source '{source}', which the results could overwrite. Give "
            f"--output a new folder, or omit it for a new one in runs."
        )


@contextmanager
def claimed_output(folder: Path) -> Iterator[Path]:
    """Claim the first new or empty folder of folder, folder2, folder3 ... for results.

    Results are never written to a folder with files in it, so no user file and no earlier result is overwritten.
    Concurrent runs get separate folders: each is claimed by creating the file CLAIM, which exists during the run.

    Args:
        folder: the folder that the user asked for.

    Raises:
        ConfigError: as for `check_output`.
        WriteError: the folder cannot be created or written to.
    """
    path = next(path for path in _numbered(folder) if _claim(path))
    try:
        yield path
    finally:
        (path / CLAIM).unlink(missing_ok=True)


def source_folder(source: str | Path) -> Path:
    """Return the folder that image names are relative to: the source folder itself, the parent of a file, or the part
    of a glob pattern before its first wildcard."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts))


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}{number}")


def _claim(folder: Path) -> bool:
    """Try to claim `folder`: create it if needed, and succeed if it was empty before the file CLAIM was created."""
    check_output(folder)
    make_folder(folder)
    claim = folder / CLAIM
    try:
        if os.listdir(folder):
            return False
        claim.open("x").close()
        if os.listdir(folder) == [CLAIM]:
            return True
        claim.unlink()
        return False
    except FileExistsError:
        return False
    except OSError as error:
        raise write_error(claim, error) from error


def check_results_file(path: Path, option: str = "--save-json", beginning: bytes = b'[{"image_id"') -> None:
    """Raise ConfigError if a file exists and does not contain the results of an earlier run.

    Args:
        path: the file to write.
        option: the command-line option that sets it, for messages.
        beginning: first bytes of a results file.

    Raises:
        ConfigError: naming the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(100).strip() if path.is_file() else b""
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"The results cannot be written to {str(path)!r}: {error}. Give another {option}.") from None
    if start not in (b"", b"[]") and not start.startswith(beginning):
        raise ConfigError(
            f"The file '{path}' does not contain detkit results and would be overwritten. Give {option} another name."
        )
