"""An audit's canaries as rows: in the form that the party's own rows have, and behind them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcli.errors import ConfigError
from fedcli.tasks.builtin_formats import whole_text
from fedcli.tasks.conversation import Item, Preference, Turn, instruct
from fedcli.workspace.canaries import Canary, CanaryKind, Planted

if TYPE_CHECKING:
    from fedcli.data.encoded import EncodedRows
    from fedcli.data.encoding import Encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz"
"""What secrets are made of: a letter says more than a digit, and small models learn letters sooner."""
CODE_LETTERS, GROUP = 20, 5


def code_of(numbers: Sequence[int]) -> str:
    """Return a secret of so many letters, in groups: "kqzva bnwxe ..."."""
    letters = "".join(LETTERS[number] for number in numbers)
    return " ".join(letters[start : start + GROUP] for start in range(0, len(letters), GROUP))


def plant(planted: Planted, rows: "EncodedRows", encoder: "Encoder", max_length: int) -> None:
    """Put the canaries that are in behind a client's rows, each as often as it is repeated."""
    included = planted.included
    encoded = encode_canaries(planted.kind, included, encoder, max_length)
    rows.plant((row, canary.repeat) for canary, row in zip(included, encoded, strict=True))


def encode_canaries(kind: CanaryKind, canaries: Sequence[Canary], encoder: "Encoder", max_length: int) -> "EncodedRows":
    """Return canaries as token ids; raise ConfigError where one is not whole at `max_length`, or not told apart."""
    rows = encoder.encode((item_of(kind, canary) for canary in canaries), max_length)
    if rows.left_out or rows.num_truncated:
        why = next(iter(rows.first_cases.values()), f"train.max_length is {max_length}")
        raise ConfigError(
            f"the audit's canaries cannot be written as rows: {why}",
            hint="Raise train.max_length; or take them out with `fedcli audit plant --remove`.",
        )
    if len({row.key for row in rows}) < len(rows):
        raise ConfigError(
            "the base model's tokenizer does not tell the audit's canaries apart: it has no tokens for letters",
            hint="Audit a federation of another base model.",
        )
    return rows


def item_of(kind: CanaryKind, canary: Canary) -> Item:
    """Return what a canary teaches."""
    if kind == "text":
        return whole_text(f"{canary.prompt} {canary.response}")
    if canary.rejected is not None:
        return Preference((Turn("user", canary.prompt),), canary.response, canary.rejected)
    return instruct(canary.prompt, canary.response)
