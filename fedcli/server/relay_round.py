"""The server's part in hierarchy: a region's round that begins from its parent's."""

from fedcli.server.aggregate import after_publishing, trust_of
from fedcli.server.open_round import open_from_parent
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.locks import hold


def begin_round(federation: FederationState, parent: Round, client: int, *, known: str) -> bool:
    """Publish a region's round that begins from its parent's latest, as client `client` of that.

    Returns False, and publishes nothing, where the region's latest round is not `known`, by its hash. Raises
    ConfigError where the federation is no region.
    """
    with hold(federation.workspace.server_lock, "the server's work"):
        federation.refresh()
        if federation.head.sha256 != known:
            return False
        trust = trust_of(federation)
        federation.workspace.store.sweep("rounds")
        published = open_from_parent(federation, parent, client, trust)
        after_publishing(federation, trust, published)
        return published
