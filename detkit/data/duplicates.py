"""Images that are the same: one file under several paths, or several files of the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from detkit.data.image import read_image
from detkit.errors import DataError

_END = 4096  # bytes at either end of a file that are compared before all of it is read


def identical(paths: Sequence[str | Path], border: int = 0) -> list[list[int]]:
    """Groups of the positions of images that are the same, each group in order.

    Of 100,000 files nearly all are told apart by their size or their ends; only the rest is read whole. Images of one
    colour, such as the dark frames of a camera, are no copies of one another: nothing is learned from them by heart.

    Args:
        paths: image files; what is not a file is passed over.
        border: above 0, only groups with positions both below and from it on are returned: images of two splits.
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
    """(device, inode, size) of a file, which several links share; empty for what is not a file."""
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
    """Whether all pixels of an image have one colour."""
    try:
        pixels = read_image(path)
    except DataError:
        return False
    return bool((pixels == pixels[0, 0]).all())
