"""Which of a round's adapters a client trains."""

from fedcli.client.runtime import Runtime
from fedcli.observer import Observer
from fedcli.parties.party import Party
from fedcli.randomness import stream
from fedcli.workspace.history import Round


def cluster_of(head: Round, party: Party, runtime: Runtime, num_clients: int, observer: Observer) -> int:
    """Return the cluster that the manifest gives a client, or where it chooses, the one of the least loss on its rows.

    In round 0 all adapters are the same: there clients are dealt out in the order of a draw. Ghosh et al., "An
    Efficient Framework for Clustered Federated Learning", 2020 (2006.04088), algorithm 1.
    """
    clusters, client = head.manifest.clusters, party.client
    if clusters is None or clusters.of is not None:
        return 0 if clusters is None else clusters.of_client(client, None)
    if head.number == 0:
        order = stream(head.manifest.train.seed, "clusters").permutation(num_clients)
        return int(order[client]) % clusters.count
    losses = [
        runtime.mean_loss(head.of_cluster(cluster).adapter(), head.manifest.train, party=party)
        for cluster in range(clusters.count)
    ]
    chosen = losses.index(min(losses))
    if not head.manifest.withholds:
        told = ", ".join(f"{cluster}: {loss:.4f}" for cluster, loss in enumerate(losses))
        observer.noted(f"client {client}: takes cluster {chosen}, by the losses on its rows ({told})")
    return chosen
