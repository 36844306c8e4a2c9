"""Proposals on disk, found by the pixels of their picture: a picture is segmented once, not in every run."""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detkit.errors import ConfigError
from detkit.proposals.sources import ProposalSource

DIGEST_SIZE = 16


def default_folder() -> Path:
    """The user's own: $XDG_CACHE_HOME/detkit/proposals, or ~/.cache/detkit/proposals."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detkit" / "proposals"


class ProposalCache:
    """A source whose proposals are kept in files.

    The file's name is a hash of the decoded pixels, so a picture that is moved, renamed or saved again without loss is
    still found, and one that is changed is not. Files are written all at once, so several runs may share a folder.

    Args:
        source: computes what is not there.
        folder: of the cache; each `source.key` has a folder of its own in it.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, source: ProposalSource, folder: Path) -> None:
        self.source = source
        self.folder = folder / hashlib.blake2b(source.key.encode(), digest_size=8).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # For people: nothing reads it.
            (self.folder / "source.txt").write_text(f"{source.key}\n", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None

    def get(self, image: np.ndarray, image_id: int | str) -> tuple[Tensor, str]:
        """The proposals of a picture, and how they were come by.

        Returns:
            (P, 4) float32 as the source gave them, and "cached", "computed", or "broken" where the file was there but
            damaged, and was made anew.

        Raises:
            ConfigError: a file cannot be written.
        """
        path = self.path(image)
        outcome = "computed"
        try:
            return _read(path), "cached"
        except FileNotFoundError:
            pass
        except (OSError, ValueError):
            outcome = "broken"
        proposals = self.source(image, image_id)
        try:
            _write(path, proposals)
        except OSError as error:
            raise self._unwritable(error) from None
        return proposals, outcome

    def path(self, image: np.ndarray) -> Path:
        """Where the proposals of a picture lie, or would."""
        digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=DIGEST_SIZE)
        digest.update(np.ascontiguousarray(image).data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.boxes"

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"Proposals cannot be kept in '{self.folder}': {error.strerror}. Give a folder with space that may be "
            "written to as proposals.cache."
        )


def _read(path: Path) -> Tensor:
    """The proposals in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError, OSError: it is damaged.
    """
    content = path.read_bytes()
    digest, data = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
    if digest != _digest(data):
        raise ValueError("the boxes are not those that were written")
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype="<f4").reshape(-1, 4))


def _write(path: Path, proposals: Tensor) -> None:
    """Write a hash of the boxes, then the boxes, all at once or not at all."""
    data = proposals.numpy().astype("<f4").tobytes()
    path.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(data) + data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
