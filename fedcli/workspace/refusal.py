"""Why an update is refused: the codes of the public contract."""

from typing import Literal

RefusalCode = Literal[
    "symlink",
    "not_regular",
    "owner",
    "size",
    "json",
    "hash",
    "duplicate",
    "header",
    "schema",
    "nonfinite",
    "samples",
    "steps",
    "privacy",
    "protocol",
    "workspace",
    "wrong_round",
    "wrong_base",
    "wrong_client",
    "wrong_cluster",
    "unknown_client",
    "unsigned",
    "signature",
    "unenrolled",
]
MAX_REASON = 300


class Refusal(Exception):
    """An update (or a file of it) is not what the protocol asks for; never stops a round.

    The reason may quote a stranger's bytes on their way to a manifest and a terminal, so it is cut short and holds
    printable characters only. `update` is the hash of its update.json, where that could be read.
    """

    update: str | None = None

    def __init__(self, code: RefusalCode, reason: str) -> None:
        self.code = code
        self.reason = "".join(letter if letter.isprintable() else "?" for letter in reason[:MAX_REASON])
        super().__init__(f"{code}: {self.reason}")


class Arriving(Refusal):
    """Not all of an update is there yet, as while it is copied file by file: it is waited for, as a missing one."""
