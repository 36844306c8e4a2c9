"""Images without ground truth, for heads that need none, such as style transfer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detkit.data.dataset import Broken, FileDataset, ImageFile, check_root, missing_split
from detkit.errors import ConfigError, DataError, nearest
from detkit.registry import datasets
from detkit.structures import ClassList

SPLITS = ("train", "val")
_LAYOUT = "a folder of images for each split, or set data.val_fraction to split one folder"


@datasets.register("images")
class Images(FileDataset):
    """The images of a folder and its subfolders. meta.image_id is the path relative to the root, with slashes.

    Args:
        root: a folder, or with `val_fraction` also a pattern such as "photos/**/*.jpg".
        split: the folder in `root` with the images; with `val_fraction` train or val.
        val_fraction: the fraction of images for validation, a fixed random choice with at least one image in each
            split. Null if `root` has a folder for each split.
        broken: the policy for images that cannot be read; they cannot be repaired.

    Raises:
        ConfigError: `val_fraction` or the split is invalid.
        DataError: there is no image, or no split of this name; or some are broken and `broken` is "fail".
    """

    def __init__(self, root: str, split: str, val_fraction: float | None = None, broken: Broken = "fail") -> None:
        super().__init__(f"The images in '{root}' (split '{split}')", broken)
        self.fields = frozenset()
        self.classes = ClassList((), ())
        if val_fraction is None:
            files = self.images_of(_split_folder(root, split))
        else:
            _check_fraction(split, val_fraction)
            files = _part(self.images_of(Path(root).expanduser()), root, split, val_fraction)
        base = Path(root).expanduser()
        images = [
            ImageFile(path.relative_to(base).as_posix() if base in path.parents else path.as_posix(), path, str(path))
            for path in files
        ]
        for image, size in self.check_images(images):
            self.add(image, size, ())
        self.finish()


def _split_folder(root: str, split: str) -> Path:
    folder = check_root(root, _LAYOUT) / split
    if not folder.is_dir():
        raise missing_split(split, folder, [path.name for path in folder.parent.iterdir() if path.is_dir()])
    return folder


def _check_fraction(split: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(f"'data.val_fraction' must lie between 0 and 1, both excluded, but is {fraction}.")
    if split not in SPLITS:
        raise ConfigError(
            f"With data.val_fraction the splits are train and val, but this one is '{split}'. {nearest(split, SPLITS)}"
        )


def _part(files: list[Path], root: str, split: str, fraction: float) -> list[Path]:
    if len(files) < 2:
        raise DataError(f"There is one image in '{root}', which cannot be split into training and validation.")
    count = min(max(round(fraction * len(files)), 1), len(files) - 1)
    val = set(np.random.default_rng(0).permutation(len(files))[:count].tolist())
    return [path for index, path in enumerate(files) if (index in val) == (split == "val")]
