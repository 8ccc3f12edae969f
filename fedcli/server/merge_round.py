"""Merging a round in the way that its manifest and the rule ask for, and telling what may be told of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedcli.algos.lora import LoraRule
from fedcli.algos.robust import Rule
from fedcli.errors import ConfigError
from fedcli.server.encoded_step import with_encoded_step
from fedcli.server.merge import Merged, MergeInputs, delta_files
from fedcli.server.merge_by_rule import combine_with
from fedcli.server.withheld import without_figures
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import ChangedUpdate
from fedcli.workspace.merge_records import RefusedUpdate

if TYPE_CHECKING:
    from fedcli.server.merge_unequal import Unequal
    from fedcli.workspace.noise_keys import NoiseSource


def merge_round(
    rule: Rule | None,
    inputs: MergeInputs,
    *,
    noise: "NoiseSource | None" = None,
    lora: LoraRule | None = None,
    unequal: "Unequal | None" = None,
) -> Merged:
    """Merge a round as `combine_with` does, or with noise where it is of unit client; return what may be published.

    `lora` says what becomes of products of factors; None and what is plain are their means. With `unequal` its order
    and its count hold. Without `noise`, or where it gives no key, such a round is checked alone: there are no files.
    Raises what `combine_with` and `combine_privately` do, ConfigError where a rule stands beside unit client.
    """
    lora, base = lora or LoraRule(), inputs.base
    if base.manifest.clusters is not None:
        from fedcli.server.merge_clusters import combine_clusters

        files, found = _without_restless(combine_clusters, inputs)
        return files, without_figures(base, found)
    is_noisy = base.manifest.privacy is not None and base.manifest.privacy.is_at_server
    if is_noisy:
        _check_noisy(base, rule, lora, unequal)
    if not lora.is_plain or (base.manifest.lora is not None and base.manifest.lora.ranks is not None):
        from fedcli.server.merge_lora import combine_lora  # other rounds need no linear algebra

        files, found = _without_restless(partial(combine_lora, lora, rule), inputs)
    elif is_noisy:
        from fedcli.server.merge_privately import combine_privately  # other rounds need neither keys nor noise

        files, found = combine_privately(inputs, noise or (lambda _: None))
    elif unequal is not None:
        files, found = _merge_unequal(rule, inputs, unequal)
    else:
        files, found = combine_with(rule, inputs)
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


def _without_restless(merge: Callable[[MergeInputs], Merged], inputs: MergeInputs) -> Merged:
    """Merge a round's updates, and once more where one changes while it is read.

    Once is chance; who does it again is refused, and does not keep the round from going on. Raises ChangedUpdate where
    a round that was merged is computed again.
    """
    changed: list[int] = []
    while True:
        restless = {client for client in changed if changed.count(client) > 1}
        try:
            files, found = merge(replace(inputs, order=[each for each in inputs.order if each not in restless]))
        except ChangedUpdate as error:
            if inputs.is_again:
                raise
            changed.append(error.client)
            continue
        refused = [*found.refused, *(RefusedUpdate.of(client, ChangedUpdate.refusal()) for client in restless)]
        return files, found.model_copy(update={"refused": sorted(refused, key=lambda entry: entry.client)})


def _published(base: Round, files: dict[str, bytes] | None) -> dict[str, bytes] | None:
    """Return a round's merged files as they are published: encoded, and with base_delta/, which the merge may leave."""
    return with_encoded_step(base, None if files is None else {**delta_files(base), **files})


def _merge_unequal(rule: Rule | None, inputs: MergeInputs, unequal: "Unequal") -> Merged:
    """Merge with weights for steps and age; a cap on weights, which looks at all of them first, has its own way."""
    if rule is not None and not rule.is_plain_mean:
        of_round = replace(
            inputs,
            order=[client for _, client in unequal.order],
            count=unequal.count,
            authenticate=unequal.authenticate(inputs.base),
        )
        return combine_with(rule, of_round, by_steps=unequal.by_steps)
    from fedcli.server.merge_unequal import combine_unequal  # of no other merge

    return combine_unequal(inputs, unequal)
