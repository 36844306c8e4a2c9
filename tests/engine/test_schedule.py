import math

import pytest

from detkit.config import TrainOptions
from detkit.engine.schedule import learning_rate_factor


def factors(steps_per_epoch: int = 10, **options: object) -> list[float]:
    train = TrainOptions(epochs=10, **options)  # type: ignore[arg-type]
    return [learning_rate_factor(step, steps_per_epoch, train) for step in range(100)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    values = factors(schedule="constant", warmup_epochs=2)
    assert values[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert values[20:] == [1.0] * 80
    assert factors(schedule="constant", warmup_epochs=0) == [1.0] * 100
    assert factors(schedule="constant", warmup_epochs=0.5)[4:6] == pytest.approx([5 / 6, 1.0])


def test_cosine_ends_at_the_final_factor() -> None:
    values = factors(schedule="cosine", warmup_epochs=1, final_lr_factor=0.1)
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 89)) / 2
    assert values[55] == pytest.approx(middle)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_step_exponential_and_inverse_time() -> None:
    step = factors(schedule="step", warmup_epochs=0, milestones=(3, 7), gamma=0.5)
    assert [step[29], step[30], step[69], step[70]] == [1.0, 0.5, 0.5, 0.25]
    exponential = factors(schedule="exponential", warmup_epochs=0, gamma=0.9)
    assert exponential[50] == pytest.approx(0.9**5)
    inverse = factors(schedule="inverse_time", warmup_epochs=0, gamma=1.0)
    assert [inverse[0], inverse[10], inverse[30]] == pytest.approx([1.0, 1 / 2, 1 / 4])


def test_one_step_in_all_is_no_division_by_zero() -> None:
    train = TrainOptions(epochs=1, schedule="cosine", warmup_epochs=0)
    assert learning_rate_factor(0, 1, train) == pytest.approx(1.0)
