"""Calls in threads, so that a signal ends a command at once; what was under way may still arrive."""

from collections.abc import Callable, Iterator, Sequence
from threading import Lock, Semaphore, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
AT_ONCE = 32
"""Requests, of those that are small."""


def interruptible(call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises."""
    return at_once([call], most=1)[0]


def at_once(calls: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Return what calls return, in their order, `most` of them at once; raise what the first that failed raised."""
    waiting: Iterator[_Call[T]] = iter(made := [_Call(call) for call in calls])
    lock, ended = Lock(), Semaphore(0)

    def work() -> None:
        while True:
            with lock:
                call = next(waiting, None)
            if call is None:
                return
            call.make()
            ended.release()

    for _ in range(min(most, len(calls))):
        Thread(target=work, daemon=True).start()
    for _ in made:
        ended.acquire()
    return [call.outcome() for call in made]


class _Call(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None

    def make(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def outcome(self) -> T:
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result
