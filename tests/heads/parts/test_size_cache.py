"""What depends on sizes alone is computed once for each."""

import copy

import torch
from torch import Tensor

from detkit.heads.parts.size_cache import KEPT, PerSize

CPU = torch.device("cpu")


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, size: tuple[int, int]) -> Tensor:
        self.calls += 1
        return torch.full(size, 2.0)


def test_each_size_is_computed_once() -> None:
    compute = Counted()
    places = PerSize(compute)
    first, second = places(CPU, (2, 3)), places(CPU, (4, 1))
    assert (first.shape, second.shape) == ((2, 3), (4, 1))
    assert places(CPU, (2, 3)) is first
    assert compute.calls == 2
    assert places(torch.device("meta"), (2, 3)).device.type == "meta"
    assert compute.calls == 3


def test_no_more_than_the_last_sizes_are_kept() -> None:
    compute = Counted()
    places = PerSize(compute)
    for height in range(3 * KEPT):
        places(CPU, (height, 1))
        assert len(places._known) <= KEPT
    places(CPU, (3 * KEPT - 1, 1))
    assert compute.calls == 3 * KEPT


def test_what_a_prediction_left_serves_a_training() -> None:
    places = PerSize(Counted())
    with torch.inference_mode():
        places(CPU, (2, 2))
    weight = torch.ones(2, 2, requires_grad=True)
    (weight * places(CPU, (2, 2))).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 2), 2.0))


def test_a_copy_of_a_head_goes_on_by_itself() -> None:
    places = PerSize(Counted())
    places(CPU, (2, 2))
    other = copy.deepcopy(places)
    other(CPU, (3, 3))
    assert (places.compute.calls, other.compute.calls) == (1, 2)


def test_a_compiler_gets_the_computation() -> None:
    compute = Counted()
    places = PerSize(compute)

    def doubled(values: Tensor) -> Tensor:
        return values * places(CPU, (values.shape[0], 3))

    compiled = torch.compile(doubled, backend="eager", dynamic=True, fullgraph=True)
    for height in (4, 5, 6):
        assert torch.equal(compiled(torch.ones(height, 3)), torch.full((height, 3), 2.0))
    assert not places._known
