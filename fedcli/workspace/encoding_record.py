"""What a manifest says of encoded differences."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedcli.config.aggregation import DownEncodingName, EncodingName
from fedcli.workspace.record import Record


class EncodingRecord(Record):
    """How a round's differences may be sent: up by its clients, and down by the server in the round behind it."""

    unwritten = ("top_k", "down")

    name: EncodingName
    top_k: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the numbers that is sent; None, and not written, where all are."""
    down: DownEncodingName | None = None
    """None, and not written, where the adapter goes down whole."""

    @property
    def of_step(self) -> "EncodingRecord | None":
        """How the server sends its step."""
        return None if self.down is None else EncodingRecord(name=self.down)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name == "top_k") != (self.top_k is not None):
            raise ValueError("top_k is the share of the encoding of that name, and of no other")
        return self
