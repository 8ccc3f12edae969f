"""A party's floors: the least that a round must ask for before the party trains on it; its home keeps them.

An update of one row tells that row, and so does one of the layers that read or write tokens (Zhu et al. 2019, Deep
Leakage from Gradients; Fowl et al. 2022). Floors refuse such rounds; they are no guarantee of privacy. Another floor is
a field of `Floors` and an entry of `_FLOORS`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from fedcli.config.sections import ModuleName
from fedcli.errors import ConfigError, UsageError, did_you_mean
from fedcli.quantities import plural
from fedcli.workspace.privacy_records import PrivacyRecord
from fedcli.workspace.records import Manifest
from fedcli.workspace.train_records import TrainRecord

_NUMBERED = re.compile(r"\.\d+\.")
USUAL_DELTA = 1e-5
_LAYER = re.compile(r"(?:base_model\.model\.)?(?P<name>.+?)\.lora_[A-Za-z_]+(?:\.weight)?")


def _names(value: Any) -> Any:
    """Return names that are separated by commas as a list; a single word that has a meaning as it is."""
    if not isinstance(value, str) or value in ("layers", "any"):
        return value
    return [name.strip() for name in value.split(",")]


Count: TypeAlias = Annotated[int, Field(ge=1)]
Number: TypeAlias = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    BeforeValidator(lambda value: None if value == "none" else value),
]
Targets: TypeAlias = Annotated[
    Literal["layers", "any"] | Annotated[tuple[ModuleName, ...], Field(min_length=1)], BeforeValidator(_names)
]


class Floors(BaseModel):
    """What a party insists on. A key that this version does not know is an error: it may be one that protects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Count = 2
    """Different rows that a round learns from: steps x a batch's rows, or all of the party's where it has fewer."""
    steps: Count = 1
    batch_size: Count = 1
    secure: Literal["any", "required", "double"] = "any"
    """Whether what it sends must be masked: any way, or so that a server that lies learns nothing either."""
    targets: Targets = "layers"
    """Where LoRA may lie: in the numbered layers alone (no embedding, no head), those of these names, or anywhere."""
    noise: Number = None
    """The least noise multiplier that a round's privacy asks for; None: it need not ask for any, as the two below."""
    clip: Number = None
    """The most that one unit may move a sum."""
    max_epsilon: Number = None
    """The most that a round's privacy may let the party spend; of unit client it counts the rounds itself."""
    delta: Number = None
    """The most that epsilon is told for; None: USUAL_DELTA where there is a floor max_epsilon."""

    @model_serializer(mode="wrap")
    def _without_unwritten(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if getattr(self, key) != getattr(USUAL_FLOORS, key)}


USUAL_FLOORS = Floors()
"""They are not kept in a home: a later version may ask for more."""


@dataclass(frozen=True)
class Asked:
    """A round as a party's floors see it."""

    round: int
    train: TrainRecord
    tensors: tuple[str, ...]
    """The names of the tensors that the party would send."""
    num_rows: int
    """The party's."""
    privacy: PrivacyRecord | None = None
    secure: str | None = None
    """How what it sends is masked; None where it is not."""

    @classmethod
    def by(cls, manifest: Manifest, num_rows: int, train: TrainRecord | None = None) -> "Asked":
        """Return what a manifest asks of a party with so many rows; `train` is there where that is not as it says."""
        secure = manifest.secure_aggregation if train is None else None  # a baseline is sent as it is
        tensors = tuple(manifest.sent_tensors)
        return cls(manifest.round, train or manifest.train, tensors, num_rows, manifest.privacy, secure)


@dataclass(frozen=True)
class _Floor:
    """How a floor is checked: what a round asks for that is not allowed; None where it may."""

    fault: Callable[[Any, Asked], str | None]
    allow: Callable[[Any, Asked], str]
    """The value of the option that would allow it, and what was allowed before."""


def _least(what: str, unit: str, value: Callable[[Asked], int]) -> _Floor:
    def fault(limit: int, asked: Asked) -> str | None:
        found = value(asked)
        return None if found >= limit else f"{what} {plural(found, unit)}, and your floor is {limit}"

    return _Floor(fault, lambda _, asked: str(value(asked)))


def _odd(allowed: Any, asked: Asked) -> list[str]:
    return sorted({name for name in map(_layer, asked.tensors) if not _may(allowed, name)})


def _fault_of_targets(allowed: Any, asked: Asked) -> str | None:
    if not (odd := _odd(allowed, asked)):
        return None
    shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    inside = "the numbered layers alone" if allowed == "layers" else ", ".join(allowed)
    return f"adapts {shown}, and your floor allows {inside}"


def _allow_targets(allowed: Any, asked: Asked) -> str:
    if _odd("layers", asked):
        return "any"
    ends = [name.rpartition(".")[2] for name in _odd(allowed, asked)]
    return ",".join(dict.fromkeys([*allowed, *ends]))


def _may(allowed: Any, name: str) -> bool:
    if allowed == "any":
        return True
    if _NUMBERED.search(name) is None:
        return False  # whatever else it is named, it may read or write tokens
    return allowed == "layers" or f".{name}".endswith(tuple(f".{end}" for end in allowed))


_MASKED = {"any": (None, "pairwise", "double"), "required": ("pairwise", "double"), "double": ("double",)}


def _fault_of_secure(wanted: str, asked: Asked) -> str | None:
    if asked.secure in _MASKED[wanted]:
        return None
    how = "unmasked" if asked.secure is None else f"masked {asked.secure}"
    return f"sends what was learnt {how}, and your floor is secure={wanted}"


def _layer(tensor: str) -> str:
    match = _LAYER.fullmatch(tensor)
    return match["name"] if match else tensor


def _limited(what: str, value: Callable[[PrivacyRecord], float | None], *, is_least: bool) -> _Floor:
    """Return the floor of a number of a round's privacy; a round that does not have it is below."""

    def fault(limit: float | None, asked: Asked) -> str | None:
        if limit is None:
            return None
        privacy, bound = asked.privacy, "at least" if is_least else "at most"
        found = None if privacy is None or privacy.unit is None else value(privacy)
        if found is None:
            says = "asks for no privacy" if privacy is None or privacy.unit is None else f"sets no {what}"
            return f"{says}, and your floor is {what} {bound} {limit:g}"
        if found >= limit if is_least else found <= limit:
            return None
        return f"asks for {what} {found:g}, and your floor is {bound} {limit:g}"

    def allow(limit: float | None, asked: Asked) -> str:
        found = None if asked.privacy is None or asked.privacy.unit is None else value(asked.privacy)
        return "none" if found is None else f"{found:.17g}"

    return _Floor(fault, allow)


def _noise(privacy: PrivacyRecord) -> float | None:
    """Return the noise multiplier; infinity of a target, by which the party makes its own noise, and checks that."""
    return math.inf if privacy.is_at_party and privacy.target is not None else privacy.noise


def _most_epsilon(privacy: PrivacyRecord) -> float | None:
    """Return what may be spent; 0 where the party makes the noise: it counts what it spends, and stops by itself."""
    if privacy.is_at_party:
        return 0.0
    return privacy.max_epsilon


def budget_of(floors: Floors, privacy: PrivacyRecord) -> float:
    """Return the least of the epsilons that a party may not pass; infinity where there is none."""
    target = None if privacy.target is None else privacy.target.epsilon
    limits = (privacy.max_epsilon, floors.max_epsilon, target)
    return min((limit for limit in limits if limit is not None), default=math.inf)


_FLOORS = {
    "rows": _least("learns from", "row", lambda asked: min(asked.num_rows, asked.train.num_drawn)),
    "steps": _least("makes", "step", lambda asked: asked.train.steps),
    "batch_size": _least("has batches of", "row", lambda asked: asked.train.rows_per_step),
    "secure": _Floor(_fault_of_secure, lambda _, asked: "any" if asked.secure is None else "required"),
    "targets": _Floor(_fault_of_targets, _allow_targets),
    "noise": _limited("noise", _noise, is_least=True),
    "clip": _limited("clip", lambda privacy: privacy.clip, is_least=False),
    "max_epsilon": _limited("max_epsilon", _most_epsilon, is_least=False),
    "delta": _limited("delta", lambda privacy: privacy.delta, is_least=False),
}


_OF_PRIVACY = frozenset(("noise", "clip", "max_epsilon", "delta"))
_FORM = dict.fromkeys(_FLOORS, "A whole number from 1") | {
    "secure": "any, required or double",
    "targets": "layers, any, or ends of layers' names such as q_proj,v_proj",
    **dict.fromkeys(_OF_PRIVACY, "A number above 0, or none"),
}


def faults(floors: Floors, asked: Asked) -> list[tuple[str, str]]:
    """Return what a round asks for that a party's floors refuse, each with the option's value that would allow it."""
    limits = dict(floors)
    if floors.max_epsilon is not None and floors.delta is None:
        limits["delta"] = USUAL_DELTA  # at a delta of 1 every epsilon is 0
    found = ((name, floor, floor.fault(limits[name], asked)) for name, floor in _FLOORS.items())
    return [(fault, f"{name}={floor.allow(limits[name], asked)}") for name, floor, fault in found if fault is not None]


def check_floors(floors: Floors, asked: Asked, client: int, what: str | None = None) -> None:
    """Raise ConfigError where a party's floors refuse what a round, or what else is named, asks for."""
    if found := faults(floors, asked):
        told = "; ".join(fault for fault, _ in found)
        names = {value.partition("=")[0] for _, value in found}
        why = "" if names <= _OF_PRIVACY else "What so little is learnt from can be read from the update. "
        allow = " ".join(f"--floor {value}" for _, value in found)
        raise ConfigError(
            f"client {client} does not train {what or f'round {asked.round}'}: it {told}",
            hint=f"{why}Ask the server's operator why; to allow it, run "
            f"`fedcli client join --id {client} --data SOURCE {allow}`.",
        )


def parse_floors(given: Iterable[str], before: Floors) -> Floors:
    """Return floors with `KEY=VALUE` put in the place of what was before; raise UsageError for what is none."""
    values: dict[str, Any] = dict(before)
    for text in given:
        key, equals, value = text.partition("=")
        if key not in values or not equals:
            hint = did_you_mean(key, values) if equals else f"Write KEY=VALUE; the keys are {', '.join(values)}."
            raise UsageError(f"--floor {text}: not a floor", hint=hint)
        values[key] = value
    try:
        return Floors.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = str(fault["loc"][0])
        raise UsageError(
            f"--floor {key}={str(values[key])[:100]}: not a floor",
            hint=f"{_FORM[key]} is wanted.",
        ) from error


def describe_floors(floors: Floors) -> str:
    """Return floors as options, those alone that are not the defaults."""
    return " ".join(
        f"--floor {key}={','.join(value) if isinstance(value, tuple) else value}"
        for key, value in floors.model_dump().items()
    )
