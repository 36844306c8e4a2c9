"""Embeddings in the tests of the core."""

import pytest

from detkit.zoo.embedding.structures import Embedding

HEAD_OPTIONS = {
    "embed": [
        {"dimensions": 8},
        {"dimensions": 8, "loss": {"name": "large_margin", "margin": 3}},
        {"dimensions": 8, "loss": {"name": "cosface"}},
        {"dimensions": 8, "loss": {"name": "arcface"}},
    ]
}


def check_embedding(prediction: Embedding) -> None:
    assert prediction.vector.norm() == pytest.approx(1, abs=1e-5)


PREDICTIONS = {"embed": (Embedding, check_embedding)}
