"""Cache of proposals on disk, keyed by the pixels of the image, so that each image is segmented only once."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detkit.data.proposals.sources import ProposalSource
from detkit.errors import WriteError
from detkit.io.files import write_bytes

DIGEST_SIZE = 16


def default_folder() -> Path:
    """Return $XDG_CACHE_HOME/detkit/proposals, or ~/.cache/detkit/proposals."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detkit" / "proposals"


class ProposalCache:
    """A source of proposals with a cache in files.

    Files are named by a hash of the decoded pixels, so an image that is moved, renamed or saved again losslessly is
    found, and a changed image is not. Files are written atomically, so several runs may share a folder.

    Args:
        source: computes missing proposals.
        folder: the folder of the cache, with a subfolder for each `source.key`.

    Raises:
        WriteError: the folder cannot be written to.
    """

    def __init__(self, source: ProposalSource, folder: Path) -> None:
        self.source = source
        self.folder = folder / hashlib.blake2b(source.key.encode(), digest_size=8).hexdigest()
        # For information only.
        self._write("source.txt", f"{source.key}\n".encode())

    def get(self, image: np.ndarray, image_id: int | str) -> tuple[Tensor, str]:
        """Get the proposals of an image, and their origin.

        Returns:
            (P, 4) float32 as computed by the source, and "cached", "computed", or "broken" if the file was damaged and
            has been computed again.

        Raises:
            WriteError: a file cannot be written.
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
        data = proposals.numpy().astype("<f4").tobytes()
        self._write(path, _digest(data) + data)
        return proposals, outcome

    def path(self, image: np.ndarray) -> Path:
        """Return the file for the proposals of an image."""
        digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=DIGEST_SIZE)
        digest.update(np.ascontiguousarray(image).data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.boxes"

    def _write(self, path: str | Path, content: bytes) -> None:
        try:
            write_bytes(self.folder / path, content, durable=False)
        except WriteError as error:
            raise WriteError(f"{error} The folder of the cache is proposals.cache.") from None


def _read(path: Path) -> Tensor:
    """Read the proposals in a file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError, OSError: it is damaged.
    """
    content = path.read_bytes()
    digest, data = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
    if digest != _digest(data):
        raise ValueError("the checksum of the boxes does not match")
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype="<f4").reshape(-1, 4))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
