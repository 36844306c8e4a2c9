"""Work that goes on beside the main thread: what is needed next is made ahead, what is done with is put away behind."""

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
    """The results of `work` in the order of `items`, made in another thread, at most `depth` before they are asked for.

    An error comes where its result would, and ends the iteration.
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
    """The items in order, drawn from an iterator in another thread, at most `depth` before they are asked for.

    An error of the iterator comes where its item would, and ends the iteration.
    """
    iterator, end = iter(items), object()
    with closing(ahead(lambda _: next(iterator, end), repeat(None), depth)) as drawn:
        for item in drawn:
            if item is end:
                return
            yield item  # type: ignore[misc]


class Behind:
    """Runs calls one after the other in another thread; a context, whose end waits for all of them.

    Args:
        depth: calls that may wait; the next `submit` waits with them.

    Raises:
        What a call raised, from a later `submit` or at the end; the calls after it are left out.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pending: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1)
        self._failed = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Run `work(*arguments)` soon."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, work, arguments))

    def _run(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True  # those that wait already shall not follow what is missing
            raise

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Also after an error elsewhere: what was found before it is written, as without threads.
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
