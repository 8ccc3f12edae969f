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
    Exclusion("clusters.by: loss", "privacy.unit", "the choice of a cluster tells of rows, without noise"),
    Exclusion("clusters.by", "eval.every", "a round has several adapters: score them with `fedcli eval`"),
    Exclusion(
        "aggregation.share: [A]",
        "train.personal",
        "each gives a client an adapter of its own, and eval, chat and export would have two to choose from",
    ),
    Exclusion(
        "aggregation.share: [A]",
        "eval.every",
        "clients keep a B of their own, so that no round has a global adapter to score; fedcli eval --client scores "
        "theirs",
    ),
    Exclusion(
        "aggregation.private",
        "train.personal",
        "each gives a client an adapter of its own, and eval, chat and export would have two to choose from",
    ),
    Exclusion(
        "aggregation.private",
        "eval.every",
        "clients keep a part to themselves, so that no round has a global adapter to score; fedcli eval --client "
        "scores theirs",
    ),
    Exclusion(
        "aggregation.private",
        "federation.relay_every",
        "a region sends its parent whole adapters (docs/HIERARCHY.md)",
    ),
    Exclusion(
        "aggregation.share",
        "federation.relay_every",
        "a region sends its parent whole adapters (docs/HIERARCHY.md)",
    ),
    Exclusion(
        "train.personal",
        "federation.relay_every",
        "a region's parties train as the parent's rounds ask: set train.personal there (docs/HIERARCHY.md)",
    ),
    Exclusion(
        "train.personal",
        "privacy.unit: row|group",
        "the second adapter would learn the same rows without noise, and what it answers would tell of them",
    ),
    Exclusion("clusters.by", "aggregation.share: [A]", "a client's own factors belong to one global adapter's"),
    Exclusion("clusters.by", "aggregation.private", "what is a client's own belongs to one global adapter"),
    Exclusion("clusters.by", "train.personal", "an adapter of a client's own stands beside one global adapter"),
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
