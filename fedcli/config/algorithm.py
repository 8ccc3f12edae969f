"""fedcli.yaml's section `algorithm`: the class that the registry has under its name says what else belongs in it."""

from dataclasses import asdict
from functools import cache
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from fedcli.algos import ALGORITHMS, Algorithm


def parse_algorithm(value: object) -> Algorithm:
    """Return the algorithm of a section or a manifest.

    Raises ValidationError for its hyperparameters, PydanticCustomError where it has no name or an unknown one.
    """
    if isinstance(value, Algorithm):
        return value
    if not isinstance(value, dict) or "name" not in value:
        raise PydanticCustomError("no_algorithm", "it has no name")
    name = value["name"]
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise PydanticCustomError("unknown_algorithm", "it is unknown", {"name": str(name)})
    kind: Any = ALGORITHMS[name]
    return _adapter(kind).validate_python(value)


AlgorithmSection: TypeAlias = Annotated[Algorithm, PlainValidator(parse_algorithm), PlainSerializer(asdict)]


@cache
def _adapter(kind: type[Algorithm]) -> TypeAdapter[Algorithm]:
    return TypeAdapter(kind)
