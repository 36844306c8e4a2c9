"""Figures of embeddings against SciPy's rank statistics and plain loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu

import detkit.zoo.embedding.metrics as module
from detkit.structures import Meta, Target
from detkit.zoo.embedding.metrics import EmbeddingEvaluator, EmbeddingScores
from detkit.zoo.embedding.structures import Embedding


def scored(vectors: torch.Tensor, labels: list[int]) -> EmbeddingScores:
    evaluator = EmbeddingEvaluator()
    for index, (vector, label) in enumerate(zip(vectors, labels)):
        none = torch.zeros(0, dtype=torch.int64)
        target = Target(torch.zeros(0, 4), none, image_labels=none if label < 0 else torch.tensor([label]))
        evaluator.update([Embedding(vector)], [target], [Meta(index, str(index), (4, 4))])
    return evaluator.compute()


def made_up(seed: int, images: int = 40, classes: int = 5, noise: float = 0.5) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    return F.normalize(centres[labels] + noise * torch.randn(images, 8, generator=generator)), labels.tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_figures_are_those_of_rank_statistics_and_of_plain_loops(seed: int, noise: float) -> None:
    vectors, labels = made_up(seed, noise=noise)
    found = scored(vectors, labels)
    pairs = list(itertools.combinations(range(len(labels)), 2))
    same = [labels[i] == labels[j] for i, j in pairs]
    cosines = [float(vectors[i] @ vectors[j]) for i, j in pairs]
    positive, negative = ([c for c, s in zip(cosines, same) if s == kind] for kind in (True, False))
    wins = mannwhitneyu(positive, negative).statistic
    assert found.auc == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-5)
    best = max(
        sum(c >= t for c in positive) / len(positive) + sum(c < t for c in negative) / len(negative) for t in cosines
    )
    assert found.accuracy == pytest.approx(best / 2, abs=1e-6)
    # the threshold that is printed reaches the accuracy that is printed
    close = [math.dist(vectors[i].tolist(), vectors[j].tolist()) < found.threshold for i, j in pairs]
    recognised = sum(c for c, s in zip(close, same) if s) / sum(same)
    kept_apart = sum(not c for c, s in zip(close, same) if not s) / (len(same) - sum(same))
    assert (recognised + kept_apart) / 2 == pytest.approx(found.accuracy, abs=1e-6)
    right = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        if any(labels[j] == label for j in others):
            right.append(labels[max(others, key=lambda j: float(vectors[i] @ vectors[j]))] == label)
    assert found.recall_at_1 == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("block", [1, 130])
def test_blocks_of_any_size_give_the_same_figures(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = made_up(0, images=17)
    whole = scored(vectors, labels)
    monkeypatch.setattr(module, "BLOCK", block)
    assert scored(vectors, labels) == whole


def test_what_is_told_apart_perfectly_has_every_figure_1() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]]))
    found = scored(vectors, [0, 0, 1, 1, 2])
    assert (found.auc, found.accuracy, found.recall_at_1) == (1.0, 1.0, 1.0)
    assert math.dist([1, 0], vectors[1].tolist()) < found.threshold < math.dist([1, 0], [0, 1])


def test_equal_vectors_are_ties() -> None:
    found = scored(F.normalize(torch.ones(4, 3)), [0, 0, 1, 1])
    assert found.auc == pytest.approx(0.5)
    assert found.accuracy == pytest.approx(0.5)


def test_images_without_a_class_are_not_scored_and_nothing_to_compare_is_nan() -> None:
    vectors, labels = made_up(0)
    alone = scored(torch.cat((vectors, vectors[:3])), [*labels, -1, -1, -1])
    assert alone == scored(vectors, labels)
    assert math.isnan(scored(vectors[:1], [0]).auc)
    assert math.isnan(scored(vectors[:3], [0, 1, 2]).recall_at_1)
    assert math.isnan(scored(vectors[:0], []).threshold)
