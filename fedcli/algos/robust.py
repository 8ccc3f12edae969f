"""The rule that takes the place of the mean of the differences, with its settings; algos/rules.py has the formulas."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from fedcli.algos.arrays import Array

RuleName: TypeAlias = Literal[
    "mean", "norm_clip", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centred_clip"
]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule with its settings: `tolerate` is f; with `nearest_mixing` it gets means of near updates in their place.

    `weight_cap` is for the mean: no update weighs more than so many times the median.
    """

    rule: RuleName = "mean"
    tolerate: int = 1
    nearest_mixing: bool = False
    weight_cap: float | None = None

    @property
    def is_plain_mean(self) -> bool:
        """Whether it changes nothing of the weighted mean."""
        return self.rule == "mean" and not self.nearest_mixing and self.weight_cap is None

    @property
    def is_blockwise(self) -> bool:
        """Whether the rule looks at each number of all updates by itself, and gives no weights."""
        return self.rule in ("median", "trimmed_mean")

    @property
    def fewest(self) -> int:
        """How many updates it needs to tolerate f hostile ones: 2f + 3 for Krum, else a majority of honest ones."""
        if self.rule in ("krum", "multi_krum"):
            return 2 * self.tolerate + 3
        return 2 * self.tolerate + 1 if self.nearest_mixing or self.rule not in ("mean", "norm_clip") else 1

    def shares(self, weights: "Array") -> "Array":
        """Return the updates' shares of the mean, which add up to 1."""
        from fedcli.algos.rules import capped

        kept = capped(weights, self.weight_cap)
        found: Array = kept / kept.sum()
        return found

    def mixing(self, products: "Array") -> "Array | None":
        """Return the matrix of nearest-neighbour mixing by a Gram matrix; None where nothing is mixed."""
        from fedcli.algos.rules import nearest_mixing

        return nearest_mixing(products, self.tolerate) if self.nearest_mixing else None

    def weights(self, products: "Array", shares: "Array") -> "Array":
        """Return each update's coefficient by their Gram matrix; with a blockwise rule, which has none, 1/n."""
        import numpy as np

        from fedcli.algos.rules import BY_PRODUCTS

        if self.is_blockwise:
            return np.full(len(products), 1 / len(products))
        mixing = self.mixing(products)
        if mixing is not None:
            products = mixing @ products @ mixing.T
        found = shares if self.rule == "mean" else BY_PRODUCTS[self.rule](products, self.tolerate)
        return found if mixing is None else found @ mixing

    def combine(self, rows: "Array", mixing: "Array | None") -> "Array":
        """Return what a blockwise rule makes of some numbers of all updates, a row for each."""
        from fedcli.algos.rules import BLOCKWISE

        return BLOCKWISE[self.rule](rows if mixing is None else mixing @ rows, self.tolerate)
