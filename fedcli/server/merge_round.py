"""Merging a round in the way that its manifest and the rule ask for, and telling what may be told of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from fedcli.algos import Algorithm
from fedcli.algos.lora import LoraRule
from fedcli.algos.robust import Rule
from fedcli.errors import ConfigError
from fedcli.observer import Observer
from fedcli.server.encoded_step import with_encoded_step
from fedcli.server.merge import delta_files
from fedcli.server.merge_by_rule import combine_with
from fedcli.server.withheld import without_figures
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate, ChangedUpdate
from fedcli.workspace.records import Aggregation, CountedUpdate, RefusedUpdate

if TYPE_CHECKING:
    from fedcli.server.merge_unequal import Unequal
    from fedcli.workspace.noise_keys import NoiseSource

Merged: TypeAlias = "tuple[dict[str, bytes] | None, Aggregation]"
"""The next round's files, None without a valid update, and the record of the merge."""


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
    lora: LoraRule | None = None,
    unequal: "Unequal | None" = None,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Merge a round as `combine_with` does, or with noise where it is of unit client; return what may be published.

    `lora` says what becomes of products of factors; None and what is plain are their means. With `unequal` its order
    and its count hold. Without `noise`, or where it gives no key, such a round is checked alone: there are no files.
    Raises what `combine_with` and `combine_privately` do, ConfigError where a rule stands beside unit client.
    """
    lora, is_again, manifest = lora or LoraRule(), recorded is not None, base.manifest
    files: dict[str, bytes] | None
    if manifest.clusters is not None:
        from fedcli.server.merge_clusters import combine_clusters

        of_clusters = partial(
            combine_clusters,
            base,
            algorithm,
            num_clients,
            observer=observer,
            recorded=recorded,
            authenticate=authenticate,
        )
        files, found = _without_restless(of_clusters, order, is_again=is_again)
        return files, without_figures(base, found)
    is_noisy = manifest.privacy is not None and manifest.privacy.is_at_server
    if is_noisy:
        _check_noisy(base, rule, lora, unequal)
    if not lora.is_plain or (manifest.lora is not None and manifest.lora.ranks is not None):
        from fedcli.server.merge_lora import combine_lora  # other rounds need no linear algebra

        of_products = partial(
            combine_lora,
            lora,
            rule,
            base,
            algorithm,
            num_clients,
            count=count,
            observer=observer,
            refuses_incomplete=is_again,
            authenticate=authenticate,
        )
        files, found = _without_restless(of_products, order, is_again=is_again)
    elif is_noisy:
        from fedcli.server.merge_privately import combine_privately  # other rounds need neither keys nor noise

        files, found = combine_privately(
            base,
            algorithm,
            num_clients,
            order,
            count,
            observer,
            noise=noise or (lambda _: None),
            refuses_incomplete=is_again,
            authenticate=authenticate,
        )
    elif unequal is not None:
        files, found = _merge_unequal(rule, base, algorithm, num_clients, unequal, observer, recorded)
    else:
        files, found = combine_with(
            rule, base, algorithm, num_clients, order, count, observer, recorded=recorded, authenticate=authenticate
        )
    return _published(base, files), without_figures(base, found)


def _check_noisy(base: Round, rule: Rule | None, lora: LoraRule, unequal: "Unequal | None") -> None:
    """Raise ConfigError for what fedcli.yaml excludes beside unit client, which it may ask for since."""
    opened = f"round {base.number} was opened with privacy.unit: client, and"
    if not lora.is_plain or (base.manifest.lora is not None and base.manifest.lora.ranks is not None):
        raise ConfigError(
            f"{opened} aggregation.lora is {lora.lora} (lora_weights, lora_error and lora_fair count, too): they "
            "exclude each other",
            hint="Leave what begins with lora out of the section aggregation.",
        )
    if unequal is not None:
        raise ConfigError(
            f"{opened} aggregation.step_weighting is set: they exclude each other",
            hint="Set aggregation.step_weighting to none.",
        )
    if rule is not None and not rule.is_plain_mean:
        raise ConfigError(
            f"{opened} aggregation.rule is {rule.rule}: they exclude each other",
            hint="Set aggregation.rule to mean, and aggregation.nearest_mixing to false.",
        )


def _without_restless(merge: Callable[[Sequence[int]], Merged], order: Sequence[int], *, is_again: bool) -> Merged:
    """Merge the updates of some clients, in this order, and once more where one changes while it is read.

    Once is chance; who does it again is refused, and does not keep the round from going on. Raises ChangedUpdate where
    a round that was merged is computed again.
    """
    changed: list[int] = []
    while True:
        restless = {client for client in changed if changed.count(client) > 1}
        try:
            files, found = merge([client for client in order if client not in restless])
        except ChangedUpdate as error:
            if is_again:
                raise
            changed.append(error.client)
            continue
        refused = [*found.refused, *(RefusedUpdate.of(client, ChangedUpdate.refusal()) for client in restless)]
        return files, found.model_copy(update={"refused": sorted(refused, key=lambda entry: entry.client)})


def _published(base: Round, files: dict[str, bytes] | None) -> dict[str, bytes] | None:
    """Return a round's merged files as they are published: encoded, and with base_delta/, which the merge may leave."""
    return with_encoded_step(base, None if files is None else {**delta_files(base), **files})


def _merge_unequal(
    rule: Rule | None,
    base: Round,
    algorithm: Algorithm,
    num_clients: int,
    unequal: "Unequal",
    observer: Observer,
    recorded: Mapping[int, CountedUpdate] | None,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Merge with weights for steps and age; a cap on weights, which looks at all of them first, has its own way."""
    if rule is not None and not rule.is_plain_mean:
        clients = [client for _, client in unequal.order]
        authenticate, count = unequal.authenticate(base), unequal.count
        return combine_with(
            rule,
            base,
            algorithm,
            num_clients,
            clients,
            count,
            observer,
            recorded=recorded,
            authenticate=authenticate,
            by_steps=unequal.by_steps,
        )
    from fedcli.server.merge_unequal import combine_unequal  # of no other merge

    return combine_unequal(base, algorithm, num_clients, unequal, observer, is_again=recorded is not None)
