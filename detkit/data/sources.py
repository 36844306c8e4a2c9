"""Finding the image files that a source names: a file, a folder or a pattern."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from detkit.data.image import IMAGE_SUFFIXES
from detkit.data.video import VIDEO_SUFFIXES
from detkit.errors import DataError

UNREAD_SUFFIXES = frozenset({
    ".arw", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jxl",
    ".nef", ".orf", ".pcx", ".pdf", ".psd", ".raf", ".raw", ".rw2", ".svg", ".wmf",
})  # fmt: skip
"""Endings of images in formats that are not read, told from other files because the user may expect them to be."""
VIDEO = "videos, which are read one at a time"
UNREAD = "images of formats that are not read (convert them to JPEG or PNG)"
OTHER = "files that are not images"
HIDDEN = "hidden files and folders"
DEAD_LINK = "links that lead nowhere"
KNOWN_FOLDER = "links to folders that are searched already"
CLOSED = "folders that cannot be opened"
SPECIAL = "neither files nor folders"
SHOWN_BY_NAME = frozenset({DEAD_LINK, KNOWN_FOLDER, CLOSED, SPECIAL})
"""Reasons of which a report shows the first path; of the others it shows the endings."""


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Args:
        images: in natural order (2.jpg before 10.jpg), each once.
        passed_over: everything else, by the reason, one of the constants of this module.
    """

    images: list[Path]
    passed_over: Mapping[str, list[Path]]

    def summary(self) -> str:
        """The reasons and how many files each has, for people; empty where nothing was passed over."""
        parts = []
        for reason, paths in self.passed_over.items():
            shown = str(paths[0]) if reason in SHOWN_BY_NAME else ", ".join(sorted({_ending(path) for path in paths}))
            parts.append(f"{reason}: {len(paths):,} ({'first: ' if shown == str(paths[0]) else ''}{shown})")
        return f"passed over: {'; '.join(parts)}" if parts else ""


def search(source: str | Path) -> Found:
    """Look for the images that a source names.

    Args:
        source: a file; a folder, which is searched with its subfolders for the endings in IMAGE_SUFFIXES, but not
            in hidden ones, and each only once, however many links lead to it; or a pattern such as
            "shots/**/*.png". A name that exists is taken literally, even if it looks like a pattern ("[ex]").

    Raises:
        DataError: there is no image; the message has what there is instead.
    """
    passed_over: dict[str, list[Path]] = defaultdict(list)
    path = Path(source)
    if os.path.isfile(path):
        return Found([path], {})
    if os.path.isdir(path):
        candidates = [Path(folder, name) for folder, names in _folders(path, passed_over) for name in names]
    else:
        start = Path(path.anchor)
        matches = dict.fromkeys(_expand(start, path.relative_to(start).parts, passed_over))
        candidates = [match for match in matches if not os.path.isdir(match)]
    images = []
    for candidate in candidates:
        reason = _reason_against(candidate)
        if reason is None:
            images.append(candidate)
        else:
            passed_over[reason].append(candidate)
    found = Found(sorted(images, key=lambda item: natural_key(item.as_posix())), passed_over)
    if not images:
        is_folder = os.path.isdir(path)
        what = "The folder" if is_folder else "There is no file or folder, and no image that matches the pattern,"
        raise DataError(
            f"{what} '{source}'{' holds no images' if is_folder else ''}"
            f"{f' ({found.summary()})' if passed_over else ''}. Give an image, a folder or a pattern; files count as "
            f"images by their endings: {' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return found


def find_images(source: str | Path) -> list[Path]:
    """The images of `search`; the errors are the same."""
    return search(source).images


def is_image(path: Path) -> bool:
    """Whether a file name is that of an image: a known ending, and not hidden (macOS leaves '._a.jpg' about)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts digits in a text by their value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _reason_against(path: Path) -> str | None:
    """Why a path that is not a folder is not read as an image; None if it is."""
    if path.name.startswith("."):
        return HIDDEN
    if not os.path.isfile(path):
        return SPECIAL if os.path.exists(path) else DEAD_LINK
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    return VIDEO if suffix in VIDEO_SUFFIXES else UNREAD if suffix in UNREAD_SUFFIXES else OTHER


def _folders(top: Path, passed_over: dict[str, list[Path]]) -> Iterator[tuple[Path, list[str]]]:
    """`top` and every folder below it, each once, with the names of what is in it beside folders.

    Links are followed after all real folders, so that what can be reached without a link has its own path.
    """
    visited: set[tuple[int, int]] = set()
    real: list[Path] = [top]
    links: list[Path] = []
    while real or links:
        folder = real.pop() if real else links.pop()
        names: list[str] = []
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            passed_over[CLOSED].append(folder)
            continue
        if (status.st_dev, status.st_ino) in visited:
            passed_over[KNOWN_FOLDER].append(folder)
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir():
                names.append(entry.name)
            elif entry.name.startswith("."):
                passed_over[HIDDEN].append(Path(entry.path))
            else:
                (links if entry.is_symlink() else real).append(Path(entry.path))
        yield folder, names


def _expand(folder: Path, parts: tuple[str, ...], passed_over: dict[str, list[Path]]) -> Iterator[Path]:
    """The paths below a folder that match a pattern in parts, some perhaps twice.

    Unlike glob.glob, a part that exists is a name, and "**" goes into each folder once, whatever links there are.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if os.path.lexists(folder / part):
        yield from _expand(folder / part, rest, passed_over)
    elif part == "**" and os.path.isdir(folder):
        for inner, names in _folders(folder, passed_over):
            yield from _expand(inner, rest, passed_over) if rest else (inner / name for name in names)
    elif glob.has_magic(part) and os.path.isdir(folder):
        try:
            names = os.listdir(folder)
        except OSError:
            passed_over[CLOSED].append(folder)
            return
        for name in fnmatch.filter(names, part):
            if part.startswith(".") or not name.startswith("."):
                yield from _expand(folder / name, rest, passed_over)


def _ending(path: Path) -> str:
    return path.suffix.lower() or path.name
