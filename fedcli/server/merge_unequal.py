"""Merging updates of unequal steps, and of several rounds: algos/unequal.py has the formulas.

Each is read and checked as ever, as an update of the round that it was made from; what is summed is its difference from
that round's adapter. One pass, and no more in memory than two updates, the sum and the adapters of the window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Algorithm, Array, Arrays
from fedcli.algos.reducer import Reducer, WeightedMean
from fedcli.algos.unequal import age_factor, factors, step_scale
from fedcli.errors import ConfigError
from fedcli.observer import Observer
from fedcli.server.late import late_of
from fedcli.server.merge import Merge, Merged, MergeInputs, check_finite, files_of, next_step
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate, Submission, Update, check_rows, read_update
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.merge_records import Aggregation, RefusedUpdate
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.window import Sent

if TYPE_CHECKING:
    from fedcli.server.enrol import ServerTrust


@dataclass(frozen=True)
class Unequal:
    """How a merge weighs its updates, and which they are.

    `order` is that of the sum; `most` is how many of a client may still count, by client, and None how many it likes.
    `authenticate` says who looks at signatures, by the round that an update was made from.
    """

    by_steps: bool
    order: Sequence[Sent]
    count: int
    most: Mapping[int, int] | None = None
    authenticate: Callable[[Round], Authenticate | None] = lambda _: None


def unequal_of(federation: FederationState, trust: "ServerTrust | None") -> Unequal | None:
    """Return how the open round is merged; None where it has the plain mean of its own updates, or a rule's."""
    config, head = federation.config.aggregation, federation.head
    by_steps = config.step_weighting == "fednova"
    has_window = head.manifest.staleness is not None and config.counts_late
    if not by_steps and not has_window:
        return None
    late, most = late_of(federation) if has_window else ([], None)
    return Unequal(
        by_steps=by_steps,
        order=[*late, *((head, client) for client in head.draw_order)],
        count=head.num_counted,
        most=most,
        authenticate=lambda base: None if trust is None else trust.check_updates(base),
    )


def combine_unequal(inputs: MergeInputs, unequal: Unequal) -> Merged:
    """Merge the first valid updates of the order of `unequal`, which takes the place of that of the inputs.

    Returns what `merge.combine` does, and raises it, and ConfigError where the algorithm merges in a way of its own.
    """
    base, algorithm = inputs.base, inputs.algorithm
    if type(algorithm).reducer is not Algorithm.reducer:
        raise ConfigError(
            f"aggregation weighs updates by their steps or their age, and the algorithm {algorithm.name} merges in a "
            "way of its own",
            hint="Set aggregation.step_weighting to none and aggregation.staleness to 0, or choose another algorithm.",
        )
    merge = _UnequalMerge(base, algorithm, WeightedMean(), inputs.file_reducers(), by_steps=unequal.by_steps)
    _read(merge, unequal, inputs.observer, inputs.is_again)
    aggregation = merge.aggregation()
    if not merge.counted:
        return None, aggregation
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        following, state = next_step(base, algorithm, merge.adapter, merge.result())
    check_finite(base, following, state, merge.magnitudes)
    return files_of(algorithm, following, state), aggregation


def check_steps(base: Round, update: Update | Submission) -> None:
    """Raise Refusal(steps) for an update that claims more steps than its round asked for: it would weigh the others."""
    made, asked = update.record.steps, base.manifest.train.steps
    if made > asked:
        refusal = Refusal("steps", f"it says that it made {made} steps, and round {base.number} asked for {asked}")
        refusal.update = update.sha256
        raise refusal


@dataclass
class _UnequalMerge(Merge):
    """Sums w_k d_k / tau_k (1 + t_k)^-1/2, and scales the sum once all are there."""

    by_steps: bool = False
    steps: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    origins: dict[int, Arrays] = field(default_factory=dict)
    """The adapters of earlier rounds, by their numbers."""
    reading: Round | None = None
    """The round that the update was made from which is counted now."""

    def origin_of(self, update: Update) -> Arrays:
        """Return the adapter that an update was made from."""
        number = update.record.round
        if number == self.base.number:
            return self.adapter
        if number not in self.origins:
            assert self.reading is not None
            self.origins[number] = self.reading.adapter()
        return self.origins[number]

    def factor_of(self, update: Update) -> float:
        """Return what an update's difference is multiplied by beside its weight, before the sum is scaled."""
        steps = update.record.steps if self.by_steps else 1
        return age_factor(self.base.number - update.record.round) / steps

    def note(self, client: int, update: Update, weight: float, delta_norm: float) -> None:
        """Keep what the manifest will say of an update."""
        super().note(client, update, weight, delta_norm)
        self.steps.append(update.record.steps)
        self.ages.append(self.base.number - update.record.round)

    def _reduce(self, reducer: Reducer, name: str, origin: "Arrays | None") -> "dict[str, Array]":
        if name != ADAPTER_FILE:
            return super()._reduce(reducer, name, origin)
        assert isinstance(reducer, WeightedMean)
        sums, scale = reducer.sums(), step_scale(self.weights, self._counted_steps or [1] * len(self.weights))
        for total in sums.values():
            np.multiply(total, scale, out=total)
        return sums

    @property
    def _counted_steps(self) -> list[int] | None:
        return self.steps if self.by_steps else None

    def aggregation(self) -> Aggregation:
        """Return the record of the merge: a weight is what multiplies its difference."""
        found = super().aggregation()
        given = factors(self.weights, steps=self._counted_steps, ages=self.ages)
        counted = [
            entry.model_copy(
                update={
                    "weight": factor,
                    "steps": steps if self.by_steps else entry.steps,
                    "base": self.base.number - age if age else None,
                }
            )
            for entry, factor, steps, age in zip(self.counted, given, self.steps, self.ages, strict=True)
        ]
        return found.model_copy(
            update={
                "counted": sorted(counted, key=lambda entry: (entry.client, entry.base or self.base.number)),
                "refused": sorted(self.refused, key=lambda entry: (entry.client, entry.base or self.base.number)),
                "step_weighting": "fednova" if self.by_steps else None,
            }
        )


def _read(merge: _UnequalMerge, unequal: Unequal, observer: Observer, is_again: bool) -> None:
    """Count the first `count` valid updates; note who was refused, and of the merged round who is missing or came late.

    An earlier round's update that is not whole yet, or not needed, is not spoken of: it may count in a later merge.
    """
    left = None if unequal.most is None else dict(unequal.most)
    num_read = 0
    for (base, client), reading in _read_pairs(unequal.order, unequal.authenticate):
        num_read += 1
        is_own = base.number == merge.base.number
        if left is not None and left.get(client, 0) == 0:
            if is_own:
                (merge.surplus if base.has_update(client) else merge.missing).append(client)
            continue
        _ = merge.adapter  # is read while the threads read the first updates
        try:
            if (update := reading.result()) is None:
                if is_own:
                    merge.missing.append(client)
                continue
            if not is_again:
                check_rows(base, client, update)
                if merge.by_steps:
                    check_steps(base, update)
            merge.reading = base
            merge.add(client, update)
            if left is not None:
                left[client] -= 1
        except Refusal as refusal:
            if isinstance(refusal, Arriving) and not is_again:
                if is_own:
                    merge.missing.append(client)
                continue
            refused = RefusedUpdate.of(client, refusal)
            merge.refused.append(refused if is_own else refused.model_copy(update={"base": base.number}))
        observer.update_read(base.number, client)
        if len(merge.counted) == unequal.count:
            break
    for base, client in unequal.order[num_read:]:
        if base.number == merge.base.number:
            (merge.surplus if base.has_update(client) else merge.missing).append(client)


def _read_pairs(
    sent: Sequence[Sent], authenticate: Callable[[Round], Authenticate | None]
) -> "Iterator[tuple[Sent, Future[Update | None]]]":
    """Yield each update while a thread reads the other of a pair; a pair's memory is the next one's."""
    memory: tuple[dict[str, memoryview], ...] = ({}, {})
    checks: dict[int, Authenticate | None] = {}
    for base, _ in sent:
        if base.number not in checks:
            checks[base.number] = authenticate(base)
    with ThreadPoolExecutor(2) as readers:
        for begin in range(0, len(sent), 2):
            pair = zip(sent[begin : begin + 2], memory, strict=False)  # the last may be alone
            readings = [
                (
                    (base, client),
                    readers.submit(partial(read_update, base, authenticate=checks[base.number]), client, buffers),
                )
                for (base, client), buffers in pair
            ]
            yield from readings
            wait([reading for _, reading in readings])  # one that was passed over may still write to its memory
