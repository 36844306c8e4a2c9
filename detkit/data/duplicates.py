"""Detection of identical images: one file under several paths, or several files with the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from detkit.data.image import read_image
from detkit.errors import DataError

_END = 4096  # bytes at both ends of a file that are compared before it is read completely


def identical(paths: Sequence[str | Path], border: int = 0) -> list[list[int]]:
    """Find groups of identical images, as positions in order.

    Most files are distinguished by their size or their ends; only the others are read completely. Images of a single
    colour, such as dark frames of a camera, do not count as copies, since they cannot be memorised.

    Args:
        paths: image files; paths that are not files are skipped.
        border: if above 0, return only groups with positions both below and at or above it: images of two splits.
    """

    def wanted(group: list[int]) -> bool:
        return len(group) > 1 and (not border or group[0] < border <= group[-1])

    facts = [_facts(path) for path in paths]

    def split(groups: list[list[int]], key: Callable[[int], Hashable]) -> list[list[int]]:
        parts: dict[Hashable, list[int]] = {}
        for number, group in enumerate(groups):
            for position in group:
                parts.setdefault((number, key(position)), []).append(position)
        return [part for part in parts.values() if wanted(part)]

    def is_one_file(group: list[int]) -> bool:
        return len({facts[position] for position in group}) == 1

    found = split([[position for position, fact in enumerate(facts) if fact]], lambda position: facts[position][-1])
    found = split(found, lambda position: _ends(paths[position]))
    linked = [group for group in found if is_one_file(group)]
    copied = split([group for group in found if not is_one_file(group)], lambda position: _digest(paths[position]))
    copied = [group for group in copied if is_one_file(group) or not _is_plain(paths[group[0]])]
    return sorted(linked + copied)


def _facts(path: str | Path) -> tuple[int, ...]:
    """Return (device, inode, size) of a file, which links share; empty if the path is not a file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size


def _ends(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(_END)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
        return start + file.read()


def _digest(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _is_plain(path: str | Path) -> bool:
    """Return whether all pixels of an image have the same colour."""
    try:
        pixels = read_image(path)
    except DataError:
        return False
    return bool((pixels == pixels[0, 0]).all())
