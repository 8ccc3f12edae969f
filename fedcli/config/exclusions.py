"""What cannot stand together in fedcli.yaml, and why: one table, whose rows name both keys.

A condition is a dotted key: it holds where the key has another value than its default, or with `key: a|b` one of these
values. What an algorithm brings along is a key, too: `algorithm.state_prefixes`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fedcli.config.section import Section

if TYPE_CHECKING:
    from fedcli.config.sections import Config


class Exclusion(NamedTuple):
    """Two conditions that exclude each other."""

    first: str
    second: str
    why: str


_BELIEVES = "a rule that tolerates hostile updates cannot go by the number of steps that each of them tells of itself"

_SIDE_BY_SIDE = "it looks at one round's updates side by side, as differences from one adapter"

EXCLUSIONS: tuple[Exclusion, ...] = (
    *(
        Exclusion("aggregation.step_weighting", other, why)
        for other, why in (
            ("aggregation.rule", _BELIEVES),
            ("aggregation.nearest_mixing", _BELIEVES),
            (
                "privacy.unit: client",
                "a clipped difference that its steps scale may move the sum by more than the clip",
            ),
            ("privacy.secure_aggregation", "the server does not see how many steps a masked update has made"),
            ("federation.relay_every", "a region sends its parent the mean of its updates by rows alone"),
        )
    ),
    Exclusion(
        "train.minutes",
        "privacy.unit",
        "how many steps fit into a time limit depends on the rows, which noise must hide",
    ),
    Exclusion("train.minutes", "privacy.secure_aggregation", "a masked update does not say how many steps it has made"),
    Exclusion("train.minutes", "federation.relay_every", "a region tells its parent the steps that its rounds ask for"),
    *(
        Exclusion("aggregation.staleness", other, why)
        for other, why in (
            ("aggregation.rule", _SIDE_BY_SIDE),
            ("aggregation.nearest_mixing", _SIDE_BY_SIDE),
            ("aggregation.weight_cap", _SIDE_BY_SIDE),
            ("algorithm.update_files", "what clients send beside the adapter belongs to the round that it was made in"),
            ("privacy.unit", "what a client has spent is counted by the rounds whose own updates were merged"),
            ("privacy.secure_aggregation", "masks of different rounds do not cancel"),
            ("federation.relay_every", "a region begins anew from each round of its parent"),
        )
    ),
)


_TOLD_AS = {"train.minutes": "train.steps"}
"""Conditions that are no keys, and the keys that they are told as."""


def excluded(config: "Config", plain: "Config") -> Iterator[str]:
    """Yield what is to be told of each pair that stands in a configuration; `plain` has every key's default."""
    for first, second, why in EXCLUSIONS:
        if holds(config, plain, first) and holds(config, plain, second):
            yield f"{_told(config, first)} and {_told(config, second)} exclude each other: {why}"


def holds(config: "Config", plain: "Config", condition: str) -> bool:
    """Return whether a condition holds."""
    key, _, values = condition.partition(": ")
    found = _value(config, key)
    return str(found) in values.split("|") if values else found != _value(plain, key)


def _value(config: "Config", key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _told(config: "Config", condition: str) -> str:
    """Return a key with its value, as fedcli.yaml has it."""
    key = condition.partition(": ")[0]
    if key.startswith("algorithm."):
        key = "algorithm.name"
    key = _TOLD_AS.get(key, key)
    found = _value(config, key)
    return f"{key}: {found.model_dump() if isinstance(found, Section) else found}"
