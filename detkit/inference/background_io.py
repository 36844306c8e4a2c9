"""Background threads for I/O: prefetching of inputs and deferred writing of outputs."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Generator[Result, None, None]:
    """Yield the results of `work` in the order of `items`, computed in another thread up to `depth` items ahead.

    An exception is raised in place of its result and ends the iteration.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def items_ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """Yield the items in order, drawn from their iterator in another thread up to `depth` items ahead.

    An exception of the iterator is raised in place of its item and ends the iteration.
    """
    iterator, end = iter(items), object()
    with closing(ahead(lambda _: next(iterator, end), repeat(None), depth)) as drawn:
        for item in drawn:
            if item is end:
                return
            yield item  # type: ignore[misc]


class BackgroundWriter:
    """Runs calls sequentially in another thread; a context manager that waits for all of them on exit.

    An exception of a call is raised by a later `submit` or on exit, and the calls after it are skipped.

    Args:
        depth: maximum number of pending calls; with more, `submit` blocks.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pending: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1)
        self._failed = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Queue the call `work(*arguments)`."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, work, arguments))

    def _run(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True  # calls that are already queued must not run after a missing one
            raise

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Also after an error elsewhere: results found before it are still written, as without threads.
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
