"""MTCNN, landmarks and drawn faces in the tests of the core."""

import torch

from detkit.zoo.faces.dataset import Faces
from detkit.zoo.faces.structures import Landmarks

HEAD_MAPS = {"mtcnn": ((3,), (1,))}
HEAD_OPTIONS = {
    "landmarks": [{"points": 5}, {"points": 5, "grid": 1, "width": 0, "loss": "wing"}],
    "mtcnn": [{"thresholds": [0.1, 0.1, 0.1]}],
}
LEFT_AS_BUILT = {"mtcnn": "moves its boxes three times over: wild weights would carry them out of the image"}


def check_landmarks(prediction: Landmarks) -> None:
    assert prediction.points.shape[1] == 2
    assert torch.isfinite(prediction.points).all()


PREDICTIONS = {"landmarks": (Landmarks, check_landmarks)}
DATASETS = {"faces": Faces("train", train_count=4, size=32)}
