"""Warm processes that train the clients of a round side by side."""

from collections.abc import Callable, Iterator, Sequence

from fedcli.client.due import ClientResult, log_failure, tell, train_client
from fedcli.client.runtimes import Runtimes
from fedcli.errors import BusyError, ClientFailure, failure_of
from fedcli.observer import Observer
from fedcli.operations.pool import Died, Pool, Raised
from fedcli.training.reports import StepReport
from fedcli.workspace.address import workspace_at
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace


class Workers(Pool[int]):
    """Up to `count` processes that train clients of a workspace; a context that ends them."""

    def __init__(self, workspace: Workspace, count: int, threads: int | None = None) -> None:
        super().__init__(count, threads, _begin, workspace.address, threads)

    def train(self, clients: Sequence[int], number: int, observer: Observer) -> Iterator[ClientResult | ClientFailure]:
        """Train clients of the open round, of this number, each as `client train` does, and yield results as they come.

        A client that another process trains already is passed over. What a worker raises is that client's failure, and
        so is that its workers die again and again.
        """
        results = self.run(
            clients,
            started=observer.client_started,
            told=observer.step_done,
            died=lambda client, death: observer.worker_died(client, death.exit_code),
        )
        for client, result in results:
            if isinstance(result, Raised):
                if isinstance(result.error, BusyError):
                    continue
                log_failure(client, result.trace)
                result = failure_of(client, number, result.error)
            elif isinstance(result, Died):
                result = failure_of(client, number, result.error("trains"))
            tell(result, observer)
            yield result


class _Reporter(Observer):
    """Tells of a worker's steps."""

    def __init__(self, send: Callable[[StepReport], None]) -> None:
        self._send = send

    def step_done(self, client: int | None, report: StepReport) -> None:
        self._send(report)


def _begin(address: str, threads: int | None, send: Callable[[StepReport], None]) -> Callable[[int], ClientResult]:
    """Return what trains a client in a worker."""
    federation, observer = FederationState.open(workspace_at(address)), _Reporter(send)
    runtimes = Runtimes(federation, threads=threads)

    def train(client: int) -> ClientResult:
        federation.refresh()
        return train_client(federation, client, runtimes, observer=observer)

    return train
