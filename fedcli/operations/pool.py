"""Warm processes that do tasks side by side, one on each GPU or share of the processor; one that dies is replaced."""

import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Self, TypeAlias, TypeVar

from fedcli.errors import FedError, RequirementError, explain

MOST_DEATHS = 3
"""A task whose worker dies so often is not tried again."""
Task = TypeVar("Task", bound=Hashable)
Begin: TypeAlias = Callable[..., Callable[[Any], object]]
"""Called in a worker before its first task, with the pool's arguments and a function that tells of the task at work;
returns what does a task."""


@dataclass(frozen=True)
class Raised:
    """An error of a task as it is told, with its traceback: not all errors can travel between processes."""

    error: FedError
    trace: str


@dataclass(frozen=True)
class Died:
    """The worker of a task has died, with this exit code; minus the signal's number, where it was one."""

    exit_code: int | None

    def error(self, does: str) -> RequirementError:
        """Return what is told of a task whose workers died MOST_DEATHS times; `does` is what they did with it."""
        code = self.exit_code
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return RequirementError(
            f"the worker that {does} it died {MOST_DEATHS} times, the last time by {how}",
            hint="Signal 9 is often the kernel's, for want of memory: use fewer --workers, or lower "
            "train.micro_batch_size or train.max_length.",
        )


@dataclass
class _Worker(Generic[Task]):
    """A process, this side of its pipe, and the task that it does now."""

    process: BaseProcess
    connection: Connection
    task: Task | None = None


class Pool(Generic[Task]):
    """Up to `count` processes, started when there is work for them; a context that ends them.

    `begin` and its `arguments` travel to the processes, as tasks, what is told of them, and results do.
    """

    def __init__(self, count: int, threads: int | None, begin: Begin, *arguments: object) -> None:
        self._count, self._threads, self._begin, self._arguments = count, threads, begin, arguments
        self._workers: list[_Worker[Task]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def run(
        self,
        tasks: Sequence[Task],
        *,
        started: Callable[[Task], None],
        told: Callable[[Task, Any], None],
        died: Callable[[Task, Died], None],
    ) -> Iterator[tuple[Task, Any]]:
        """Yield each task as it ends with its result, with Raised, or with Died where its workers die again and again.

        Who leaves the iteration early gets what was being done then from the next call. `died` hears of deaths after
        which a task is tried again.
        """
        waiting, deaths = deque(tasks), Counter[Task]()
        while waiting or any(worker.task is not None for worker in self._workers):
            while waiting and (idle := self._idle()) is not None:
                try:
                    idle.connection.send(waiting[0])
                except OSError:  # it died while it had nothing to do
                    self._workers.remove(idle)
                    continue
                idle.task = waiting.popleft()
                started(idle.task)
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]  # `wait` returns of what it was given
                task = worker.task
                assert task is not None
                try:
                    has_ended, message = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    self._workers.remove(worker)
                    deaths[task] += 1
                    death = Died(worker.process.exitcode)
                    if deaths[task] == MOST_DEATHS:
                        yield task, death
                    else:
                        died(task, death)
                        waiting.append(task)
                    continue
                if not has_ended:
                    told(task, message)
                    continue
                worker.task = None
                yield task, message

    def _idle(self) -> _Worker[Task] | None:
        """Return a worker that has nothing to do, a new one where there may be more; None where all are busy."""
        for worker in self._workers:
            if worker.task is None:
                return worker
        if len(self._workers) == self._count:
            return None
        taken = {worker.process.name for worker in self._workers}
        place = next(place for place in range(self._count) if f"worker-{place}" not in taken)
        here, there = get_context("spawn").Pipe()
        process = get_context("spawn").Process(
            target=_serve,
            args=(there, _environment(place, self._count, self._threads), self._begin, self._arguments),
            name=f"worker-{place}",
            daemon=True,
        )
        with _safe_path():
            process.start()
        there.close()  # so that its end is noticed here
        self._workers.append(_Worker(process, here))
        return self._workers[-1]


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let no process of Python that is started import from the current folder, which may be a stranger's workspace."""
    given = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = given


def _environment(place: int, count: int, threads: int | None) -> dict[str, str]:
    """Return what a worker's environment has of its own: its GPU, or its share of the processor."""
    gpus = visible_gpus()
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    if threads is not None or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _serve(connection: Connection, environment: dict[str, str], begin: Begin, arguments: tuple[object, ...]) -> None:
    """Be a worker: do the tasks that come through the pipe, until it is closed or who started this has ended."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this will end it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)  # before torch is imported
    _end_with_parent()
    do: Callable[[Any], object] | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            do = do or begin(*arguments, lambda told: connection.send((False, told)))
            result = do(task)
        except BrokenPipeError:
            return
        except Exception as error:
            result = Raised(explain(error), traceback.format_exc())
        connection.send((True, result))


def _end_with_parent() -> None:
    """Let this worker end at once when the process that started it has ended, however it did."""
    from multiprocessing import parent_process
    from threading import Thread

    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(0)

    Thread(target=watch, daemon=True).start()
