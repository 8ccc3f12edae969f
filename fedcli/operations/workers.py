"""Warm processes that train the clients of a round side by side, one on each GPU or share of the processor."""

import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedcli.client.due import ClientResult, log_failure, tell, train_client
from fedcli.client.runtimes import Runtimes
from fedcli.errors import BusyError, ClientFailure, FedError, RequirementError, explain, failure_of
from fedcli.observer import Observer
from fedcli.training.reports import StepReport
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace

MOST_DEATHS = 3
"""A client whose worker dies so often in one round is not tried again."""


@dataclass
class _Worker:
    """A process, this side of its pipe, and the client that it trains now."""

    process: BaseProcess
    connection: Connection
    client: int | None = None


@dataclass
class Workers:
    """Up to `count` processes, started when there is work for them; a context that ends them."""

    workspace: Workspace
    count: int
    threads: int | None = None
    _workers: list[_Worker] = field(default_factory=list, init=False)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def train(self, clients: Sequence[int], number: int, observer: Observer) -> Iterator[ClientResult | ClientFailure]:
        """Train clients of the open round, of this number, each as `client train` does, and yield results as they come.

        A client that another process trains already is passed over. What a worker raises is that client's failure, and
        so is that its workers die again and again.
        """
        waiting = deque(clients)
        deaths: Counter[int] = Counter()
        while waiting or any(worker.client is not None for worker in self._workers):
            while waiting and (idle := self._idle()) is not None:
                try:
                    idle.connection.send(waiting[0])
                except OSError:  # it died while it had nothing to do
                    self._workers.remove(idle)
                    continue
                idle.client = waiting.popleft()
                observer.client_started(idle.client)
            busy = {worker.connection: worker for worker in self._workers if worker.client is not None}
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]  # `wait` returns of what it was given
                client = worker.client
                assert client is not None
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    self._workers.remove(worker)
                    deaths[client] += 1
                    if deaths[client] == MOST_DEATHS:
                        yield _told(failure_of(client, number, _died(worker.process.exitcode)), observer)
                        continue
                    observer.worker_died(client, worker.process.exitcode)
                    waiting.append(client)
                    continue
                if isinstance(message, StepReport):
                    observer.step_done(client, message)
                    continue
                worker.client = None
                if isinstance(message, _Traced):
                    log_failure(client, message.trace)
                    message = failure_of(client, number, message.error)
                if not isinstance(message, BusyError):
                    yield _told(message, observer)

    def _idle(self) -> _Worker | None:
        """Return a worker that has nothing to do, a new one where there may be more; None where all are busy."""
        for worker in self._workers:
            if worker.client is None:
                return worker
        if len(self._workers) == self.count:
            return None
        taken = {worker.process.name for worker in self._workers}
        place = next(place for place in range(self.count) if f"worker-{place}" not in taken)
        process, here = spawn_worker(_work, place, self.count, self.threads, self.workspace.root, self.threads)
        self._workers.append(_Worker(process, here))
        return self._workers[-1]


def spawn_worker(
    work: Callable[..., None], place: int, count: int, threads: int | None, *arguments: object
) -> tuple[BaseProcess, Connection]:
    """Start the process at a `place` among `count`, with a GPU or a share of the cores; return it and a pipe to it.

    It calls `work` with its side of the pipe and the `arguments`.
    """
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(
        target=_begin,
        args=(work, there, _environment(place, count, threads), arguments),
        name=f"worker-{place}",
        daemon=True,
    )
    process.start()
    there.close()  # so that its end is noticed here
    return process, here


def _environment(place: int, count: int, threads: int | None) -> dict[str, str]:
    """Return what a worker's environment has of its own: its GPU, or its share of the processor."""
    gpus = visible_gpus()
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    if threads is not None or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}


def _begin(
    work: Callable[..., None], connection: Connection, environment: dict[str, str], arguments: tuple[object, ...]
) -> None:
    """Begin a worker's process: its signals and environment, before torch is imported."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this will end it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    work(connection, *arguments)


def end_with_parent() -> None:
    """Let this worker end at once when the process that started it has ended, however it did."""
    from multiprocessing import parent_process
    from threading import Thread

    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(0)

    Thread(target=watch, daemon=True).start()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _told(done: ClientResult | ClientFailure, observer: Observer) -> ClientResult | ClientFailure:
    tell(done, observer)
    return done


def _died(exit_code: int | None) -> RequirementError:
    how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return RequirementError(
        f"the worker that trains it died {MOST_DEATHS} times, the last time by {how}",
        hint="Signal 9 is often the kernel's, for want of memory: use fewer --workers, or lower "
        "train.micro_batch_size or train.max_length.",
    )


@dataclass(frozen=True)
class _Traced:
    """An error as it is told, with its traceback: not all errors can travel between processes."""

    error: FedError
    trace: str


class _Reporter(Observer):
    """Sends a worker's steps through its pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def step_done(self, client: int | None, report: StepReport) -> None:
        self._connection.send(report)


def _work(connection: Connection, root: Path, threads: int | None) -> None:
    """Be a worker: train the clients that come through the pipe, until it is closed."""
    federation: FederationState | None = None
    observer = _Reporter(connection)
    while True:
        try:
            client = connection.recv()
        except EOFError:
            return
        try:
            if federation is None:
                federation = FederationState.open(Workspace(root))
                runtimes = Runtimes(federation, threads=threads)
            federation.refresh()
            connection.send(train_client(federation, client, runtimes, observer=observer))
        except BrokenPipeError:
            return
        except BusyError as error:
            connection.send(error)
        except Exception as error:
            connection.send(_Traced(explain(error), traceback.format_exc()))
