"""Preference accuracy: the share of pairs whose chosen response is likelier than the rejected one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcli.data.conversation import Preference, shown
from fedcli.errors import ConfigError

if TYPE_CHECKING:
    from fedcli.data.encoding import Encoder
    from fedcli.model.lora import AdaptedModel

NO_LIMIT = 2**20
"""Tokens: held-out pairs are not cut."""


@dataclass(frozen=True)
class Verdict:
    """What the model makes of one pair; log-probabilities are of whole responses, end token included."""

    prompt: str
    chosen: str
    rejected: str
    chosen_log_prob: float
    rejected_log_prob: float

    @property
    def margin(self) -> float:
        """How much likelier the chosen response is: log p(chosen) - log p(rejected)."""
        return self.chosen_log_prob - self.rejected_log_prob

    @property
    def is_correct(self) -> bool:
        """Whether the chosen response is the likelier one."""
        return self.margin > 0


def judge_pairs(
    adapted: "AdaptedModel", encoder: "Encoder", preferences: Sequence[Preference], on_batch: Callable[[int], None]
) -> list[Verdict]:
    """Return the model's verdict on every pair; raise ConfigError where a pair's sides are empty or alike."""
    from fedcli.model.likelihood import pair_log_probs

    rows = encoder.pairs(preferences, NO_LIMIT)
    if rows.num_unusable:
        raise ConfigError(
            f"{rows.num_unusable} of {len(preferences)} held-out pairs have an empty side, or two that are alike",
            hint="Remove those pairs.",
        )
    verdicts: list[Verdict] = []
    for row, log_probs in zip(preferences, pair_log_probs(adapted, rows.examples), strict=True):
        verdicts.append(Verdict(shown(row.prompt), row.chosen, row.rejected, *log_probs))
        on_batch(len(verdicts))
    return verdicts
