"""Work beside the main thread keeps its order, its bounds and its errors."""

import threading
from collections.abc import Iterator

import pytest

from detkit.inference.background_io import BackgroundWriter, ahead, items_ahead


def test_results_come_in_order_from_another_thread() -> None:
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        return item * item

    assert list(ahead(work, range(20), 3)) == [item * item for item in range(20)]
    assert threads.isdisjoint({threading.get_ident()})


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_made_ahead_than_asked_for(depth: int) -> None:
    made: list[int] = []
    results = ahead(lambda item: made.append(item) or item, range(100), depth)
    assert [next(results) for _ in range(5)] == list(range(5))
    results.close()  # type: ignore[attr-defined]
    assert len(made) <= 5 + depth


def test_an_error_comes_where_its_result_would() -> None:
    results = ahead(lambda item: 6 // (3 - item), range(9), 4)
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_items_come_in_order_from_another_thread_and_none_is_lost() -> None:
    threads = set()

    def items() -> Iterator[int | None]:
        threads.add(threading.get_ident())
        yield from (0, None, 2, None)

    for depth in (1, 2, 9):
        assert list(items_ahead(items(), depth)) == [0, None, 2, None]
    assert list(items_ahead([], 3)) == []
    assert threads.isdisjoint({threading.get_ident()})


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_items_are_drawn_than_asked_for(depth: int) -> None:
    drawn: list[int] = []
    items = items_ahead((drawn.append(number) or number for number in range(100)), depth)
    assert [next(items) for _ in range(5)] == list(range(5))
    items.close()
    assert len(drawn) <= 5 + depth


def test_an_error_of_the_iterator_comes_where_its_item_would() -> None:
    items = items_ahead((6 // (3 - number) for number in range(9)), 4)
    assert [next(items) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_calls_behind_run_in_order_and_are_done_at_the_end() -> None:
    done: list[int] = []
    with BackgroundWriter(2) as writer:
        for number in range(50):
            writer.submit(done.append, number)
    assert done == list(range(50))


def test_the_first_error_behind_is_raised_and_no_call_after_it_is_made() -> None:
    done: list[float] = []
    with pytest.raises(ZeroDivisionError), BackgroundWriter(4) as writer:  # noqa: PT012 (which of the two raises is open)
        for number in range(20):
            writer.submit(lambda value: done.append(6 // (3 - value)), number)
    assert done == [2, 3, 6]


def test_what_was_submitted_before_an_error_in_front_is_done() -> None:
    done: list[int] = []
    with pytest.raises(KeyError), BackgroundWriter(8) as writer:  # noqa: PT012
        writer.submit(done.append, 1)
        raise KeyError
    assert done == [1]
