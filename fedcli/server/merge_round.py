"""Merging a round in the way that its manifest and the rule ask for, and telling what may be told of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedcli.algos import Algorithm
from fedcli.algos.robust import Rule
from fedcli.errors import ConfigError
from fedcli.observer import Observer
from fedcli.server.merge_by_rule import combine_with
from fedcli.server.withheld import without_figures
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate
from fedcli.workspace.records import Aggregation, CountedUpdate

if TYPE_CHECKING:
    from fedcli.workspace.noise_keys import NoiseSource


def merge_round(
    rule: Rule | None,
    base: Round,
    algorithm: Algorithm,
    num_clients: int,
    order: Sequence[int],
    count: int,
    observer: Observer,
    *,
    recorded: Mapping[int, CountedUpdate] | None = None,
    authenticate: Authenticate | None = None,
    noise: "NoiseSource | None" = None,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Merge a round as `combine_with` does, or with noise where it is of unit client; return what may be published.

    Without `noise`, or where it gives no key, such a round is checked alone: there are no files. Raises what
    `combine_with` and `combine_privately` do, ConfigError where a rule stands beside unit client.
    """
    privacy = base.manifest.privacy
    if base.manifest.clusters is not None:
        from fedcli.server.merge_clusters import combine_clusters

        files, found = combine_clusters(
            base, algorithm, num_clients, order, observer, recorded=recorded, authenticate=authenticate
        )
        return files, without_figures(base, found)
    if privacy is None or not privacy.is_at_server:
        files, found = combine_with(
            rule, base, algorithm, num_clients, order, count, observer, recorded=recorded, authenticate=authenticate
        )
        return files, without_figures(base, found)
    if rule is not None and not rule.is_plain_mean:
        raise ConfigError(
            f"round {base.number} was opened with privacy.unit: client, and aggregation.rule is {rule.rule}: they "
            "exclude each other",
            hint="Set aggregation.rule to mean, and aggregation.nearest_mixing to false.",
        )
    from fedcli.server.merge_privately import combine_privately  # other rounds need neither keys nor noise

    files, found = combine_privately(
        base,
        algorithm,
        num_clients,
        order,
        count,
        observer,
        noise=noise or (lambda _: None),
        refuses_incomplete=recorded is not None,
        authenticate=authenticate,
    )
    return files, without_figures(base, found)
