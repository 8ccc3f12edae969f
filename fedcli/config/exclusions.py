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


_STATEFUL = "the server's state belongs to one adapter"
_PRODUCTS = "aggregation.lora: product|exact"
_NEW_GAUGE = "the factors are new ones after each merge, and what a server or a client keeps of them means nothing then"
_NO_UPDATES = "products are made of each client's factors, and the server sees their sum alone"
_NOISY_MEAN = "the noise is that of a bounded mean of factors, and this is none"
_REGION = "a region sends its parent the mean of its updates' factors by rows"
_ONE_SHAPE = "the clients' updates differ in shape"
_BELIEVES = "a rule that tolerates hostile updates cannot go by the number of steps that each of them tells of itself"
_SIDE_BY_SIDE = "it looks at one round's updates side by side, as differences from one adapter"
_LORA_RULES = (_PRODUCTS, "aggregation.lora_weights: norm", "aggregation.lora_fair", "aggregation.lora_error")

_TABLE: dict[tuple[str, ...], dict[str, str]] = {
    ("clusters.by",): {
        "algorithm.state_prefixes": _STATEFUL,
        "algorithm.update_files": "what a client sends beside its adapter belongs to one adapter",
        "aggregation.rule": "a cluster may have fewer updates than the rule needs",
        "aggregation.nearest_mixing": "a cluster may have fewer updates than it needs",
        "aggregation.weight_cap": "a cluster may have too few updates for a median",
        "federation.select": "the first that answer count, whatever their clusters",
        "federation.relay_every": "a region sends its parent one adapter",
        "privacy.secure_aggregation": "masks cancel in the sum of all clients alone",
        "privacy.unit: client": "noise is made for the sum of all clients",
        "aggregation.encoding": "the server sends one adapter's differences",
        "eval.every": "a round has several adapters: score them with `fedcli eval`",
        "aggregation.step_weighting": "each cluster has the mean by rows",
        "aggregation.staleness": "a client's cluster may be another by then",
        "aggregation.share: [A]": "a client's own factors belong to one global adapter's",
        "aggregation.private": "what is a client's own belongs to one global adapter",
        "train.personal": "an adapter of a client's own stands beside one global adapter",
    },
    ("clusters.by: loss",): {
        "privacy.unit": "the choice of a cluster tells of rows, without noise",
        "task: kto|grpo": "a row's loss is not its own: it depends on other rows or answers",
    },
    ("task: grpo",): {
        "train.minutes": "trl's trainer makes the steps, and does not stop before the last",
        "train.keep_optimizer": "trl's trainer makes the steps, with an AdamW of its own",
    },
    ("aggregation.encoding",): {
        "privacy.secure_aggregation": (
            "masked numbers add up to a sum only in full, 8 bytes each, and what is encoded has scales of its own"
        ),
    },
    ("aggregation.encoding: top_k",): {
        "aggregation.rule: median|trimmed_mean": (
            "of each number most updates send nothing, so that its middle is zero: take int8, or another rule"
        ),
    },
    _LORA_RULES: {
        "aggregation.rule": "the rule takes the place of the mean that this one is made of",
        "aggregation.nearest_mixing": "mixing makes means of updates, and this one is made of single ones",
        "privacy.secure_aggregation": _NO_UPDATES,
        "privacy.unit: client": _NOISY_MEAN,
        "aggregation.share": "where one factor is common to all, the mean of the other is exact",
        "aggregation.private": "a product needs both factors of each module",
        "clusters.by": "it is made for one adapter",
        "aggregation.step_weighting": "it weighs products, and the other differences of factors",
        "aggregation.staleness": "it is made of the factors of updates of one round",
    },
    (_PRODUCTS,): {
        "algorithm.state_prefixes": _NEW_GAUGE,
        "algorithm.private_state": _NEW_GAUGE,
        "algorithm.update_files": _NEW_GAUGE,
        "train.personal": "an adapter of a client's own stands beside the mean of the factors",
        "aggregation.encoding": "the factors are new ones after each merge, and no small difference",
        "federation.relay_every": _REGION,
    },
    ("aggregation.lora: product",): {
        "train.keep_optimizer": _NEW_GAUGE,
    },
    ("aggregation.lora_fresh",): {
        "train.keep_optimizer": _NEW_GAUGE,
    },
    ("aggregation.lora_weights: norm",): {
        "federation.relay_every": _REGION,
        "privacy.unit": "the weights would tell how far each client moved",
    },
    ("aggregation.lora_fair",): {
        "federation.relay_every": _REGION,
        "algorithm.update_files": "control variates follow the mean of the factors",
    },
    ("adapter.is_mixed: True",): {
        **dict.fromkeys(
            (
                "aggregation.rule",
                "aggregation.encoding",
                "clusters.by",
                "aggregation.share",
                "aggregation.private",
                "train.personal",
                "aggregation.nearest_mixing",
                "privacy.secure_aggregation",
                "privacy.unit: client",
                "federation.relay_every",
                "algorithm.update_files",
                "algorithm.private_state",
                "aggregation.step_weighting",
                "aggregation.staleness",
            ),
            _ONE_SHAPE,
        ),
        "aggregation.keeps_residual: True": (
            "factors of several ranks have no mean. Set lora_fresh, which needs none, or lora to product"
        ),
    },
    ("aggregation.staleness",): {
        "aggregation.share: alternate": "updates of two rounds carry different factors",
        "aggregation.encoding: top_k": (
            "what an update left out is known once it has counted, and the client trains on before that"
        ),
        "aggregation.rule": _SIDE_BY_SIDE,
        "aggregation.nearest_mixing": _SIDE_BY_SIDE,
        "aggregation.weight_cap": _SIDE_BY_SIDE,
        "algorithm.update_files": "what clients send beside the adapter belongs to the round that it was made in",
        "privacy.unit": "what a client has spent is counted by the rounds whose own updates were merged",
        "privacy.secure_aggregation": "masks of different rounds do not cancel",
        "federation.relay_every": "a region begins anew from each round of its parent",
    },
    ("aggregation.share: [A]",): {
        "train.personal": (
            "each gives a client an adapter of its own, and eval, chat and export would have two to choose from"
        ),
        "eval.every": (
            "clients keep a B of their own, so that no round has a global adapter to score; fedcli eval --client "
            "scores theirs"
        ),
    },
    ("aggregation.private",): {
        "train.personal": (
            "each gives a client an adapter of its own, and eval, chat and export would have two to choose from"
        ),
        "eval.every": (
            "clients keep a part to themselves, so that no round has a global adapter to score; fedcli eval "
            "--client scores theirs"
        ),
        "federation.relay_every": "a region sends its parent whole adapters (docs/HIERARCHY.md)",
    },
    ("aggregation.share",): {
        "federation.relay_every": "a region sends its parent whole adapters (docs/HIERARCHY.md)",
    },
    ("train.personal",): {
        "federation.relay_every": (
            "a region's parties train as the parent's rounds ask: set train.personal there (docs/HIERARCHY.md)"
        ),
        "privacy.unit: row|group": (
            "the second adapter would learn the same rows without noise, and what it answers would tell of them"
        ),
    },
    ("aggregation.step_weighting",): {
        "aggregation.rule": _BELIEVES,
        "aggregation.nearest_mixing": _BELIEVES,
        "privacy.unit: client": "a clipped difference that its steps scale may move the sum by more than the clip",
        "privacy.secure_aggregation": "the server does not see how many steps a masked update has made",
        "federation.relay_every": "a region sends its parent the mean of its updates by rows alone",
    },
    ("train.minutes",): {
        "privacy.unit": "how many steps fit into a time limit depends on the rows, which noise must hide",
    },
    ("train.epochs",): {
        "privacy.unit": "how many steps a client makes depends on how many rows it has, which noise must hide",
    },
    ("train.minutes", "train.epochs"): {
        "privacy.secure_aggregation": "a masked update does not say how many steps it has made",
        "federation.relay_every": "a region tells its parent the steps that its rounds ask for",
    },
}
EXCLUSIONS = tuple(
    Exclusion(first, second, why)
    for firsts, others in _TABLE.items()
    for first in firsts
    for second, why in others.items()
)
_SHOWN = {
    "train.minutes": "train.steps",
    "train.epochs": "train.steps",
    "adapter.is_mixed": "adapter.rank",
    "aggregation.keeps_residual": "aggregation.lora",
}
"""Keys of fedcli.yaml in whose place a condition looks at what follows from them."""


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
    key = _SHOWN.get(key, key)
    if key.startswith("algorithm."):
        key = "algorithm.name"
    found = _value(config, key)
    if isinstance(found, Section):
        given = found.model_dump(exclude_unset=True)
        found = f"{{{', '.join(f'{name}: {value}' for name, value in given.items())}}}"
    elif isinstance(found, dict):
        found = f"{{{', '.join(f'{name}: {value}' for name, value in found.items())}}}"
    elif isinstance(found, tuple):
        found = f"[{', '.join(map(str, found))}]"
    return f"{key}: {found}"
