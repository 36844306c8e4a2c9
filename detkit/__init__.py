"""detkit: train, evaluate and run object detectors and segmenters on your own data.

import detkit
detector = detkit.load("runs/detect/quickstart")
detections = detector.predict("street.jpg")      # boxes in pixels of street.jpg
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detkit.inference.predictor import Predictor as Predictor
    from detkit.inference.predictor import load as load

__all__ = ["Predictor", "__version__", "load"]
__version__ = "0.1.0"
MOVED = {
    "detkit.types": "detkit.structures",
    "detkit.predictions": "detkit.structures",
    "detkit.predict": "detkit.inference.predictor",
    "detkit.infer": "detkit.inference.images",
    "detkit.draw": "detkit.tasks.drawing",
    "detkit.losses": "detkit.heads.parts.losses",
    "detkit.gallery": "detkit.zoo.embedding.gallery",
    "detkit.tasks.detect": "detkit.tasks.detection.task",
    "detkit.tasks.classify": "detkit.tasks.classification.task",
    "detkit.tasks.segment": "detkit.tasks.segmentation.task",
}
"""Modules with public names that had another name in version 0.1; the old names go with version 0.3."""


def __getattr__(name: str) -> Any:
    """Import the predictor, and torch with it, only when it is needed."""
    if name in ("Predictor", "load"):
        return getattr(importlib.import_module("detkit.inference.predictor"), name)
    raise AttributeError(f"module 'detkit' has no attribute '{name}'")


class _Moved(MetaPathFinder, Loader):
    """Imports a module by its old name, with a warning that says the new one."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"'{spec.name}' is called '{new}' now; the old name goes with 0.3.", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import under the old name has replaced


sys.meta_path.append(_Moved())
