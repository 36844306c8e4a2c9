"""Losses of embeddings against plain loops, hand-computed values, their limits, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from detkit.errors import ConfigError
from detkit.zoo.embedding.losses import (
    arcface_logits,
    batch_hard_triplet,
    build_embed_loss,
    cosface_logits,
    large_margin_logits,
)

SEEDS = range(10)


def batch(seed: int, images: int = 9, dimensions: int = 6, classes: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(images, dimensions, generator=generator, dtype=torch.float64)
    weights = torch.randn(classes, dimensions, generator=generator, dtype=torch.float64)
    return vectors, weights, torch.randint(classes, (images,), generator=generator)


def looped_triplet(vectors: torch.Tensor, labels: torch.Tensor, margin: float | None) -> float:
    losses = []
    for i in range(len(vectors)):
        same = [math.dist(vectors[i], vectors[j]) for j in range(len(vectors)) if j != i and labels[j] == labels[i]]
        other = [math.dist(vectors[i], vectors[j]) for j in range(len(vectors)) if labels[j] != labels[i]]
        if same and other:
            gap = max(same) - min(other)
            losses.append(math.log(1 + math.exp(gap)) if margin is None else max(0.0, margin + gap))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0, None])
def test_triplets_are_those_of_a_plain_loop(seed: int, margin: float | None) -> None:
    vectors, _, labels = batch(seed)
    assert float(batch_hard_triplet(vectors, labels, margin)) == pytest.approx(looped_triplet(vectors, labels, margin))


def test_a_triplet_by_hand() -> None:
    """On a line at 0 and 1 (class a) and 3 (class b): 1 - 3 and 1 - 2 with a margin of 2 leave 0 and 1."""
    vectors = torch.tensor([[0.0], [1.0], [3.0]])
    assert float(batch_hard_triplet(vectors, torch.tensor([0, 0, 1]), 2.0)) == 0.5


def test_without_two_classes_or_two_of_one_there_is_nothing_to_learn() -> None:
    vectors = torch.randn(3, 4, requires_grad=True)
    for labels in ([0, 0, 0], [0, 1, 2]):
        loss = batch_hard_triplet(vectors, torch.tensor(labels), 0.3)
        loss.backward()
        assert loss == 0
        assert torch.equal(vectors.grad, torch.zeros(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_large_margin_logits_are_those_of_a_plain_loop(seed: int, margin: int) -> None:
    vectors, weights, labels = batch(seed)
    logits = large_margin_logits(vectors, weights, labels, margin, relax=0.5)
    for i, vector in enumerate(vectors):
        for j, weight in enumerate(weights):
            length = float(vector.norm() * weight.norm())
            angle = math.acos(float(vector @ weight) / length)
            expected = length * math.cos(angle)
            if j == labels[i]:
                k = next(k for k in range(margin) if k * math.pi / margin <= angle <= (k + 1) * math.pi / margin)
                psi = (-1) ** k * math.cos(margin * angle) - 2 * k
                expected = length * (0.5 * math.cos(angle) + psi) / 1.5
            assert float(logits[i, j]) == pytest.approx(expected)


def test_the_large_margin_falls_with_the_angle_without_a_jump() -> None:
    angles = torch.linspace(0, math.pi, 2000, dtype=torch.float64)
    vectors = torch.stack((angles.cos(), angles.sin()), 1)
    labels = torch.zeros(2000, dtype=torch.int64)
    for margin in (2, 3, 4):
        values = large_margin_logits(vectors, torch.tensor([[1.0, 0.0]], dtype=torch.float64), labels, margin)[:, 0]
        assert values[0] == 1
        assert float(values[-1]) == pytest.approx((-1) ** (margin - 1) * math.cos(margin * math.pi) - 2 * (margin - 1))
        assert (values.diff() < 1e-9).all()
        assert (values.diff() > -0.01).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_margin_all_three_are_softmax(seed: int) -> None:
    vectors, weights, labels = batch(seed)
    cosines = F.normalize(vectors) @ F.normalize(weights).T
    torch.testing.assert_close(large_margin_logits(vectors, weights, labels, 1), vectors @ weights.T)
    torch.testing.assert_close(cosface_logits(vectors, weights, labels, 0.0, 7.0), 7 * cosines)
    torch.testing.assert_close(arcface_logits(vectors, weights, labels, 0.0, 7.0), 7 * cosines)


@pytest.mark.parametrize("seed", SEEDS)
def test_margins_of_cosine_and_angle_are_those_of_a_plain_loop(seed: int) -> None:
    vectors, weights, labels = batch(seed)
    cosface, arcface = (make(vectors, weights, labels, 0.4, 30.0) for make in (cosface_logits, arcface_logits))
    for i, vector in enumerate(vectors):
        for j, weight in enumerate(weights):
            cosine = float(vector @ weight / (vector.norm() * weight.norm()))
            angle = math.acos(cosine)
            turned = math.cos(angle + 0.4) if angle + 0.4 <= math.pi else cosine - 0.4 * math.sin(0.4)
            true = bool(j == labels[i])
            assert float(cosface[i, j]) == pytest.approx(30 * (cosine - 0.4 * true))
            assert float(arcface[i, j]) == pytest.approx(30 * (turned if true else cosine))


def test_an_arcface_loss_by_hand() -> None:
    """At an angle of 60 degrees from its class and 90 from the other, with a margin of 30: cos 90 = 0 for both."""
    loss = build_embed_loss({"name": "arcface", "margin": math.pi / 6, "scale": 10.0}, 2, 2)
    with torch.no_grad():
        loss.weights.copy_(torch.tensor([[1.0, 0.0], [math.cos(math.radians(150)), math.sin(math.radians(150))]]))
    vector = torch.tensor([[3 * math.cos(math.radians(60)), 3 * math.sin(math.radians(60))]])
    assert loss(vector, torch.tensor([0])).item() == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    vectors, weights, labels = batch(seed)
    vectors.requires_grad_()
    weights.requires_grad_()
    for margin in (1, 2, 3, 4):
        assert torch.autograd.gradcheck(
            lambda v, w, m=margin: large_margin_logits(v, w, labels, m, 0.2), (vectors, weights)
        )
    assert torch.autograd.gradcheck(lambda v, w: cosface_logits(v, w, labels, 0.35, 8.0), (vectors, weights))
    assert torch.autograd.gradcheck(lambda v, w: arcface_logits(v, w, labels, 0.5, 8.0), (vectors, weights))
    for soft in (0.3, None):
        assert torch.autograd.gradcheck(lambda v, m=soft: batch_hard_triplet(v, labels, m), (vectors,))


@pytest.mark.parametrize("name", ["triplet", "large_margin", "cosface", "arcface"])
def test_vectors_on_and_opposite_their_class_and_zero_have_finite_gradients(name: str) -> None:
    loss = build_embed_loss({"name": name}, 3, 2)
    direction = torch.tensor([1.0, 2.0, 3.0])
    for weights in loss.parameters():
        with torch.no_grad():
            weights.copy_(torch.stack((direction, -direction)))
    vectors = torch.stack((direction, -direction, direction, torch.zeros(3))).requires_grad_()
    value = loss(vectors, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(vectors.grad).all()  # type: ignore[arg-type]
    assert all(torch.isfinite(weights.grad).all() for weights in loss.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "arc_face"}, "Did you mean 'arcface'"),
        ({"name": "triplet", "margn": 1}, r"head.loss.margn.*'margin'"),
        ({"name": "triplet", "margin": 3.0}, r"head.loss.margin' must be in 0..2"),
        ({"name": "large_margin", "margin": 0}, r"head.loss.margin' must be in 1..8"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_embed_loss(options, 4, 3)
