"""The models that a process has loaded; none is loaded before it is needed."""

from typing import TYPE_CHECKING

from fedcli.observer import Observer
from fedcli.parties.party import Party
from fedcli.workspace.federation_state import FederationState

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime


class Runtimes:
    """One model for all clients, and one more for each party with its own copy of the base or its own trust in code."""

    def __init__(self, federation: FederationState, *, threads: int | None = None) -> None:
        self._federation = federation
        self._threads = threads
        self._loaded: dict[tuple[str | None, bool | None], Runtime] = {}

    def load(self, party: Party | None = None, observer: Observer | None = None) -> "Runtime":
        """Return a party's, or for None that of all clients, loaded now where it is not yet.

        From now on it tells the observer what it reads.
        """
        observer = observer or Observer()
        observer.model_loading(self._federation.head)
        key = (party.base, party.trust_remote_code) if party else (None, None)
        if key not in self._loaded:
            from fedcli.client.runtime import Runtime

            self._loaded[key] = Runtime(self._federation, threads=self._threads, party=party)
        self._loaded[key].observer = observer
        return self._loaded[key]
