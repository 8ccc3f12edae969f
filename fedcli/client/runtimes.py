"""The models that a process has loaded; none is loaded before it is needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcli.observer import Observer
from fedcli.parties.party import Party
from fedcli.workspace.federation_state import FederationState

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime
    from fedcli.model.lora import AdaptedModel


@dataclass
class KeptModel:
    """The last model that a process loaded, for the next federation that starts from the same base and LoRA layers."""

    _key: object = None
    _model: "AdaptedModel | None" = None

    def get(self, key: object, load: "Callable[[], AdaptedModel]") -> "AdaptedModel":
        """Return the model of a key: the kept one, else one that is loaded now and takes its place."""
        if self._model is None or self._key != key:
            self._model = None  # before the next one is loaded: two may not fit
            self._key, self._model = key, load()
        return self._model


class Runtimes:
    """One model for all clients, and one more for each party with its own copy of the base or its own trust in code.

    `kept` holds a model for the federations that the process comes to later.
    """

    def __init__(
        self, federation: FederationState, *, threads: int | None = None, kept: KeptModel | None = None
    ) -> None:
        self._federation = federation
        self._threads = threads
        self._kept = kept
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

            self._loaded[key] = Runtime(self._federation, threads=self._threads, party=party, kept=self._kept)
        self._loaded[key].observer = observer
        return self._loaded[key]
