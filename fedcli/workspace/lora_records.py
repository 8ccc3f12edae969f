"""What records say of LoRA's ranks, of the frozen second adapter, and of a merge of products."""

from typing import Annotated

from pydantic import Field

from fedcli.algos.lora import LoraName, LoraWeights
from fedcli.workspace.record import Finite, Id, Natural, Record

Rank = Annotated[int, Field(ge=1, le=2**20)]


class LoraTerms(Record):
    """What a client must know of a round's adapters beside `tensors`."""

    unwritten = ("ranks", "base_delta")

    ranks: dict[Id, Rank] | None = None
    """The ranks of clients that train the adapter's first components alone; the others have the adapter's."""
    base_delta: Rank | None = None
    """The rank of base_delta/, a second adapter of the same scale, which is frozen; None where there is none."""


class LoraErrors(Record):
    """What a merge lacks of the mean of the clients' products in each module, as a share of its norm."""

    factors: dict[str, Finite]
    """The product of the means of A and B."""
    merged: dict[str, Finite] = Field(default_factory=dict)
    """What was published, where that is not the product of the means."""


class LoraMerge(Record):
    """How a round's products were merged; `lora` and its settings are those of fedcli.yaml."""

    unwritten = ("max_rank", "lora_fair", "errors", "lapack")

    lora: LoraName
    lora_weights: LoraWeights = "rows"
    lora_fair: Finite | None = None
    lora_fresh: bool = False
    lora_error: bool = False
    max_rank: Natural | None = None
    errors: LoraErrors | None = None
    """None, and not written, where nobody asked."""
    lapack: str | None = None
    """What made the factorisation; None where there was none."""

    def settings(self) -> dict[str, object]:
        """Return the keys of fedcli.yaml."""
        return self.model_dump(exclude={"errors", "lapack"})
