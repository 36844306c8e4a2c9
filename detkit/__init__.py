"""detkit: train, evaluate and run object detectors and segmenters on your own data.

import detkit
detector = detkit.load("runs/detect/quickstart")
detections = detector.predict("street.jpg")      # boxes in pixels of street.jpg
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detkit.inference.predictor import Predictor as Predictor
    from detkit.inference.predictor import load as load

__all__ = ["Predictor", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the predictor, and with it torch, on first use."""
    if name in ("Predictor", "load"):
        from detkit.inference import predictor as predict

        return getattr(predict, name)
    raise AttributeError(f"module 'detkit' has no attribute '{name}'")
