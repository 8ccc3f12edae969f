"""Which clusters a round has: what fedcli.yaml asks for at first, then what became of them."""

from fedcli.config import Config
from fedcli.errors import ConfigError
from fedcli.workspace.cluster_records import ClustersRecord
from fedcli.workspace.layout import ADAPTER_NAME, adapter_name
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.records import Manifest


def first_clusters(config: Config) -> ClustersRecord | None:
    """Return the clusters of round 0; None where there is one adapter for all."""
    wanted, clients = config.clusters, range(config.federation.clients)
    if wanted.by is None:
        return None
    if wanted.groups is not None:
        names = sorted(wanted.groups)
        of = {str(client): number for number, name in enumerate(names) for client in wanted.groups[name]}
        return ClustersRecord(by="groups", count=len(names), of=of, names=names)
    if wanted.by == "loss":
        return ClustersRecord(by="loss", count=wanted.count or 2)
    return ClustersRecord(
        by="direction",
        count=1,
        of={str(client): 0 for client in clients},
        most=wanted.count,
        split_below=wanted.split_below,
    )


def next_clusters(config: Config, before: Manifest, aggregation: Aggregation | None) -> ClustersRecord | None:
    """Return the clusters behind a round, which may have split; raise ConfigError where fedcli.yaml has others."""
    found, wanted = before.clusters, config.clusters.by
    if (None if found is None else found.by) != wanted:
        raise ConfigError(
            f"clusters.by is {wanted or 'null'}, and the federation began with {'null' if found is None else found.by}",
            hint="Set it back, or start another workspace with `fedcli init DIR`.",
        )
    return split_clusters(found, aggregation)


def split_clusters(found: ClustersRecord | None, aggregation: Aggregation | None) -> ClustersRecord | None:
    """Return the clusters behind a round whose merge split some."""
    if found is None or found.of is None or aggregation is None or not aggregation.splits:
        return found
    moved = {str(client): split.into for split in aggregation.splits for client in split.clients}
    return found.model_copy(update={"count": found.count + len(aggregation.splits), "of": {**found.of, **moved}})


def start_files(files: dict[str, bytes], clusters: ClustersRecord | None) -> dict[str, bytes]:
    """Return round 0's files: every cluster starts from the same adapter."""
    count = 1 if clusters is None else clusters.count
    return files | {adapter_name(cluster): files[ADAPTER_NAME] for cluster in range(1, count)}
