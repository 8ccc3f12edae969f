"""How updates of LoRA's factors A and B are merged, with the rule's settings; algos/products.py has the formulas."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedcli.algos.arrays import Array, Arrays

LoraName: TypeAlias = Literal["factors", "product", "exact"]
LoraWeights: TypeAlias = Literal["rows", "norm"]
LEAST_WEIGHT = 1e-30
"""Of an update whose product B A is zero, where updates weigh by its norm."""


@dataclass(frozen=True, kw_only=True)
class LoraRule:
    """What becomes of the clients' products B_k A_k.

    `factors` takes the means of A and of B (Zhang et al. 2023, 2305.05644); `product` the best factors of the mean
    product (FlexLoRA, Bai et al. 2024, 2402.11505); `exact` the means, and what their product lacks in base_delta/
    (FedEx-LoRA, Singhal et al. 2024, 2410.09432). `lora_fresh` puts the whole mean product there, and starts new
    factors (FLoRA, Wang et al. 2024, 2409.05976). `lora_weights: norm` weighs by the norm of B_k A_k (HetLoRA, Cho et
    al. 2024, 2401.06432). `lora_fair` is the lambda of LoRA-FAIR's correction of B (Bian et al. 2024, 2411.14961).
    `max_rank` is of base_delta/, by default eight times the adapter's.
    """

    lora: LoraName = "factors"
    lora_weights: LoraWeights = "rows"
    lora_fair: float | None = None
    lora_fresh: bool = False
    lora_error: bool = False
    max_rank: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is the means of the factors, of which nothing more is told."""
        return self == LoraRule()

    @property
    def tells_errors(self) -> bool:
        """Whether the manifest has each module's error."""
        return self.lora != "factors" or self.lora_error or self.lora_fair is not None


def pairs(names: "Iterable[str]") -> dict[str, tuple[str, str]]:
    """Return the names of A and B by their module's, sorted; tensors without a partner are left out."""
    known = {*names}
    found = {}
    for name in sorted(known):
        for mark in (".lora_A.", ".lora_embedding_A"):
            partner = name.replace(mark, mark.replace("_A", "_B"))
            if mark in name and partner in known:
                found[name.partition(".lora_")[0].removeprefix("base_model.model.")] = (name, partner)
    return found


def is_first_factor(name: str) -> bool:
    """Return whether a tensor is an A, whose rows are the rank's; a B has it in its columns."""
    return ".lora_A." in name or ".lora_embedding_A" in name


def of_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return a factor's shape at a smaller rank."""
    return (min(rank, shape[0]), *shape[1:]) if is_first_factor(name) else (*shape[:-1], min(rank, shape[-1]))


def cut(arrays: "Arrays", rank: int) -> "dict[str, Array]":
    """Return an adapter's first components: rows of A, columns of B."""
    return {
        name: array[tuple(slice(size) for size in of_rank(name, array.shape, rank))] for name, array in arrays.items()
    }


def padded(arrays: "Arrays", like: "Arrays") -> "dict[str, Array]":
    """Return an adapter with zeros up to another one's rank, which change nothing of what it computes."""
    import numpy as np

    return {
        name: np.pad(array, [(0, full - size) for size, full in zip(array.shape, like[name].shape, strict=True)])
        for name, array in arrays.items()
    }


def joined(first: "Arrays", second: "Arrays") -> "dict[str, Array]":
    """Return the adapter, of both ranks together, whose products are the sums of two adapters' of one scale."""
    import numpy as np

    return {
        name: np.concatenate([array, second[name]], axis=0 if is_first_factor(name) else -1)
        for name, array in first.items()
    }
