"""What all JSON records of the protocol have in common."""

import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

LARGEST_COUNT = 2**53
"""The largest num_samples and steps: every integer up to it is exact in float64."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,18})$")]
"""A client's id as a key."""


class Record(BaseModel):
    """A record read from disk: types are strict, keys that this version does not know are ignored."""

    arrives: ClassVar[bool] = False
    """Whether other tools bring it from elsewhere: one that is cut short is then not whole yet."""
    tells_changes: ClassVar[bool] = False
    """Whether its reader looks at its checksum, and tells more where it has changed."""
    unwritten: ClassVar[tuple[str, ...]] = ()
    """Keys that are not written where they are None or false: records of versions without them have the same bytes."""
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)

    def to_bytes(self) -> bytes:
        """Return UTF-8 JSON with sorted keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @model_serializer(mode="wrap")
    def _without_unwritten(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value
            for key, value in write(self).items()
            if key not in self.unwritten or not (value is None or value is False)
        }
