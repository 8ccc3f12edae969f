"""Types of hyperparameters: their ranges are checked where fedcli.yaml or a manifest becomes an algorithm."""

from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Lt

Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]
