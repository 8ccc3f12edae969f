"""Calls in threads, so that a signal ends a command at once; what was under way may still arrive."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")
AT_ONCE = 32
"""Requests, of those that are small."""


def interruptible(call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises."""
    return at_once([call], most=1)[0]


def at_once(calls: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Return what calls return, in their order, `most` of them at once; raise what the first that failed raised.

    The threads are daemons, which an executor's are not: Python waits for none of them when it ends.
    """
    futures: list[Future[T]] = [Future() for _ in calls]
    waiting, lock = iter(zip(futures, calls, strict=True)), Lock()

    def work() -> None:
        while True:
            with lock:
                future, call = next(waiting, (None, None))
            if future is None or call is None:
                return
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(most, len(calls))):
        Thread(target=work, daemon=True).start()
    return [future.result() for future in futures]
