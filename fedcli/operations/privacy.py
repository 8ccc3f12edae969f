"""`fedcli privacy`: what the chain of rounds has spent of each client's privacy, and what that is worth."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from fedcli.errors import IntegrityError
from fedcli.parties.party import find_own
from fedcli.quantities import plural
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.floors import budget_of
from fedcli.workspace.history import Round
from fedcli.workspace.privacy_ledger import Budget, describe_unprotected, epsilon_of, read_budget, read_ledger
from fedcli.workspace.privacy_records import PrivacyRecord
from fedcli.workspace.step_ledger import spent

SERVER_OF_CLAIMS = "and for the server, but for updates after the last that counted"
"""A claim covers all steps before it; what the server has read since is in the party's own ledger alone."""


@dataclass(frozen=True)
class ClientPrivacy:
    """What is guaranteed to one client."""

    client: int
    unit: str
    epsilon: float | None
    """At `delta`; None where a round gives no guarantee."""
    delta: float | None
    rounds: list[int]
    """In which it was counted under `unit`."""
    unprotected: list[int]
    """In which it was counted otherwise."""
    is_claim: bool
    """Whether the client claims it of its own training; else it follows from the rounds."""
    budget: Budget | None = None
    """How the open round would stand to max_epsilon; None where there is none, or the client is not in it."""


@dataclass(frozen=True)
class OwnPrivacy:
    """What the ledger in a party's home says that its rows have spent: exact, and told to nobody else."""

    client: int
    ledger: str
    unit: str
    epsilon: float | None
    """At `delta`; None where no finite one holds."""
    delta: float
    steps: int
    rounds: int
    """Of which one that was trained twice counts once."""
    trainings: int
    budget: float | None
    """The least of the round's max_epsilon, its target and the party's own floor; None where there is none."""
    left: float | None


@dataclass(frozen=True)
class PrivacyReport:
    """The whole ledger, from the hash chain."""

    round: int
    unit: str | None
    """Of the latest round; None where it asks for no privacy."""
    relation: str
    clients: list[ClientPrivacy]
    assumptions: list[str]
    sentence: str
    budget: Budget | None = None
    """Of the client that has spent most."""
    secure_aggregation: str | None = None
    own: OwnPrivacy | None = None
    """Of the client that was asked for, where its home is here, and it makes the noise itself."""


def read_privacy(federation: FederationState, client: int | None = None, *, home: Path | None = None) -> PrivacyReport:
    """Return the ledger of all clients, or of one, and then what its own home says where that is here.

    Raises UsageError for an id that no client has, IntegrityError where the chain of rounds or the own ledger is
    damaged, ConfigError where `home` is not the client's.
    """
    rounds = [*federation.past(), federation.head]
    for before, after in pairwise(rounds):
        if after.manifest.parent != before.sha256:
            raise IntegrityError(
                f"{after.folder} does not follow {before.folder}: what was spent cannot be told",
                hint="`fedcli verify` lists all that is wrong.",
            )
    report = privacy_of(rounds)
    if client is None:
        return report
    federation.check_clients([client])
    own = _own(federation, rounds, client, home)
    return replace(report, clients=[each for each in report.clients if each.client == client], own=own)


def _own(federation: FederationState, rounds: Sequence[Round], client: int, home: Path | None) -> OwnPrivacy | None:
    found = find_own(federation, client, home)
    asked = (each.manifest.privacy for each in reversed(rounds))
    privacy = next((each for each in asked if each is not None and each.is_at_party), None)
    if found is None or privacy is None or privacy.delta is None:
        return None
    folder, floors = found
    ledger, budget = spent(folder, privacy.delta), budget_of(floors, privacy)
    epsilon = 0.0 if ledger is None else ledger.epsilon
    return OwnPrivacy(
        client=client,
        ledger=str(folder.steps),
        unit=str(privacy.unit) if ledger is None else ledger.unit,
        epsilon=epsilon if math.isfinite(epsilon) else None,
        delta=privacy.delta,
        steps=0 if ledger is None else ledger.steps,
        rounds=0 if ledger is None else ledger.rounds,
        trainings=0 if ledger is None else ledger.trainings,
        budget=budget if math.isfinite(budget) else None,
        left=max(0.0, budget - epsilon) if math.isfinite(budget) else None,
    )


def privacy_of(rounds: Sequence[Round]) -> PrivacyReport:
    """Return the ledger of rounds that follow each other, from round 0 on."""
    head = rounds[-1].manifest
    asked = head.privacy if head.withholds else _last_asked(rounds)
    unit = None if asked is None else asked.unit
    if unit is None or asked is None:
        clients: list[ClientPrivacy] = []
    else:
        clients = _of_clients(rounds, asked) if asked.is_at_server else _claims(rounds, unit)
    now = head.privacy
    return PrivacyReport(
        round=head.round,
        unit=None if now is None else now.unit,
        relation="add_or_remove_one",
        clients=clients,
        assumptions=_assumptions(unit),
        sentence=_sentence(rounds, unit, clients),
        budget=None if head.state != "open" else read_budget(rounds, head.cohort),
        secure_aggregation=None if now is None else now.secure_aggregation,
    )


def sentence_of(federation: FederationState, number: int) -> str:
    """Return what is guaranteed to whom, of all rounds up to one."""
    rounds = [*federation.past(), federation.head][: number + 1]
    return privacy_of(rounds).sentence


def _last_asked(rounds: Sequence[Round]) -> PrivacyRecord | None:
    return next((each.manifest.privacy for each in reversed(rounds) if each.manifest.withholds), None)


def _of_clients(rounds: Sequence[Round], asked: PrivacyRecord) -> list[ClientPrivacy]:
    assert asked.delta is not None
    delta, is_open = asked.delta, rounds[-1].manifest.state == "open"
    return [
        ClientPrivacy(
            client=client,
            unit="client",
            epsilon=None if spending.unprotected else epsilon_of(spending.precision, delta),
            delta=delta,
            rounds=spending.rounds,
            unprotected=spending.unprotected,
            is_claim=False,
            budget=read_budget(rounds, [client]) if is_open and client in rounds[-1].manifest.cohort else None,
        )
        for client, spending in sorted(read_ledger(rounds).items())
    ]


def _claims(rounds: Sequence[Round], unit: str) -> list[ClientPrivacy]:
    """Return what each client said with its latest counted update that all its steps have spent."""
    found: dict[int, ClientPrivacy] = {}
    for before, after in pairwise(rounds):
        merge = after.manifest.aggregation
        for entry in [] if merge is None else merge.counted:
            last = found.get(entry.client) or ClientPrivacy(entry.client, unit, None, None, [], [], True)
            claim = entry.privacy if entry.privacy is not None and entry.privacy.unit == unit else None
            is_whole = claim is not None and not last.unprotected
            found[entry.client] = ClientPrivacy(
                client=entry.client,
                unit=unit,
                epsilon=claim.epsilon if claim is not None and is_whole else None,
                delta=last.delta if claim is None else claim.delta,
                rounds=last.rounds + [before.number] * (claim is not None),
                unprotected=last.unprotected + [before.number] * (claim is None),
                is_claim=True,
            )
    return [found[client] for client in sorted(found)]


def _assumptions(unit: str | None) -> list[str]:
    if unit is None:
        return []
    noise = "noise in float64 from a ChaCha20 stream: sound in practice, no proof for real numbers"
    chosen = "hyperparameters were not chosen on the same rows; fedcli cannot know"
    if unit == "client":
        return [
            "whoever looks sees the published rounds, and neither inbox/ nor the server's keys of the noise",
            "the cohort is public: no amplification by sampling is counted",
            noise,
            chosen,
        ]
    return [
        "clients do what they claim: nobody can check it from outside",
        "each step draws every unit by itself with one probability, which is counted as amplification",
        noise,
        chosen,
    ]


def _sentence(rounds: Sequence[Round], unit: str | None, clients: Sequence[ClientPrivacy]) -> str:
    """Return what is guaranteed, and to whom, in words that hold."""
    if unit is None:
        return "Nothing here is differentially private."
    if not clients:
        return f"No update has been counted yet; rounds are of unit {unit}."
    if unprotected := sorted({number for client in clients for number in client.unprotected}):
        why = describe_unprotected(unprotected) if unit == "client" else _unclaimed(unprotected)
        return f"Nothing holds for all clients: {why}."
    epsilon = max(client.epsilon or 0.0 for client in clients)
    delta = max(client.delta or 0.0 for client in clients)
    most = max(len(client.rounds) for client in clients)
    what = {"client": "one client", "row": "one row of a client", "group": "all rows of one group of a client"}[unit]
    whom = "and not for the server, which sees each update" if unit == "client" else SERVER_OF_CLAIMS
    claimed = "" if unit == "client" else "By what its clients claim of their training: "
    sampling = "no amplification by sampling is assumed" if unit == "client" else "rows are drawn by Poisson sampling"
    return (
        f"{claimed}({epsilon:.4g}, {delta:g})-differentially private for adding or removing {what}, for everyone who "
        f"sees the published rounds up to {rounds[-1].number}, {whom}; {plural(most, 'round')} of a client at most, "
        f"{sampling}, noise in float64 from a ChaCha20 stream. Whether hyperparameters were chosen on the same rows, "
        "fedcli does not know."
    )


def _unclaimed(numbers: Iterable[int]) -> str:
    return f"an update of round {', '.join(map(str, numbers))} claims nothing"
