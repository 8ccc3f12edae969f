"""What an update weighs beside its rows: by the steps that it made, and by how old the round is that it was made from.

FedNova: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020 (2007.07481), equation 9 with a_k = tau_k, the number of steps: AdamW's steps are about equally long, whatever the
gradient, so the a_k of local momentum there would count them wrongly. x+ = x + tau_eff sum p_k d_k / tau_k with
tau_eff = sum p_k tau_k.

FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (2106.06639): an
update from t rounds back is multiplied by (1 + t)^-1/2, and is a difference from its own base. As in the paper's
Algorithm 1 these factors only shrink: what stands for all is a shorter step where updates are old. (FLSim divides them
by the factor of the mean staleness.)
"""

import math
from collections.abc import Sequence


def age_factor(age: int) -> float:
    """Return (1 + t)^-1/2 of an update from t rounds back."""
    return 1.0 / math.sqrt(1.0 + age)


def factors(
    weights: Sequence[float], *, steps: Sequence[int] | None = None, ages: Sequence[int] | None = None
) -> list[float]:
    """Return what each difference is multiplied by: p_k = w_k / sum w, with FedNova's and FedBuff's factors.

    None of `steps` or `ages` leaves their factors out.
    """
    made, back = steps or [1] * len(weights), ages or [0] * len(weights)
    scale = step_scale(weights, made)
    return [scale * weight * age_factor(age) / number for weight, number, age in zip(weights, made, back, strict=True)]


def step_scale(weights: Sequence[float], steps: Sequence[int]) -> float:
    """Return tau_eff / sum w: what sum w_k d_k / tau_k is multiplied by; 1 without weights."""
    if not weights:
        return 1.0
    total = math.fsum(weights)
    return math.fsum(weight * number for weight, number in zip(weights, steps, strict=True)) / total / total
