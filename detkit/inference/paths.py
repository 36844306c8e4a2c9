"""Checks of a prediction's source and output, before the model is loaded.

Nothing heavy is imported, so that the command line refuses a mistake at once.
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
"""A file in the folder that a run writes to, from its start to its end."""


def check_source(source: str) -> None:
    """Refuse a source with no image and no video.

    Raises:
        DataError: nothing is found, or the video cannot be opened.
    """
    if is_video(source):
        with VideoReader(source):
            return
    find_images(source)


def check_output(folder: Path, source: str | Path | None = None) -> None:
    """Refuse an output folder that cannot be written to, or that holds the source.

    Raises:
        ConfigError: naming the file or folder in the way.
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
            f"The output folder '{folder}' holds the source '{source}', which the results could replace. Give --output "
            f"a new folder, or leave it out for a new one in runs."
        )


@contextmanager
def claimed_output(folder: Path) -> Iterator[Path]:
    """Claim a new or empty folder for results, or the first such of folder2, folder3 ...

    A folder with files in it is never written to, so that no file of the user's and no earlier result is replaced.
    Several runs at once get a folder each: the first to create the file CLAIM, which is there during the run, has it.

    Args:
        folder: the folder that the user asked for.

    Raises:
        ConfigError: as `check_output`.
        WriteError: the folder cannot be made or written to.
    """
    path = next(path for path in _numbered(folder) if _claim(path))
    try:
        yield path
    finally:
        (path / CLAIM).unlink(missing_ok=True)


def source_folder(source: str | Path) -> Path:
    """The folder to which the images of a source are named relative: the folder itself, that of a file, or of a pattern
    the part before its first wildcard."""
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
    """Whether `folder` is this run's: it is made if need be, and was empty until the file CLAIM was created in it."""
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
    """Refuse to replace a file that does not hold results of an earlier run.

    Args:
        path: the file to be written.
        option: the option that names it, for messages.
        beginning: the first bytes of such results.

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
            f"The file '{path}' holds something other than results of detkit, which would be lost. Give {option} "
            f"another name."
        )
