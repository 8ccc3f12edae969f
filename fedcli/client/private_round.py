"""A round at the party's own privacy: what it costs, whether that is still within the budget, and what is claimed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fedcli.errors import ConfigError, IntegrityError, NotReadyError
from fedcli.parties.party import Party
from fedcli.privacy.accounting import MOST_NOISE, poisson_epsilon, poisson_noise
from fedcli.trust.history import read_history
from fedcli.workspace.floors import budget_of
from fedcli.workspace.history import Round
from fedcli.workspace.privacy_records import PrivacyClaim, PrivacyRecord, TargetRecord
from fedcli.workspace.records import Manifest
from fedcli.workspace.step_ledger import PartyUnit, StepsRecord, check_one_unit, events_of, now, read_steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedcli.data.encoded import EncodedRows
    from fedcli.training.dp_sgd import Protection

Events = list[tuple[float, float, int]]


@dataclass(frozen=True)
class PrivateSteps:
    """How a party's steps of one round are made, and what they cost."""

    record: StepsRecord
    claim: PrivacyClaim

    @property
    def group_by(self) -> str | None:
        """The column that tells groups; None where each row is protected by itself."""
        return self.record.group_by

    @property
    def q(self) -> float:
        """How likely each unit is in a step's batch."""
        return self.record.q

    @property
    def protection(self) -> "Protection":
        """The clip and the noise multiplier."""
        from fedcli.training.dp_sgd import Protection

        return Protection(self.record.clip, self.record.noise)

    def units(self, rows: "EncodedRows") -> "Sequence[NDArray[np.int64]]":
        """Return the rows of each unit, by their places."""
        return units_of(rows, self.group_by)


def units_of(rows: "EncodedRows", group_by: str | None) -> "Sequence[NDArray[np.int64]]":
    """Return the places of each unit's rows: of one row, or of all rows of a group."""
    import numpy as np

    return rows.groups() if group_by is not None else list(np.arange(len(rows)).reshape(-1, 1))


def plan_private(party: Party, head: Round, past: Sequence[Round], rows: "EncodedRows") -> PrivateSteps:
    """Return how a party protects its rows or groups in the open round.

    Raises NotReadyError where the round would pass the budget, ConfigError where rounds before had no such protection
    or this one asks for what would tell of rows beside it, IntegrityError where the party's ledger lacks rounds.
    """
    manifest = head.manifest
    privacy = _at_party(manifest)
    assert privacy is not None
    _check_noise_hides(manifest)
    unit: PartyUnit = "group" if privacy.unit == "group" else "row"
    made = read_steps(party.home)
    check_one_unit(party.home, made, unit, privacy.group_by)
    _check_past(party, [*past, head], made)
    assert privacy.clip is not None
    assert privacy.delta is not None
    num_units = len(units_of(rows, privacy.group_by))
    q = min(1.0, manifest.train.batch_size / num_units)
    before, steps = events_of(made), manifest.train.steps
    noise = privacy.noise
    if noise is None:
        assert privacy.target is not None
        noise = _calibrated(before, made, privacy.target, q, steps * (manifest.rounds - head.number))
        noise = max(noise, party.floors.noise or 0.0)  # of a noise that the round sets the floor has been checked
    budget = budget_of(party.floors, privacy)
    after = _epsilon([*before, (q, noise, steps)], privacy.delta)
    if after > budget:
        spent = _epsilon(before, privacy.delta)
        raise NotReadyError(
            f"client {party.client} does not train round {head.number}: its {unit}s have spent epsilon {spent:.4g} of "
            f"{budget:.4g} (delta {privacy.delta:g}), {max(0.0, budget - spent):.4g} is left, and the round costs "
            f"{after - spent:.4g}",
            hint="Its privacy budget is used up. The round goes on without it: its server merges with `fedcli server "
            "aggregate --partial`, or by federation.quorum; or more noise, or fewer steps, cost less.",
        )
    record = StepsRecord(
        time=now(),
        round=head.number,
        manifest=head.sha256,
        unit=unit,
        group_by=privacy.group_by,
        num_units=num_units,
        q=q,
        clip=privacy.clip,
        noise=noise,
        steps=steps,
    )
    return PrivateSteps(record, PrivacyClaim(unit=unit, epsilon=_claimed(after, budget), delta=privacy.delta))


def _check_noise_hides(manifest: Manifest) -> None:
    """Raise ConfigError where an update would tell of rows past the noise; fedcli.yaml excludes it, a server might not.

    That is the choice of a cluster by loss, and how many steps fit into a time limit or a pass over the rows. An
    adapter of the client's own would learn the rows without noise.
    """
    clusters, train = manifest.clusters, manifest.train
    odd = {
        "clusters.by: loss": clusters is not None and clusters.of is None,
        "train.minutes": train.minutes is not None,
        "train.epochs": train.epochs is not None,
        "train.personal": train.personal is not None,
    }
    if found := [name for name, is_asked in odd.items() if is_asked]:
        raise ConfigError(
            f"round {manifest.round} asks for {found[0]} beside a privacy.unit of rows or groups, whose noise does not "
            "cover that: it is not trained",
            hint="Ask the server's operator: fedcli.yaml allows no such round.",
        )


def _at_party(manifest: Manifest) -> PrivacyRecord | None:
    privacy = manifest.privacy
    return privacy if privacy is not None and privacy.is_at_party else None


def _epsilon(events: Events, delta: float) -> float:
    """Return the epsilon of steps together; raise ConfigError where it is not finite."""
    epsilon = poisson_epsilon(events, delta)
    if not math.isfinite(epsilon):
        raise ConfigError(
            f"privacy: no finite epsilon holds for these steps at delta {delta:g}: their noise hides nothing",
            hint="Set privacy.noise to 0.5 or more; it takes effect with the next round that is opened.",
        )
    return epsilon


def _claimed(epsilon: float, budget: float) -> float:
    """Return what is told of an epsilon: rounded up to two digits, for all of them tell how many rows there are."""
    if epsilon <= 0:
        return min(1e-3, budget)
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 1)
    rounded = math.ceil(epsilon / unit) * unit
    return min(float(f"{rounded:.2g}") if float(f"{rounded:.2g}") >= epsilon else rounded, budget)


def _calibrated(before: Events, made: Sequence[StepsRecord], target: TargetRecord, q: float, steps_left: int) -> float:
    """Return the noise multiplier with which all steps so far and those that are left spend no more than the target.

    It stays the same from round to round, and grows where more was spent than was planned for, as by trainings that
    were killed.
    """

    if not made:
        return poisson_noise(target.epsilon, target.delta, q, steps_left)
    noise = made[-1].noise
    if poisson_epsilon([*before, (q, noise, steps_left)], target.delta) <= target.epsilon:
        return noise
    if poisson_epsilon([*before, (q, MOST_NOISE, steps_left)], target.delta) > target.epsilon:
        return noise  # nothing is left, as the budget tells
    return poisson_noise(target.epsilon, target.delta, q, steps_left, spent=before, start=noise)


def _check_past(party: Party, rounds: Sequence[Round], made: Sequence[StepsRecord]) -> None:
    """Raise where an update of an earlier round protected nobody at the party, or is not in its ledger.

    Those are the counted ones, and those that the party has sent: a server reads what it refuses or discards, too.
    """
    known = {record.manifest for record in made}
    sent = {line.get("manifest") for line in read_history(party.home.history) if line.get("event") == "sent"}
    for current, closing in pairwise(rounds):
        aggregation = closing.manifest.aggregation
        counted = set() if aggregation is None else {entry.client for entry in aggregation.counted}
        if party.client not in counted and current.sha256 not in sent:
            continue
        if _at_party(current.manifest) is None:
            raise ConfigError(
                f"client {party.client}'s update of round {current.number} was made without noise at the party: what "
                "its rows have spent since is without bound, whatever later rounds add",
                hint="Begin a new workspace whose fedcli.yaml has the section privacy from round 0 on.",
            )
        if current.sha256 not in known:
            raise IntegrityError(
                f"{party.home.steps} does not have client {party.client}'s steps of round {current.number}, whose "
                "update was sent: what its rows have spent cannot be told",
                hint="Restore it from a backup, or name the home that it lies in: --home DIR.",
            )
