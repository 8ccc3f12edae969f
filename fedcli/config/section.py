"""What all sections of fedcli.yaml have in common."""

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

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
    found = {name: _kinds(field.annotation, field.metadata) for name, field in section.model_fields.items()}
    return frozenset(name for name, kinds in found.items() if kinds & {int, float} and bool not in kinds)


def _kinds(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> set[Any]:
    """Return the types of a union or an annotated type, without those that have validators of their own for it."""
    if any(isinstance(each, BeforeValidator | PlainValidator) for each in metadata):
        return set()
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__, annotation.__metadata__)
    return set().union(*map(_kinds, get_args(annotation))) if get_args(annotation) else {annotation}
