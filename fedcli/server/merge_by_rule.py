"""Merging a round's updates by a rule that takes the place of their weighted mean, in two passes over them.

The first reads all of them side by side, checks them, and makes the Gram matrix of their differences: what tells
outliers, and gives the weights of most rules. The second makes the weighted sum, one update after the other, or looks
at each number of all of them. Memory holds blocks only, and n x n numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from fedcli.algos import Algorithm, Array, Arrays, MergedUpdates
from fedcli.algos.diagnostics import diagnose
from fedcli.algos.reducer import WeightedMean
from fedcli.algos.robust import Rule
from fedcli.algos.unequal import factors
from fedcli.errors import ConfigError, NotReadyError
from fedcli.server.merge import (
    Merged,
    MergeInputs,
    check_finite,
    combine,
    files_of,
    next_step,
    read_pairs,
    told_steps,
    weight_of,
)
from fedcli.server.merge_unequal import check_steps
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import (
    ChangedUpdate,
    Submission,
    check_rows,
    look_at_update,
    origin_of,
    read_update,
)
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.merge_records import Aggregation, CountedUpdate, RefusedUpdate
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.side_by_side import SideBySide


def combine_with(rule: Rule | None, inputs: MergeInputs, *, by_steps: bool = False) -> Merged:
    """Merge a round's updates as `merge.combine` does, by a rule; None and what changes nothing are the weighted mean.

    A round that is computed again has its recorded weights, and what comes back has those that the rule gives now.
    `by_steps` weighs by steps, too: the rule is then the mean. Raises what `combine` does, NotReadyError where too few
    updates are valid for what the rule should tolerate, ConfigError where the algorithm merges in a way of its own.
    """
    if rule is None or rule.is_plain_mean:
        return combine(inputs)
    _check_algorithm(inputs.algorithm, rule)
    _check_encoding(inputs.base, rule)
    changed: list[int] = []
    while True:
        restless = {each for each in changed if changed.count(each) > 1}
        survey = Survey(inputs, restless, by_steps)
        try:
            survey.read()
            return _combine(rule, inputs, survey)
        except ChangedUpdate as error:  # once is chance; who does it again does not keep the round from going on
            if inputs.is_again:
                raise
            changed.append(error.client)


def _combine(rule: Rule, inputs: MergeInputs, survey: "Survey") -> Merged:
    """Merge the updates of a first pass."""
    base, algorithm, recorded = inputs.base, inputs.algorithm, inputs.recorded
    if not survey.found or (recorded is not None and len(survey.found) < len(recorded)):
        return None, survey.aggregation(rule, [])
    if recorded is None:
        rule = _adjusted(rule, len(survey.found), len(survey.refused))
    merge = _Merge(rule, survey)
    counted = merge.counted()
    before = None if recorded is None else [recorded[entry.client] for entry in counted]
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        merged = merge.result(counted if before is None else before, inputs.num_clients)
        following, state = next_step(base, algorithm, merge.adapter, merged)
    check_finite(base, following, state, {entry.client: entry.delta_norm or 0.0 for entry in counted})
    return files_of(algorithm, following, state), survey.aggregation(rule, counted)


def _check_algorithm(algorithm: Algorithm, rule: Rule) -> None:
    """Raise ConfigError where an algorithm has a reducer of its own: two cannot take the place of one mean."""
    for name in ("reducer", "file_reducer"):
        if getattr(type(algorithm), name) is not getattr(Algorithm, name):
            raise ConfigError(
                f"aggregation.rule is {rule.rule}, and the algorithm {algorithm.name} merges in a way of its own",
                hint="Set aggregation.rule to mean, or choose another algorithm.",
            )


def _check_encoding(base: Round, rule: Rule) -> None:
    """Raise ConfigError where a rule takes middles of numbers of which most updates have sent nothing."""
    encoding = base.manifest.encoding
    if encoding is not None and encoding.top_k is not None and rule.rule in ("median", "trimmed_mean"):
        raise ConfigError(
            f"round {base.number} was opened with aggregation.encoding: top_k, which excludes aggregation.rule: "
            f"{rule.rule}: of each number most updates send nothing, so that its middle is zero",
            hint="Set aggregation.rule to another one until that round is merged.",
        )


def _adjusted(rule: Rule, num_valid: int, num_refused: int) -> Rule:
    """Return the rule for the valid updates: one that was refused is one hostile update less among them.

    So a hostile client cannot stop a round by sending garbage. Raises NotReadyError where too few are valid.
    """
    adjusted = replace(rule, tolerate=max(0, rule.tolerate - num_refused))
    if num_valid < adjusted.fewest:
        raise NotReadyError(
            f"{num_valid} updates are valid, and {rule.rule} needs {adjusted.fewest} to tolerate {adjusted.tolerate} "
            "hostile ones",
            hint="Wait for more of the cohort; or set aggregation.tolerate or aggregation.rule in fedcli.yaml, which "
            "takes effect at once.",
        )
    return adjusted


@dataclass
class Survey:
    """The first pass: who sent a valid update, and the Gram matrix of their differences for each file."""

    inputs: MergeInputs
    restless: "set[int]" = field(default_factory=set)
    """Whose updates change while they are read: they are refused."""
    by_steps: bool = False
    """Whether the numbers of steps weigh."""
    found: list[Submission] = field(default_factory=list)
    products: dict[str, Array] = field(default_factory=dict)
    refused: list[RefusedUpdate] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)

    @property
    def base(self) -> Round:
        """The round."""
        return self.inputs.base

    @cached_property
    def adapter(self) -> Arrays:
        """The round's global adapter."""
        return self.base.adapter()

    def read(self) -> None:
        """Find the first valid updates, as many as are enough, and read them side by side."""
        remaining, count = list(self.inputs.order), self.inputs.count
        while True:
            while remaining and len(self.found) < count:
                self._look(remaining.pop(0))
            faulty = self._pass()
            for position in reversed(faulty):
                self._refuse(self.found.pop(position).client)
            if not (faulty and remaining and len(self.found) < count):
                break
        kept = [position for position in range(len(self.found) + len(faulty)) if position not in faulty]
        self.products = {name: found[np.ix_(kept, kept)] for name, found in self.products.items()}
        for client in remaining:
            (self.surplus if self.base.has_update(client) else self.missing).append(client)

    def _look(self, client: int) -> None:
        if client in self.restless:
            self._note(client, ChangedUpdate.refusal())
            return
        try:
            submission = look_at_update(self.base, client, self.inputs.authenticate)
            if submission is None:
                self.missing.append(client)
                return
            if not self.inputs.is_again:
                check_rows(self.base, client, submission)
                if self.by_steps:
                    check_steps(self.base, submission)
        except Refusal as refusal:
            if refusal.code in ("samples", "steps"):
                self._note(client, refusal)
            else:
                self._refuse(client)
            return
        self.found.append(submission)

    def _pass(self) -> list[int]:
        """Read each file of all that were found side by side; return the positions of those that are faulty."""
        faulty = set()
        for name in self.base.manifest.update_files if self.found else ():
            reading = SideBySide(self.base, self.found, name, self.adapter if name == ADAPTER_FILE else None)
            self.products[name] = reading.stacks.products()
            faulty |= {*reading.faulty()}
        for submission in self.found:
            self.inputs.observer.update_read(self.base.number, submission.client)
        return sorted(faulty)

    def _refuse(self, client: int) -> None:
        """Note what is wrong with an update, by the checks that every update goes through."""
        try:
            update = read_update(self.base, client, authenticate=self.inputs.authenticate)
        except Refusal as refusal:
            self._note(client, refusal)
            return
        if update is not None:
            raise ChangedUpdate(client)
        self.missing.append(client)

    def _note(self, client: int, refusal: Refusal) -> None:
        if isinstance(refusal, Arriving) and not self.inputs.is_again:
            self.missing.append(client)
        else:
            self.refused.append(RefusedUpdate.of(client, refusal))

    def aggregation(self, rule: Rule, counted: Sequence[CountedUpdate]) -> Aggregation:
        """Return the record of the merge, every list sorted by client."""
        return Aggregation(
            algorithm=asdict(self.inputs.algorithm),
            counted=sorted(counted, key=lambda entry: entry.client),
            refused=sorted(self.refused, key=lambda entry: entry.client),
            missing=sorted(self.missing),
            surplus=sorted(self.surplus),
            rule=asdict(rule),
            step_weighting="fednova" if self.by_steps else None,
        )


@dataclass
class _Merge:
    """The second pass."""

    rule: Rule
    survey: Survey

    def __post_init__(self) -> None:
        self.base, self.algorithm = self.survey.base, self.survey.inputs.algorithm
        self.adapter = self.survey.adapter

    def counted(self) -> list[CountedUpdate]:
        """Return what the manifest will say of each valid update, with the weights that the rule gives, in order."""
        found, products = self.survey.found, self.survey.products[ADAPTER_FILE]
        steps = np.array([each.record.steps if self.survey.by_steps else 1 for each in found])
        given = np.array([weight_of(self.base, self.algorithm, each.client, each.record) for each in found])
        shares = self.rule.shares(given / steps)  # of what the differences are multiplied by
        weights = self.rule.weights(products, shares)
        if self.survey.by_steps:
            weights = np.array(factors((shares * steps).tolist(), steps=steps.tolist()))
        others = {name: self._file_weights(name) for name in self.algorithm.update_files}
        return [
            CountedUpdate(
                client=each.client,
                update=each.sha256,
                weight=float(weights[position]),
                num_samples=each.record.num_samples,
                train_loss=each.record.train_loss,
                delta_norm=figures.norm,
                bytes=each.num_bytes,
                cosine=figures.cosine,
                change=figures.change,
                file_weights={name: float(given[position]) for name, given in others.items()} or None,
                privacy=each.record.privacy,
                steps=told_steps(self.base, each.record, self.survey.by_steps),
            )
            for position, (each, figures) in enumerate(zip(found, diagnose(products, shares), strict=True))
        ]

    def result(self, entries: Sequence[CountedUpdate], num_clients: int) -> MergedUpdates:
        """Return what stands for all updates, with these weights, zero where they carry nothing."""
        names = self.base.manifest.update_files
        zeros = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in self.adapter.items()}
        merged = {name: self._blockwise(name) for name in names} if self.rule.is_blockwise else self._weighted(entries)
        of_all = len(entries) / num_clients  # SCAFFOLD's c+ = c + (K/N) times what stands for the K controls
        files = {
            name: zeros | {tensor: of_all * array for tensor, array in merged[name].items()}
            for name in self.algorithm.update_files
        }
        return MergedUpdates(zeros | merged[ADAPTER_FILE], files)

    def _file_weights(self, name: str) -> Array:
        """Return the weights for a file beside the adapter, by the rule on that file alone."""
        count = len(self.survey.found)
        return self.rule.weights(self.survey.products[name], np.full(count, 1 / count))

    def _weighted(self, entries: Sequence[CountedUpdate]) -> dict[str, dict[str, Array]]:
        """Return the weighted sum of each file; an update that weighs nothing is not read again."""
        weights = {entry.client: {ADAPTER_FILE: entry.weight or 0.0} | (entry.file_weights or {}) for entry in entries}
        hashes = {submission.client: submission.sha256 for submission in self.survey.found}
        sums = {name: WeightedMean(divisor=1.0) for name in self.base.manifest.update_files}
        weighing = [client for client, given in weights.items() if any(given.values())]
        for client, reading in read_pairs(self.base, weighing):
            try:
                update = reading.result()
            except Refusal as refusal:
                raise ChangedUpdate(client) from refusal
            if update is None or update.sha256 != hashes[client]:
                raise ChangedUpdate(client)
            for name, reducer in sums.items():
                origin = origin_of(update.record, name, self.adapter)
                reducer.add(update.files[name], weights[client][name], origin)
        return {name: reducer.sums() for name, reducer in sums.items()}

    def _blockwise(self, name: str) -> dict[str, Array]:
        """Return what the rule makes of each number of all updates."""
        mixing = self.rule.mixing(self.survey.products[name])
        reading = SideBySide(self.base, self.survey.found, name, self.adapter if name == ADAPTER_FILE else None)
        found = reading.stacks.reduce(lambda rows: self.rule.combine(rows, mixing))
        if faulty := reading.faulty():
            raise ChangedUpdate(self.survey.found[faulty[0]].client)
        return found
