"""Search for the image files of a source: a file, a folder or a pattern."""

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
"""Suffixes of unsupported image formats, reported separately from other files."""
VIDEO = "videos, which must be given one at a time"
UNREAD = "images of unsupported formats (convert them to JPEG or PNG)"
OTHER = "files that are not images"
HIDDEN = "hidden files and folders"
DEAD_LINK = "broken links"
KNOWN_FOLDER = "links to folders that are already searched"
CLOSED = "folders that cannot be opened"
SPECIAL = "neither files nor folders"
SHOWN_BY_NAME = frozenset({DEAD_LINK, KNOWN_FOLDER, CLOSED, SPECIAL})
"""Reasons for which a report shows the first path; for others it shows the suffixes."""


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        images: in natural order (2.jpg before 10.jpg), without duplicates.
        passed_over: all other files by reason, one of the constants of this module.
    """

    images: list[Path]
    passed_over: Mapping[str, list[Path]]

    def summary(self) -> str:
        """Format the reasons and their numbers of files for a report; empty if no files were skipped."""
        parts = []
        for reason, paths in self.passed_over.items():
            shown = str(paths[0]) if reason in SHOWN_BY_NAME else ", ".join(sorted({_ending(path) for path in paths}))
            parts.append(f"{reason}: {len(paths):,} ({'first: ' if shown == str(paths[0]) else ''}{shown})")
        return f"skipped: {'; '.join(parts)}" if parts else ""


def search(source: str | Path) -> Found:
    """Search for the images of a source.

    Args:
        source: a file; a folder, which is searched recursively for the suffixes in IMAGE_SUFFIXES, except hidden
            subfolders, and each subfolder only once, even if links lead to it; or a pattern such as "shots/**/*.png".
            An existing name is taken literally, even if it looks like a pattern ("[ex]").

    Raises:
        DataError: there is no image; the message says what was found instead.
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
            f"{what} '{source}'{' contains no images' if is_folder else ''}"
            f"{f' ({found.summary()})' if passed_over else ''}. Give an image, a folder or a pattern; images are "
            f"recognised by their suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return found


def find_images(source: str | Path) -> list[Path]:
    """Return the images of `search`, with the same errors."""
    return search(source).images


def is_image(path: Path) -> bool:
    """Return whether a file name is that of an image: a known suffix, and not hidden (macOS creates '._a.jpg')."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares digits in a text by value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _reason_against(path: Path) -> str | None:
    """Return why a path that is not a folder is not read as an image; None if it is."""
    if path.name.startswith("."):
        return HIDDEN
    if not os.path.isfile(path):
        return SPECIAL if os.path.exists(path) else DEAD_LINK
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    return VIDEO if suffix in VIDEO_SUFFIXES else UNREAD if suffix in UNREAD_SUFFIXES else OTHER


def _folders(top: Path, passed_over: dict[str, list[Path]]) -> Iterator[tuple[Path, list[str]]]:
    """Iterate over `top` and all folders below it, each once, with the names of their entries that are not folders.

    Links are followed after all real folders, so that files reachable without a link get their real path.
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
    """Iterate over the paths below a folder that match a split pattern, maybe with duplicates.

    Unlike in glob.glob, existing names are taken literally, and "**" enters each folder once, regardless of links.
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
