"""What cannot stand together in fedcli.yaml, and why: one table, whose rows name both keys.

A condition is a dotted key: it holds where the key has another value than its default, or with `key: a|b` one of these
values. What an algorithm brings along is a key, too: `algorithm.state_prefixes`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedcli.config.sections import Config


class Exclusion(NamedTuple):
    """Two conditions that exclude each other."""

    first: str
    second: str
    why: str


_STATEFUL = "the server's state belongs to one adapter"
EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion("clusters.by", "algorithm.state_prefixes", _STATEFUL),
    Exclusion("clusters.by", "algorithm.update_files", "what a client sends beside its adapter belongs to one adapter"),
    Exclusion("clusters.by", "aggregation.rule", "a cluster may have fewer updates than the rule needs"),
    Exclusion("clusters.by", "aggregation.nearest_mixing", "a cluster may have fewer updates than it needs"),
    Exclusion("clusters.by", "aggregation.weight_cap", "a cluster may have too few updates for a median"),
    Exclusion("clusters.by", "federation.select", "the first that answer count, whatever their clusters"),
    Exclusion("clusters.by", "federation.relay_every", "a region sends its parent one adapter"),
    Exclusion("clusters.by", "privacy.secure_aggregation", "masks cancel in the sum of all clients alone"),
    Exclusion("clusters.by", "privacy.unit: client", "noise is made for the sum of all clients"),
    Exclusion("clusters.by", "aggregation.encoding", "the server sends one adapter's differences"),
    Exclusion("clusters.by: loss", "privacy.unit", "the choice of a cluster tells of rows, without noise"),
    Exclusion("clusters.by", "eval.every", "a round has several adapters: score them with `fedcli eval`"),
    Exclusion(
        "aggregation.encoding",
        "privacy.secure_aggregation",
        "masked numbers add up to a sum only in full, 8 bytes each, and what is encoded has scales of its own",
    ),
    Exclusion(
        "aggregation.encoding: top_k",
        "aggregation.rule: median|trimmed_mean",
        "of each number most updates send nothing, so that its middle is zero: take int8, or another rule",
    ),
)


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
    return f"{key}: {_value(config, key)}"
