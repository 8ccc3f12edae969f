"""The ledger: what the chain of rounds has spent of each client's privacy, unit client."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fedcli.errors import NotReadyError
from fedcli.privacy.accounting import gaussian_epsilon
from fedcli.quantities import plural
from fedcli.workspace.history import Round
from fedcli.workspace.privacy_records import PrivacyRecord

SLACK = 1e-9
"""Relative: what adding up in another order may change of an epsilon."""
MOST_NAMED = 30
"""Rounds that are told one by one."""


@dataclass
class Spending:
    """What one client's rounds have spent."""

    rounds: list[int] = field(default_factory=list)
    """In which it was counted, and noise was added."""
    unprotected: list[int] = field(default_factory=list)
    """In which it was counted, and no noise of unit client was added: there is no guarantee."""
    precision: float = 0.0
    """The sum of z^-2 over its releases: together they are one of this to the power of -1/2."""

    def epsilon(self, delta: float) -> float:
        """Return what is spent at a delta; infinity where a round had no noise."""
        return math.inf if self.unprotected else epsilon_of(self.precision, delta)


def epsilon_of(precision: float, delta: float) -> float:
    """Return the epsilon of releases whose z^-2 add up to `precision`."""
    return gaussian_epsilon(precision**-0.5, delta, 1) if precision else 0.0


def precision_of(privacy: PrivacyRecord, releases: int = 1) -> float:
    """Return what a round of unit client adds to the precision of each client that is counted."""
    assert privacy.noise is not None
    return releases * privacy.noise**-2


def read_ledger(rounds: Sequence[Round]) -> dict[int, Spending]:
    """Return what each client has spent, by id, from rounds that follow each other and begin with round 0."""
    found: dict[int, Spending] = {}
    for before, after in pairwise(rounds):
        merge, privacy = after.manifest.aggregation, before.manifest.privacy
        counted = [] if merge is None else [entry.client for entry in merge.counted]
        noise = None if merge is None else merge.privacy
        is_noisy = privacy is not None and privacy.is_at_server and noise is not None
        for client in counted:
            spending = found.setdefault(client, Spending())
            (spending.rounds if is_noisy else spending.unprotected).append(before.number)
        if is_noisy and privacy is not None and noise is not None:
            releases = noise.releases or 1
            # of the earlier sums nobody but the server knows who was in them
            for client in before.manifest.cohort if releases > 1 else counted:
                found.setdefault(client, Spending()).precision += precision_of(privacy, releases)
    return found


@dataclass(frozen=True)
class Budget:
    """How the round after the latest stands to `max_epsilon`, for the client that has spent most."""

    client: int
    max_epsilon: float
    delta: float
    spent: float
    next: float
    """What will be spent once the open round is merged."""

    @property
    def is_enough(self) -> bool:
        """Whether the open round may be merged."""
        return self.next <= self.max_epsilon * (1 + SLACK)


def read_budget(rounds: Sequence[Round], clients: Iterable[int], releases: int = 1) -> Budget | None:
    """Return how the last of some rounds, which is open, stands to its budget where it counts these clients.

    None where it has none, or counts nobody. A round without noise before counts for nothing here: what has no
    guarantee cannot lose it.
    """
    privacy = rounds[-1].manifest.privacy
    clients = list(clients)
    if privacy is None or not privacy.is_at_server or privacy.max_epsilon is None or not clients:
        return None
    assert privacy.delta is not None
    delta, ledger = privacy.delta, read_ledger(rounds)
    spent = {client: ledger.get(client, Spending()).precision for client in clients}
    client = max(spent, key=lambda each: spent[each])
    following = spent[client] + precision_of(privacy, releases)
    return Budget(client, privacy.max_epsilon, delta, epsilon_of(spent[client], delta), epsilon_of(following, delta))


def check_budget(rounds: Sequence[Round], clients: Iterable[int], releases: int = 1) -> None:
    """Raise NotReadyError where merging the open round would spend more than its max_epsilon."""
    budget = read_budget(rounds, clients, releases)
    if budget is None or budget.is_enough:
        return
    raise NotReadyError(
        f"round {rounds[-1].number} would pass privacy.max_epsilon: {describe_budget(budget)}",
        hint=f"The federation ends here: its adapter is that of round {rounds[-1].number}. A larger max_epsilon in "
        "fedcli.yaml holds for rounds that are opened after this one alone.",
    )


def check_any_budget(rounds: Sequence[Round], clients: Sequence[int]) -> None:
    """Raise NotReadyError where the open round may count none of some clients: all have used up its max_epsilon."""
    budgets = (read_budget(rounds, [client]) for client in clients)
    if clients and all(budget is not None and not budget.is_enough for budget in budgets):
        check_budget(rounds, clients)


def describe_budget(budget: Budget) -> str:
    """Return what is spent, what the open round costs, and what is left."""
    left = max(0.0, budget.max_epsilon - budget.spent)
    return (
        f"client {budget.client} has spent epsilon {budget.spent:.4g} of {budget.max_epsilon:g} at delta "
        f"{budget.delta:g}, this round costs {budget.next - budget.spent:.4g} and makes it {budget.next:.4g}, "
        f"{left:.4g} is left"
    )


def describe_unprotected(rounds: Sequence[int]) -> str:
    """Return which rounds give no guarantee."""
    return f"no guarantee: {_named(rounds)} {'was' if len(rounds) == 1 else 'were'} merged without noise"


def describe_rounds(rounds: Sequence[int]) -> str:
    """Return in how many rounds a client was counted."""
    return plural(len(rounds), "round") + (f" ({_named(rounds)})" if rounds else "")


def _named(rounds: Sequence[int]) -> str:
    """Return rounds by their numbers, the first thirty of them."""
    shown = ", ".join(map(str, rounds[:MOST_NAMED]))
    more = f" and {len(rounds) - MOST_NAMED} more" if len(rounds) > MOST_NAMED else ""
    return f"{'round' if len(rounds) == 1 else 'rounds'} {shown}{more}"
