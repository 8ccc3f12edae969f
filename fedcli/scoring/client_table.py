"""Clients' own adapters side by side: their mean, the worst client, and the gain over the global one and alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedcli.workspace.target_name import TargetName


@dataclass(frozen=True)
class Gain:
    """By how much own adapters are better than others, client by client: the mean, and the client with the least."""

    mean: float
    worst: float
    worst_client: int
    num_clients: int


@dataclass(frozen=True)
class ClientRow:
    """A metric of all own adapters of a round; more is better in gains, whatever the metric."""

    metric: str
    round: int
    num_clients: int
    mean: float
    worst: float
    worst_client: int
    over_global: Gain | None
    """None where the round has not been scored."""
    over_alone: Gain | None
    """Of the clients that trained alone and were scored; None where there is none."""


def client_rows(metric: str, scores: Mapping[TargetName, float], *, higher_is_better: bool) -> list[ClientRow]:
    """Return what a metric says of clients' own adapters, a row for each round that they stood with."""
    sign = 1.0 if higher_is_better else -1.0
    own: dict[int, dict[int, float]] = {}
    for name, value in scores.items():
        if name.kind == "own" and name.client is not None and name.round is not None:
            own.setdefault(name.round, {})[name.client] = value
    rows = []
    for number, by_client in sorted(own.items()):
        worst = min(by_client, key=lambda client: (sign * by_client[client], client))
        rows.append(
            ClientRow(
                metric,
                number,
                len(by_client),
                sum(by_client.values()) / len(by_client),
                by_client[worst],
                worst,
                _gain(by_client, dict.fromkeys(by_client, scores.get(TargetName.of_round(number))), sign),
                _gain(by_client, {each: scores.get(TargetName("alone", str(each))) for each in by_client}, sign),
            )
        )
    return rows


def _gain(by_client: Mapping[int, float], others: Mapping[int, float | None], sign: float) -> Gain | None:
    gains = {}
    for client, value in by_client.items():
        if (compared := others[client]) is not None:
            gains[client] = sign * (value - compared)
    if not gains:
        return None
    worst = min(gains, key=lambda client: (gains[client], client))
    return Gain(sum(gains.values()) / len(gains), gains[worst], worst, len(gains))


HEAD = ("metric", "round", "clients", "mean", "worst", "over global: mean", "worst", "over alone: mean", "worst")


def as_cells(rows: Sequence[ClientRow]) -> list[list[str]]:
    """Return the rows as texts under HEAD."""
    return [
        [
            row.metric,
            str(row.round),
            str(row.num_clients),
            f"{row.mean:.3f}",
            f"{row.worst:.3f} (client {row.worst_client})",
            *_shown(row.over_global),
            *_shown(row.over_alone),
        ]
        for row in rows
    ]


def _shown(gain: Gain | None) -> tuple[str, str]:
    return ("", "") if gain is None else (f"{gain.mean:+.3f}", f"{gain.worst:+.3f} (client {gain.worst_client})")


def as_documents(rows: Sequence[ClientRow]) -> list[dict[str, Any]]:
    """Return the rows as JSON values."""
    return [asdict(row) for row in rows]
