"""What all sections of fedcli.yaml have in common."""

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of fedcli.yaml: frozen, closed to unknown keys, and true and false are no numbers in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any) -> Any:
        """Refuse what pydantic takes for 1 and 0; YAML reads yes and on so, too."""
        if isinstance(value, dict):
            for name in _numbers(cls) & value.keys():
                if isinstance(value[name], bool):
                    raise ValueError(f"{name} is {str(value[name]).lower()}, which is no number")
        return value


@cache
def _numbers(section: type[Section]) -> frozenset[str]:
    """Return the keys of a section that may be numbers, and not true or false."""
    kinds = {name: _kinds(field.annotation) for name, field in section.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if found & {int, float} and bool not in found)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that a union or an annotated type has."""
    parts = [part for part in get_args(annotation) if isinstance(part, type) or get_args(part)]
    return set().union(*map(_kinds, parts)) if parts else {annotation}
